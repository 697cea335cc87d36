"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    barlow,
    bilm,
    byol,
    denoise,
    dino,
    ijepa,
    ltr,
    mae,
    mlm,
    moco,
    pixels,
    position,
    rotation,
    simclr,
    simsiam,
    vicreg,
)
