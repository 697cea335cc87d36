"""Graphs: batches, and sources. Importing this package registers the sources."""

from sslrun.data.graph import molecules, shapes  # noqa: F401
