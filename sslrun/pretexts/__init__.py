"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    barlow,
    bilm,
    byol,
    denoise,
    dino,
    ltr,
    mlm,
    moco,
    position,
    rotation,
    simclr,
    simsiam,
    vicreg,
)
