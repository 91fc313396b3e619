"""The page at `/`: plain files, nothing to build. It asks the same endpoints as any program.

page/index.html   what there is to see, and where
page/style.css    light and dark, wide and narrow
page/app.js       asks the node each second and hands what it says to the parts
page/ask.js       requests, with the key where one is wanted, and streams
page/picture.js   the mesh as a drawing: nodes in a ring, connections, answers on their way
page/lists.js     models, nodes and requests
page/chat.js      a chat, and how fast it was
page/advice.js    what the doctor found, and what would go where
page/make.js      elements, numbers in words
"""

from __future__ import annotations

from importlib.resources import files

KINDS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("app.js", "ask.js", "picture.js", "lists.js", "chat.js", "advice.js", "make.js"),
        "text/javascript; charset=utf-8",
    ),
}
# Nothing from elsewhere, nothing inline, nobody's frame.
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def asset(name: str) -> bytes:
    """The bytes of one of `KINDS`."""
    return files("node.dashboard").joinpath("page", name).read_bytes()
