"""What TensorBoard is given: the metrics, each epoch once, however often a run is resumed."""

import json
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from robust_app.errors import UserError
from robust_app.events import Events
from robust_app.metrics import SHOWN
from robust_app.run_directory import RunDirectory

QUICK = ("--epochs", "2", "--set", "batch_size=400", "--set", "pgd_steps=2", "--run-dir", "run")
RESUME = ("train", "--run-dir", "run", "--resume", "--tensorboard")
GROUPS = {metric.key: metric.group for metric in SHOWN}


def scalars(run="run"):
    """All values in a run's files of events, as they lie there: by tag, then by step."""
    found = defaultdict(lambda: defaultdict(list))
    for file in sorted(Path(run, "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag][event.step].append(float(make_ndarray(value.tensor)))
    return found


def assert_as_in_metrics(run="run", epochs=2):
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == epochs
    expected = {
        f"{GROUPS[key]}/{key}": {
            line["epoch"]: [pytest.approx(line[key], rel=1e-6)] for line in lines if key in line
        }
        for key in GROUPS.keys() & {key for line in lines for key in line}
    }
    assert scalars(run) == expected
    assert {"losses/certified_loss", "errors/verified_error", "moments/cosine"} <= expected.keys()


@pytest.mark.parametrize("resume", [RESUME, RESUME[:-1]])  # the option need not be repeated
def test_a_resumed_run_has_each_step_once(robust_app, resume):
    robust_app("train", *QUICK, "--tensorboard", "--stop-after", "1")
    assert set(scalars()["errors/verified_error"]) == {1}
    assert robust_app(*resume)[0] == 0
    assert_as_in_metrics()


def test_a_run_begun_without_gets_the_epochs_before_when_it_is_resumed(robust_app):
    robust_app("train", *QUICK, "--stop-after", "1")
    assert not Path("run/tensorboard").exists()
    robust_app(*RESUME)
    assert_as_in_metrics()


def test_a_run_that_is_done_gets_its_scalars_when_it_is_resumed(robust_app):
    robust_app("train", *QUICK)
    robust_app(*RESUME)
    assert_as_in_metrics()


def test_an_epoch_that_a_crash_undid_is_not_there_twice(robust_app):
    robust_app("train", *QUICK, "--stop-after", "1")
    directory = RunDirectory(Path("run"))
    [first] = directory.metrics()
    # The metrics are written before the checkpoint: killed between them, the epoch comes again.
    directory.write_metrics([first, first | {"epoch": 2, "verified_error": 0.0}])
    Events(directory).close()
    robust_app(*RESUME)
    assert_as_in_metrics()


def test_what_is_told_can_be_read_at_once(tmp_path):
    directory = RunDirectory(tmp_path)
    lines = [
        {"epoch": epoch, "standard_error": 1.0, "verified_error": 2.0, "seconds": 1.0}
        for epoch in (1, 2)
    ]
    events = Events(directory)
    for count, line in enumerate(lines, start=1):
        directory.write_metrics(lines[:count])
        events.epoch(line)
        assert scalars(tmp_path) == {
            f"errors/{name}": {e: [value] for e in range(1, count + 1)}
            for name, value in (("standard_error", 1.0), ("verified_error", 2.0))
        }
    events.close()


def test_without_tensorboard_it_says_what_to_install_before_anything_is_written(
    robust_app, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = robust_app("train", *QUICK, "--tensorboard")
    assert status == 2
    assert err == "robust-app: --tensorboard needs TensorBoard: pip install tensorboard\n"
    assert not Path("run").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match=r"/tensorboard: cannot be written"):
        Events(RunDirectory(tmp_path)).close()


def test_a_thread_that_cannot_write_says_nothing_and_others_do(tmp_path, capsys):
    def fail(error: Exception) -> None:
        raise error

    def failing(error: Exception) -> str:
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
        return capsys.readouterr().err

    told = threading.excepthook = lambda failed: print(failed.exc_type, file=sys.stderr)
    try:
        events = Events(RunDirectory(tmp_path))
        assert failing(OSError("full")) == ""
        assert "ValueError" in failing(ValueError("a defect"))
        events.close()
        assert threading.excepthook is told
    finally:
        threading.excepthook = threading.__excepthook__
