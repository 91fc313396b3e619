"""The mends that have to change py-libp2p itself; each small, named, and with a way out.

`apply()` is idempotent and refuses any version of the library but the one these were tried on.
"""

from __future__ import annotations

import logging

import libp2p
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from p2p.compat.negotiate import NegotiationError, read_message
from p2p.errors import LocalFault

LIBP2P_VERSION = "0.8.1"


def apply() -> None:
    """Make every patch of this module. Raises LocalFault for another version of py-libp2p."""
    if libp2p.__version__ != LIBP2P_VERSION:
        raise LocalFault(
            f"py-libp2p {libp2p.__version__} is installed, but this program's mends are for "
            f"{LIBP2P_VERSION}: install that version (make install does)"
        )
    total_negotiation()
    quiet_logging()


def total_negotiation() -> None:
    """Mend 1, for the library's own negotiations: bytes that are not UTF-8 raised UnicodeDecodeError
    through tasks that do not expect it, and a message's length was not bounded.

    Can go when MultiselectCommunicator.read raises MultiselectCommunicatorError for both.
    """
    MultiselectCommunicator.read = _read_total


async def _read_total(self: MultiselectCommunicator) -> str:
    try:
        return await read_message(self.read_writer)
    except NegotiationError as error:
        raise MultiselectCommunicatorError(str(error)) from error
    except (OSError, EOFError) as error:
        raise MultiselectCommunicatorError(f"the stream broke: {error}") from error


def quiet_logging() -> None:
    """A peer that hangs up or sends garbage is no error of ours: the library logs each at ERROR, some
    with a traceback, so that a stranger could fill the log. What matters, p2p logs itself.

    Can go when such events are logged below WARNING. A level other than the library's own is kept.
    """
    library = logging.getLogger("libp2p")
    if library.level in (logging.NOTSET, logging.WARNING):
        library.setLevel(logging.CRITICAL)
