"""Measurements that claims rest on besides sweeps. Importing this package makes all of them known by name."""

from sslrun.claims.measurements import exact, guess, speed  # noqa: F401
