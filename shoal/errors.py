"""What can go wrong between a person's command and the daemon, on the project's three axes.

    ShoalError
        RemoteFault
            DaemonRefused       the daemon answered with an error of its own
            DaemonGarbled       the daemon answered with something that is not its contract
            DaemonSilent        the daemon did not answer, or stopped answering, in time
        ResourceLimit           the daemon sheds load; `retry_after_s` says when to come back
        LocalFault
            DaemonAbsent        no daemon runs where the command looks for one
            UsageProblem        the command was given wrong values (exit status 2)
            CommandFailed       what was asked for could not be done

The text of each is one plain line, ready to be printed after `shoal: `.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Root of everything that the command line raises on purpose."""


class RemoteFault(ShoalError):
    """The daemon's doing."""


class DaemonRefused(RemoteFault):
    """The daemon answered with an HTTP `status` and the OpenAI-shaped error in the message."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class DaemonGarbled(RemoteFault):
    """The daemon's answer does not follow the contract (an older version, or another program)."""


class DaemonSilent(RemoteFault):
    """No answer within the deadline, or the answer broke off."""


class ResourceLimit(ShoalError):
    """The daemon is busy. `retry_after_s` is its own hint, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LocalFault(ShoalError):
    """This machine's doing, or the command's."""


class DaemonAbsent(LocalFault):
    """Nothing answers where the command looked for a daemon."""


class UsageProblem(LocalFault):
    """A flag or argument has a value that cannot be right."""


class CommandFailed(LocalFault):
    """The command understood what was wanted and could not do it."""
