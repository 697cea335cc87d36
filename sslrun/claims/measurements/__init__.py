"""Measurements, for claims that no sweep tests. Importing this package registers all of them."""

from sslrun.claims.measurements import (  # noqa: F401
    colors,
    exact,
    graphs,
    guess,
    order,
    speed,
)
