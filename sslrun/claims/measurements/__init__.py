"""Measurements, for claims that no sweep tests. Importing this package registers all of them."""

from sslrun.claims.measurements import colors, exact, guess, order, speed  # noqa: F401
