"""Turns the few marks of reStructuredText in docstrings into the site's Markdown."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":[a-z]+:`(?:~[\w.]*\.)?([^`]+)`")  # :class:`~mogd.rules.Rule`
BLOCK = re.compile(r"^\.\. code-block:: \w+$", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)  # up to the next empty line


class Markdown(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Code as Markdown's code."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = BLOCK.sub("", text)  # the indented lines below it stay a block
            text = EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
            obj.docstring.value = text
