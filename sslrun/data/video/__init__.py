"""Videos: films, clips of them, and sources. Importing this package registers the sources."""

from sslrun.data.video import fish, folders, sources  # noqa: F401
