"""Ctrl-C, SIGTERM and SIGHUP (its terminal was closed) stop a command.

At once as a rule; between two iterations while it trains, so that files stay whole.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class _State:
    is_training = False
    noted: int | None = None


def install() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise Stopped; not a SIGHUP that is ignored, as nohup has it."""
    signal.signal(signal.SIGINT, _receive)
    signal.signal(signal.SIGTERM, _receive)
    if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        signal.signal(_HANGUP, _receive)


def _receive(signal_number: int, _frame: object) -> None:
    if _State.is_training and signal_number == _HANGUP and _State.noted is not None:
        return  # the kernel sends one, and the shell another
    if _State.is_training and _State.noted is None:
        _State.noted = signal_number  # raised here, it could be lost in the middle of another library's code
        if os.isatty(2):
            with suppress(OSError):  # a terminal that has gone
                os.write(2, b"\r\033[Kstopping after this iteration; once more stops at once\n")  # print may be at work
    else:  # a second one does not wait
        raise Stopped(signal_number)


@contextmanager
def training() -> Iterator[None]:
    """Inside, a first signal is only noted, for `heed`."""
    _State.is_training, _State.noted = True, None
    try:
        yield
    finally:
        _State.is_training, _State.noted = False, None


def heed() -> None:
    """Raise Stopped if a signal has been noted."""
    if (stop := noted()) is not None:
        raise stop


def noted() -> Stopped | None:
    """The signal that is noted, if there is one."""
    return None if _State.noted is None else Stopped(_State.noted)
