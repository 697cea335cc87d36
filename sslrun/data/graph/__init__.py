"""Graphs: batches, and sources. Importing this package registers the sources."""

from sslrun.data.graph import shapes  # noqa: F401
