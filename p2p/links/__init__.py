"""Tensor links: bulk messages between two peers, over the quickest path there is.

A link sends whole messages, a small header and a payload of raw bytes, in order, to and from one service of one
peer. It is opened over the authenticated Rpc, where both ends exchange ephemeral keys; its records, sealed end to
end, then travel over striped TCP sockets where the peer can be dialled, and over a libp2p stream otherwise. The path
may break and change beneath a link; its user does not notice. What the bytes mean is no business of this package.
"""

from p2p.links.link import Link
from p2p.links.links import Links
from p2p.links.types import LinkReport, LinksConfig

__all__ = ["Link", "LinkReport", "Links", "LinksConfig"]
