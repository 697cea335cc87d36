"""Control: environments, trajectories, and sources. Importing this package registers them."""

from sslrun.data.control import gym, key_to_door, paths, pictures, point, sources  # noqa: F401
