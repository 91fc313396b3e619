"""What can go wrong with a mesh of local processes. All of it is this machine's doing.

    TestnetError
        LaunchFailed            a node ended or did not become ready in time; the message quotes its log
        AlreadyRunning          the state directory has a mesh that still runs
        StateProblem            the state directory or its record cannot be read or written

Each message is one line that a person can act on.
"""

from __future__ import annotations


class TestnetError(Exception):
    """Root of what the launcher raises on purpose."""

    __test__ = False  # pytest collects classes by this name otherwise


class LaunchFailed(TestnetError):
    """A node ended, or did not do its part in time."""


class AlreadyRunning(TestnetError):
    """The state directory belongs to a mesh that still runs."""


class StateProblem(TestnetError):
    """The state directory or the record in it cannot be used."""
