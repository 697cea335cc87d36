"""Videos: films, clips of them, and sources. Importing this package registers the sources."""

from sslrun.data.video import composite, fish, folders, frames, sources  # noqa: F401
