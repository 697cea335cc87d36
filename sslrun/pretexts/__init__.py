"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    barlow,
    bilm,
    byol,
    denoise,
    ltr,
    mlm,
    moco,
    pixels,
    position,
    rotation,
    simclr,
    simsiam,
    vicreg,
)
