"""Shoal's public face: what users' code imports.

Everything else in this package is the command line. It stays importable in a few milliseconds: neither
torch nor libp2p nor the daemon is touched from here.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
