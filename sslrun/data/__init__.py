"""Data: sources and their splits, batches, and augmentation on the device. Knows nothing of networks."""

from sslrun.data import image as image
from sslrun.data import text as text
