"""Text and images, tokenizers, and loaders whose position is one integer.

>>> from danlu.data import TextConfig
>>> TextConfig(length=128).vocab_size
4096
"""

from danlu.data.captions import CaptionsConfig, CaptionsData, open_captions
from danlu.data.corpus import Corpus, open_corpus
from danlu.data.document import Document
from danlu.data.examples import ExampleLoader
from danlu.data.images import ImagesConfig, ImagesData, open_images, to_bytes, to_float
from danlu.data.loader import Loader, validation_batches
from danlu.data.mixture import MixedLoader, Mixture
from danlu.data.text import TextConfig, TextData, open_text
from danlu.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from danlu.data.tokenizing import tokenize
from danlu.protocols import IGNORE

__all__ = [
    "IGNORE",
    "CaptionsConfig",
    "CaptionsData",
    "Corpus",
    "Document",
    "ExampleLoader",
    "ImagesConfig",
    "ImagesData",
    "Loader",
    "MixedLoader",
    "Mixture",
    "TextConfig",
    "TextData",
    "Tokenizer",
    "load_tokenizer",
    "open_captions",
    "open_corpus",
    "open_images",
    "open_text",
    "to_bytes",
    "to_float",
    "tokenize",
    "train_tokenizer",
    "validation_batches",
]
