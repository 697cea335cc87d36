"""Images: sources, decoding, augmentation and corruptions. Importing it registers the data sets."""

from sslrun.data.image import masks as masks
from sslrun.data.image import shards as shards
from sslrun.data.image import sources as sources
from sslrun.data.image import stamps as stamps
from sslrun.data.image import vtab as vtab
