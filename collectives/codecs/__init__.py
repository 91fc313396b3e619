"""How numbers travel: encodings of one vector of float32, each with its bytes and its error.

`codec(name)` gives one; `register` adds another. They are pure functions of the values and know nothing of rounds.
"""

from collectives.codecs.base import Codec, codec, codecs, register
from collectives.codecs.blocks import INT4, INT8
from collectives.codecs.errors import CodecFault, UnknownCodec
from collectives.codecs.plain import BF16, FP32
from collectives.codecs.sparse import SPARSE8, TOPK

__all__ = [
    "BF16",
    "FP32",
    "INT4",
    "INT8",
    "SPARSE8",
    "TOPK",
    "Codec",
    "CodecFault",
    "UnknownCodec",
    "codec",
    "codecs",
    "register",
]
