"""Data sets, their splits, batches, and augmentation on the device. Independent of networks."""

from sslrun.data import image as image  # first, because stores of all data read images

# isort: split
from sslrun.data import control as control
from sslrun.data import graph as graph
from sslrun.data import text as text
from sslrun.data import video as video
