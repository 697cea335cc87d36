"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    barlow,
    bilm,
    byol,
    denoise,
    lejepa,
    ltr,
    mlm,
    moco,
    mocov3,
    nnclr,
    position,
    rotation,
    simclr,
    simsiam,
    swav,
    vicreg,
)
