"""Data: sources and their splits, batches, and augmentation on the device. Knows nothing of networks."""

from sslrun.data import corpora as corpora
from sslrun.data import passages as passages
from sslrun.data import sentences as sentences
from sslrun.data import sources as sources
from sslrun.data import tags as tags
from sslrun.data import vtab as vtab
from sslrun.data import world_sources as world_sources
