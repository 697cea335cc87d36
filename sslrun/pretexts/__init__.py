"""Pretext tasks, one file each. Importing this package registers them."""

from sslrun.pretexts import barlow, byol, moco, position, rotation, simclr, simsiam, vicreg  # noqa: F401
