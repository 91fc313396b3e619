"""`python -m shoal`: the same command as `shoal`, for places where the script is not on the path.

It holds nothing of its own; `shoal.cli` does everything.
"""

from __future__ import annotations

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main())
