"""Videos: films, clips of them, and sources. Importing this package registers the sources."""

from sslrun.data.video import sources  # noqa: F401
