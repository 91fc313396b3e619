"""The errors of codecs, within the tree of collectives.errors.

RemoteFault
    CodecFault       bytes that are no encoding of so many elements
LocalFault
    UnknownCodec     no codec of that name is registered
    NonFinite        (collectives.errors) the values to encode hold NaN or infinity
"""

from __future__ import annotations

from collectives.errors import LocalFault, RemoteFault


class CodecFault(RemoteFault):
    """The bytes are no encoding of so many elements: wrong length, or values that no encoder writes."""


class UnknownCodec(LocalFault):
    """No codec is called `name`; `known` are."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown codec {name!r}; there are {', '.join(known)}")
        self.name = name
        self.known = known
