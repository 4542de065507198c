"""Being told to stop: Ctrl-C by a user, SIGTERM by a scheduler or by torchrun."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived; ends what Ctrl-C ends, in the same ways."""


@dataclass
class Stop:
    """Whether, and by what, the process was told to stop.

    Attributes:
        status: of exit by convention, 128 and the signal's number; None if it was not told.
    """

    status: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Raise :class:`Terminated` on SIGTERM and ``KeyboardInterrupt`` on Ctrl-C.

    After the first of them SIGTERM is ignored: schedulers send it to every process of a job, and
    torchrun passes it on to its own, which are just about to say how to continue. Whatever this
    process was started to ignore it ignores.
    """
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        stop.status = 128 + number
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {}
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is usual:
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
