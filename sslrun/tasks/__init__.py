"""Downstream tasks: what is learned from labels, and how well. Importing fills the registry."""

from sslrun.tasks import classification as classification
from sslrun.tasks import text as text
