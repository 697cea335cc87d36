"""Graphs: batches, and sources. Importing this package registers the sources."""

from sslrun.data.graph import files, molecules, shapes  # noqa: F401
