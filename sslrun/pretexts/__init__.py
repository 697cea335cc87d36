"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import (  # noqa: F401
    autoencoder,
    barlow,
    bilm,
    byol,
    colorize,
    denoise,
    ltr,
    mlm,
    moco,
    position,
    rotation,
    simclr,
    simsiam,
    vicreg,
)
