"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    barlow,
    bilm,
    byol,
    denoise,
    dino,
    ijepa,
    lejepa,
    ltr,
    mae,
    mlm,
    moco,
    mocov3,
    nnclr,
    pixels,
    position,
    rotation,
    simclr,
    simsiam,
    swav,
    vicreg,
)
