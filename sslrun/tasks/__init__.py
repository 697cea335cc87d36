"""Downstream tasks, which learn from labels. Importing this package registers them."""

from sslrun.tasks import classification as classification
from sslrun.tasks import clips as clips
from sslrun.tasks import graph as graph
from sslrun.tasks import keypoints as keypoints
from sslrun.tasks import masks as masks
from sslrun.tasks import numbers as numbers
from sslrun.tasks import objects as objects
from sslrun.tasks import pairs as pairs
from sslrun.tasks import reach as reach
from sslrun.tasks import returns as returns
from sslrun.tasks import text as text
from sslrun.tasks import translation as translation
