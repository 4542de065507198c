"""What a format to be damaged has to say of itself."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.mutation import Random

Write = Callable[[Random, Path], None]
Read = Callable[[Path], None]


class Format(NamedTuple):
    """A kind of file that the program reads.

    Attributes:
        write: puts damaged files into an empty folder, as many as the program reads together.
        read: reads them as a command does and goes on with what was read: builds the network,
            loads the state, evaluates an image. A ``UserError`` is a refusal.
    """

    write: Write
    read: Read
