"""The `shoal` command: parse, dispatch, and turn every outcome into an exit status and at most one line.

0 is done, 1 failed with one line `shoal: ...` on stderr, 2 wrong usage, 130 interrupted by Ctrl-C
(silently), 141 the reader of our output went away (silently). The commands live in `cli_*.py` and are
imported only when they are run, so that `shoal --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from shoal.cli_parser import build_parser
from shoal.errors import ShoalError, UsageProblem

DONE, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    try:
        options = build_parser().parse_args(arguments)
        status = _command(options.run)(options)
        sys.stdout.flush()
        return status
    except SystemExit as leaving:  # argparse's own way out, after --help or a usage error
        return leaving.code if isinstance(leaving.code, int) else USAGE
    except ShoalError as problem:
        return _fail(str(problem), USAGE if isinstance(problem, UsageProblem) else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as bug:  # the last boundary: a person gets one line
        if os.environ.get("SHOAL_DEBUG"):
            raise
        what = f"{type(bug).__name__}: {bug}" if str(bug) else type(bug).__name__
        return _fail(f"this is a fault of shoal itself: {what} (SHOAL_DEBUG=1 shows where)", FAILED)


def _command(target: str) -> Callable[[argparse.Namespace], int]:
    module, _, function = target.partition(":")
    command: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    return command


def _fail(message: str, status: int) -> int:
    print("shoal: " + " ".join(message.split()), file=sys.stderr)
    return status
