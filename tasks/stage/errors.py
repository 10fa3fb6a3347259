"""The ways a stage can end other than well, each with its exit code.

Every message is one line that says what is wrong, where, and how to mend it.
"""

import errno
import sys

FULL_DISK = ("No space left on device", "iostream error", "PytorchStreamWriter failed")


class UserError(Exception):
    """Wrong use, params or data; a retry would not help. Exit code 2."""


class ParamsError(UserError):
    """A key of params.yaml is wrong, missing or unknown."""


class DataError(UserError):
    """An input file or row is wrong."""


class GateRefused(Exception):  # noqa: N818 - a refusal is an answer, not an error
    """A gate or a guard said no. Exit code 3."""


class TryAgain(Exception):  # noqa: N818
    """A lock, a full disk or a server is in the way; the same command may work later. Exit code 75."""


class Interrupted(BaseException):
    """The stage was asked to stop; like KeyboardInterrupt, no `except Exception` may swallow it.

    `signal_number` is what was received; the exit code is 128 plus that.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


class Helped(BaseException):
    """A process of the stage other than the first has nothing left to do."""


class ProcessEnded(Exception):  # noqa: N818
    """A process of the stage ended otherwise than well, with `code`, and has said why in words for people."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with `error`."""
    match error:
        case UserError():
            return 2
        case GateRefused():
            return 3
        case TryAgain():
            return 75
        case Interrupted():
            return 128 + error.signal_number
        case ProcessEnded():
            return error.code
    return 75 if disk_is_full(error) else 1


def disk_is_full(error: BaseException) -> bool:
    """Whether `error`, or its cause, says that no space is left (native libraries say so only in words).

    torch.save says only that writing failed, whatever the reason.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(cause) for words in FULL_DISK):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def told(error: BaseException) -> str:
    """What the person at the terminal is told about `error`, in one line."""
    if exit_code(error) == 75 and not isinstance(error, TryAgain | ProcessEnded):
        return f"the disk is full ({one_line(error)}): make room and run again"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The message of `error` with its line breaks folded."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """Write one line for the person at the terminal (stderr: stdout is for results)."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
