"""What the documentation shows is what happens: its code blocks and the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    module.name
    for package in ("mogd", "robust_app")
    for module in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
    if not module.name.endswith("__main__")  # importing it would run the command line
]
RUN_BY_A_TEST_OF_ITS_OWN = {"trainers.md"}  # what it imports is slow to import
NOT_CODE = {"bash", "text", "toml"}  # fences that nobody executes


def blocks(page):
    """The Python blocks of a page; they share names from top to bottom."""
    return list(Document.parse(str(page), PythonCodeBlockParser()).examples())


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in RUN_BY_A_TEST_OF_ITS_OWN],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        block.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_code_of_a_page_is_missed(page):
    languages = re.findall(r"^\s*```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    assert languages.count("python") == len(blocks(page))
    assert set(languages) <= NOT_CODE | {"python"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_there_are_pages_and_examples_to_test():
    assert sum(len(blocks(page)) for page in PAGES) >= 10
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


FIGURE = re.compile(r"(?<![\w.,/-])\d+\.\d+(?![\w/]|\.\d)")  # no part of a version or a name
QUOTING = ["README.md", "docs/results/summary.md"]


def is_quoted(figure, known):
    """Whether a figure is a known one, or is it once that is rounded."""
    decimals, finer = (len(text.partition(".")[2]) for text in (figure, known))
    return finer >= decimals and abs(float(known) - float(figure)) <= 0.5 * 10**-decimals + 1e-9


def stands_in(group, line):
    """Whether a line has all figures of a group, as of 3.28 / 6.16 or 3.28 ± 0.16, in its order."""
    known = iter(FIGURE.findall(line))
    return all(any(is_quoted(figure, other) for other in known) for figure in FIGURE.findall(group))


@pytest.mark.parametrize("page", QUOTING)
def test_a_table_quotes_the_pages_that_it_names(page):
    """A wrong figure that the same line of a page has of something else is not noticed."""
    path, quoted = ROOT / page, 0
    for row in re.findall(r"^\|.*\|$", path.read_text(encoding="utf-8"), re.MULTILINE):
        names = set(re.findall(r"\]\((?!https?:)([^)#]+\.md)", row))
        pages = [(path.parent / name).read_text(encoding="utf-8") for name in names]
        lines = "\n".join(pages).splitlines()
        text = re.sub(r"\]\([^)]*\)", "]", row)
        groups = re.findall(rf"{FIGURE.pattern}(?: [/±] {FIGURE.pattern})*", text) if names else []
        for group in groups:
            assert any(stands_in(group, line) for line in lines), f"{group} of {row}"
        quoted += len(groups)
    assert quoted > 0
