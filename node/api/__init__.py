"""The HTTP side of a node: an OpenAI-compatible API, status for people and scrapers, and the owner's orders.

Knows HTTP, JSON and text; asks a `Gateway` for tokens and a `Control` for orders. It does not know how the
mesh works.
"""

from node.api.app import build_app
from node.api.config import ApiConfig, ServerConfig
from node.api.guard import is_loopback
from node.api.server import serve_http

__all__ = ["ApiConfig", "ServerConfig", "build_app", "is_loopback", "serve_http"]
