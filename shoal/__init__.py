"""Shoal's public face: what users' code imports.

    from shoal import Client, AsyncClient

Everything else in this package is the command line. It stays importable in a few milliseconds: neither torch nor libp2p
nor the daemon is touched from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.client import Answer, AsyncClient, AsyncStream, Client, Model, Piece, Stream
    from shoal.errors import LocalFault, RemoteFault, ResourceLimit, ShoalError

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "LocalFault",
    "Model",
    "Piece",
    "RemoteFault",
    "ResourceLimit",
    "ShoalError",
    "Stream",
    "__version__",
]
_ERRORS = ("LocalFault", "RemoteFault", "ResourceLimit", "ShoalError")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("shoal.errors" if name in _ERRORS else "shoal.client"), name)
