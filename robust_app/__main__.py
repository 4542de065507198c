"""The command ``robust-app``, and ``python -m robust_app``, for torchrun among others."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line, whose imports take seconds; Ctrl-C ends them without a word."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, _leave)
    from robust_app import cli

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _leave(number: int, _: FrameType | None) -> None:
    """At once: what raises while a module is imported may be caught there, and get lost."""
    os._exit(128 + number)


if __name__ == "__main__":
    main()
