"""Ctrl-C and SIGTERM: at once as a rule, between two iterations while a command trains, so that files stay whole."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


class _State:
    is_training = False
    noted: int | None = None


def install() -> None:
    """Let SIGINT and SIGTERM raise Stopped."""
    signal.signal(signal.SIGINT, _receive)
    signal.signal(signal.SIGTERM, _receive)


def _receive(signal_number: int, _frame: object) -> None:
    if _State.is_training and _State.noted is None:
        _State.noted = signal_number  # raised here, it could be lost in the middle of another library's code
        if os.isatty(2):
            os.write(2, b"\r\033[Kstopping after this iteration; once more stops at once\n")  # print may be under way
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
    if _State.noted is not None:
        raise Stopped(_State.noted)
