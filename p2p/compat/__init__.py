"""Every mend of py-libp2p 0.8.1 that this project needs, and nothing else.

`yamux` and `noise` replace what moves bytes, `negotiate` what chooses protocols, `tcp` the
listener, `swarm` the handling of connections; all by subclassing in our own construction.
`patches` holds the few that must change the library itself; `apply()` makes them, once, and
only for the version they were written for. The rest of p2p imports libp2p through here.
"""

from p2p.compat.patches import LIBP2P_VERSION, apply

__all__ = ["LIBP2P_VERSION", "apply"]
