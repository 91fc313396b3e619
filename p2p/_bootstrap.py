"""Makes `import libp2p` find the library, before anything of ours imports it.

A checkout (`make install`) has the libp2p distribution installed. A Shoal installed by pip carries its files under
`p2p/_vendor/`, for the reason that `tools/build/backend.py` gives. It knows where the files may lie and nothing of
what is in them.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBP2P_VERSION = "0.8.1"
VENDOR = Path(__file__).with_name("_vendor")


def ensure_libp2p(vendor: Path = VENDOR) -> None:
    """Puts `vendor` first on the import path, where it exists and the libp2p we were written against is not installed.

    Another version does not do: the mends reach into private parts. Nothing happens once libp2p was imported.
    """
    if "libp2p" in sys.modules or not vendor.is_dir() or str(vendor) in sys.path:
        return
    try:
        installed = version("libp2p")
    except PackageNotFoundError:
        installed = None
    if installed != LIBP2P_VERSION:
        sys.path.insert(0, str(vendor))


ensure_libp2p()
