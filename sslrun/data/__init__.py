"""Data: sources and their splits, batches, and augmentation on the device. Knows nothing of networks."""

from sslrun.data import sources as sources
from sslrun.data import text as text
from sslrun.data import vtab as vtab
