"""``robust-app plot``: which runs it draws, where to, and what it refuses."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_app import recipes
from robust_app.plot import labels
from robust_app.run_directory import RunDirectory
from tests.robust_app.refusals import assert_refused

OLD = {"standard_error": 5.0, "verified_error": 20.0, "seconds": 1.0, "epsilon": 0.1}
parts = st.lists(st.sampled_from(["runs", "digits", "a.b", "0"]), min_size=1, max_size=4)


def begun(path, epochs=3, **metrics):
    """A run as its directory shows it after so many epochs."""
    directory = RunDirectory(Path(path))
    directory.path.mkdir(parents=True)
    directory.start(recipes.load("digits"))
    if epochs:
        lines = [{"epoch": epoch, **OLD, **metrics} for epoch in range(1, epochs + 1)]
        directory.write_metrics(lines)
    return directory


def test_runs_of_old_and_new_versions_are_drawn_together(robust_app):
    begun("old")
    begun("new", cosine=0.3, conflicts=0.1)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    status, out, _ = robust_app("plot", "old", "new")
    assert status == 0
    assert out.split() == ["written:", "curves.png", "written:", "curves.svg"]
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse("curves.svg").getroot().tag.endswith("svg")
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("name", ["sub.5", "sub.5.png", "sub.5.svg", "sub.5.PNG"])
def test_the_pictures_have_the_name_that_is_asked_for(robust_app, name):
    begun("run")
    Path("to").mkdir()
    assert robust_app("plot", "run", "--out", f"to/{name}")[0] == 0
    assert sorted(path.name for path in Path("to").iterdir()) == ["sub.5.png", "sub.5.svg"]


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_pictures_without_a_name_are_refused(robust_app, name):
    outcome = robust_app("plot", "new", "--out", name)
    assert_refused(outcome, "--out", "expected a name of a picture")


@pytest.mark.parametrize("name", ["figure.pdf", "figure.JPG"])
def test_pictures_of_other_kinds_are_refused(robust_app, name):
    outcome = robust_app("plot", "new", "--out", name)
    assert_refused(outcome, "--out", "expected", ".png or .svg", f"found '{name}'")


def test_a_run_in_progress_is_drawn_without_its_lock(robust_app):
    with begun("run", epochs=1).locked():
        assert robust_app("plot", "run")[0] == 0


def test_what_is_no_run_or_has_no_epoch_is_refused_by_name(robust_app):
    begun("run")
    begun("fresh", epochs=0)
    Path("file").write_text("mine")
    assert_refused(robust_app("plot", "run", "nowhere"), "nowhere", "no run here")
    assert_refused(robust_app("plot", "run", "fresh"), "fresh", "no epoch is done yet")
    assert_refused(robust_app("plot", "run", "file"), "file", "cannot be read")
    Path("fresh/metrics.jsonl").write_text('{"epoch": 1}\n')
    assert_refused(robust_app("plot", "run", "fresh"), "metrics.jsonl", "damaged")
    assert_refused(robust_app("plot", "run", "--out", "no/pictures"), "no/pictures", "written")
    assert_refused(robust_app("plot"), "Missing argument 'RUN_DIR'")
    assert not Path("curves.png").exists()


def test_runs_are_called_by_as_much_of_their_path_as_it_takes():
    runs = ("/a/runs/one", "/a/runs/two", "/a/old/two", "/b/old/two")
    expected = ["one", "runs/two", "a/old/two", "b/old/two"]
    assert labels([Path(run) for run in runs]) == expected
    assert labels([Path("/"), Path("/run")]) == ["/", "run"]
    assert labels([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]


@given(st.lists(parts, min_size=1, max_size=5, unique_by=tuple))
def test_labels_are_ends_of_paths_and_all_different(ends):
    paths = [Path("/", *end) for end in ends]
    found = labels(paths)
    assert len(set(found)) == len(found)
    for path, label in zip(paths, found, strict=True):
        assert path.parts[-len(Path(label).parts) :] == Path(label).parts


def test_a_run_named_twice_is_one_run():
    assert labels([Path("/a/run"), Path("/b/run"), Path("/a/run")]) == ["a/run", "b/run", "a/run"]
