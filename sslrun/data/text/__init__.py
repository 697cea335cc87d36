"""Text: sources, tokenizers and token sequences. Importing this package registers its data sets."""

from sslrun.data.text import conll as conll
from sslrun.data.text import corpora as corpora
from sslrun.data.text import minimal_pairs as minimal_pairs
from sslrun.data.text import passages as passages
from sslrun.data.text import sentences as sentences
from sslrun.data.text import tags as tags
from sslrun.data.text import translation as translation
from sslrun.data.text import world_sources as world_sources
