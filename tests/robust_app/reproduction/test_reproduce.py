"""``robust-app reproduce`` from data to table, on few images that are easy to tell apart."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_app import cli, data, reporting, session
from robust_app.distributed import World
from robust_app.reproduction import paper, plan
from robust_app.reproduction.plan import Settings
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import ONE_THREAD, TORCHRUN

ONE_ROW = ("--models", "table-f-a", "--methods", "crown-ibp", "--epsilons", "0.2")
TINY = ("--epochs-scale", "0.01")  # 2 epochs of one step
RUN = "mnist-table-f-a-crown-ibp-0.4-paper-x0.01-seed0"


def write_mnist(root):
    """Bars at ten heights, in files as torchvision lays them out: 5,300 and 20 images."""
    folder, generator = root / "MNIST" / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, count in (("train", 5300), ("t10k", 20)):
        labels = generator.integers(0, 10, count)
        images = np.zeros((count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 + 2 * label : 6 + 2 * label, 4:24] = 255
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    return root


@pytest.fixture
def reproduce(robust_app):
    """Run the command in an empty folder; returns exit status, standard output and error."""
    return partial(robust_app, "reproduce")


@pytest.fixture(scope="module")
def template(tmp_path_factory, mnist):
    """One row of Table 3, finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("template")
    command = ["robust-app", "reproduce", "table-3", *ONE_ROW, *TINY]
    command += ["--data-root", str(mnist), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch, (folder / "screen.txt").open("w") as screen:
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "stdout", screen)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return folder


@pytest.fixture
def finished(template, tmp_path):
    return Path(shutil.copytree(template / "out", tmp_path / "out"))


def half_done(run, mnist, out):
    """Train a run's first epoch alone."""
    dataset = data.load("mnist", mnist)
    directory = RunDirectory(out / run.name)
    with directory.locked():
        directory.start(run.config)
        trainer = Trainer(run.config, dataset, World(0, 1, torch.device("cpu")))
        session.run(trainer, directory, reporting.Silent(), 1)
    return directory


def states(out):
    """Every file of the runs with its time of change and content."""
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in out.glob("*/*")
        if file.name != ".lock"
    }


def test_a_row_is_trained_evaluated_and_written(template):
    run = RunDirectory(template / "out" / RUN)
    assert len(run.metrics()) == 2
    assert {result["epsilon"] for result in run.results()} == {0.2}
    assert all(result["environment"]["device"] == "cpu" for result in run.results())
    assert run.config().evaluation_epsilon == 0.4  # the run of 0.2, 0.3 and 0.4
    assert run.curves_file.exists()
    [made] = run.environments()
    assert made["device"] == "cpu"
    assert {result["data"] for result in run.results()} == {made["data"]}

    content = json.loads((template / "out" / "table-3.json").read_text(encoding="utf-8"))
    measured = {(r["epsilon"], r["method"], r["model"]): r["measured"] for r in content["rows"]}
    assert len(measured) == 54  # all rows, whichever were asked for
    [own] = measured["0.2", "crown-ibp", "table-f-a"]
    last = run.results()[-1]
    assert own["errors"]["last"]["verified"] == last["verified_error"]
    assert own["errors"]["last"]["standard"] == last["standard_error"]
    assert measured["0.3", "crown-ibp", "table-f-a"][0]["errors"] == {}  # trained, not evaluated
    assert measured["8-255", "advibp", "table-f-a"][0]["begun"] is False

    text = (template / "out" / "table-3.md").read_text(encoding="utf-8")
    assert f"| mnist | 0.2 | crown-ibp | table-f-a | {last['standard_error']:.2f} |" in text
    assert "| cifar10 | 8/255 | advibp | verified | 68.50 | – | 69.36 | – | 71.40 | – |" in text
    screen = (template / "screen.txt").read_text(encoding="utf-8")
    assert "epoch 2/2" in screen
    assert "table-f-a" in screen
    assert "table-f-b" not in screen  # not asked for


def test_what_is_done_is_not_done_again(reproduce, finished):
    before = states(finished)
    status, out, _ = reproduce("table-3", *ONE_ROW, *TINY, "--out", finished)  # without the data
    assert status == 0
    assert "epoch 1" not in out
    assert "table-f-a" in out
    assert states(finished) == before


def test_a_folder_with_brackets_in_its_name_is_said_as_it_is(reproduce, finished, tmp_path):
    finished.rename(tmp_path / "[bold]x:smile:")
    status, out, _ = reproduce("table-3", *ONE_ROW, *TINY, "--out", "[bold]x:smile:")
    assert status == 0
    assert "written: [bold]x:smile:/table-3.md" in out.splitlines()


def test_another_radius_evaluates_the_same_network(reproduce, finished, mnist):
    before = states(finished)
    rows = (*ONE_ROW[:-1], "0.3")
    status, out, _ = reproduce("table-3", *rows, *TINY, "--out", finished, "--data-root", mnist)
    assert status == 0
    assert "epoch 1" not in out
    changed = {file.name for file, state in states(finished).items() if before.get(file) != state}
    assert changed == {"results.json"}
    assert {result["epsilon"] for result in RunDirectory(finished / RUN).results()} == {0.2, 0.3}


def test_a_run_half_done_is_resumed(reproduce, finished, mnist, tmp_path):
    asked = paper.select(paper.find("table-3"), ["table-f-a"], ["0.2"], ["crown-ibp"])
    [task] = plan.tasks(asked, Settings(epochs_scale=0.01))
    directory = half_done(task.run, mnist, tmp_path / "new")
    [first] = directory.metrics()
    status, out, _ = reproduce("table-3", *ONE_ROW, *TINY, "--out", "new", "--data-root", mnist)
    assert status == 0
    assert "epoch 1/2" not in out
    assert "epoch 2/2" in out
    assert directory.metrics()[0] == first
    # To the same bits as the run that was not interrupted.
    whole = RunDirectory(finished / RUN)
    one, other = (
        torch.load(run.last_file, weights_only=True)["network"] for run in (directory, whole)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_held_by_another_process_is_left_to_it(reproduce, mnist, tmp_path):
    asked = paper.select(paper.find("table-3"), ["table-f-a"], ["0.2"], ["crown-ibp"])
    [task] = plan.tasks(asked, Settings(epochs_scale=0.01))
    directory = half_done(task.run, mnist, tmp_path / "out")
    before = states(tmp_path / "out")
    with directory.locked():
        status, out, _ = reproduce("table-3", *ONE_ROW, *TINY, "--out", "out", "--data-root", mnist)
    assert status == 0
    assert "in progress" in out
    assert f"{RUN}: 1 of 2 epochs (out/{RUN}: in use by another run)" in out
    assert states(tmp_path / "out") == before


def test_a_directory_with_another_run_is_refused(reproduce, finished):
    file = RunDirectory(finished / RUN).config_file
    file.write_text(file.read_text().replace("seed = 0", "seed = 7"))
    outcome = reproduce("table-3", *ONE_ROW, *TINY, "--out", finished)
    assert_refused(outcome, RUN, "holds another run (seed: 7, not 0)", "--out")


def test_another_run_in_the_place_of_a_row_not_asked_for_is_left_out(reproduce, finished):
    def table(text):
        return [line for line in text.splitlines() if line.startswith("|")]

    report = finished / "table-3.md"
    assert reproduce("table-3", *ONE_ROW, *TINY, "--out", finished)[0] == 0
    before = report.read_text()
    other = "mnist-table-f-a-advibp-0.4-paper-x0.01-seed0"
    shutil.copytree(finished / RUN, finished / other)
    assert reproduce("table-3", *ONE_ROW, *TINY, "--out", finished)[0] == 0
    assert table(report.read_text()) == table(before)
    assert f"{other}: holds another run (method: crown-ibp, not advibp" in report.read_text()


def test_stages_are_those_of_the_rows_that_are_asked_for(reproduce):
    deep = ("figure-a", "--models", "dm-large", "--epsilons", "0.4", "--stages")
    assert_refused(reproduce(*deep, "6", *TINY), "mnist needs --data-root")
    assert_refused(
        reproduce(*deep, "7", *TINY), "--stages: expected at most 6 for dm-large, found 7"
    )


def test_a_fork_in_the_place_of_a_run_is_refused(reproduce, finished):
    RunDirectory(finished / RUN).write_origin([{"run": "other", "epochs": 1, "config": ""}])
    outcome = reproduce("table-3", *ONE_ROW, *TINY, "--out", finished)
    assert_refused(outcome, RUN, "holds another run (a fork)", "--out")


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(reproduce, finished, mnist):
    run = RunDirectory(finished / RUN)
    run.results_file.unlink()
    run.last_file.unlink()
    run.checkpoint_file.write_bytes(b"damaged")
    rows = ("--models", "table-f-a", "--epsilons", "0.2")
    outcome = reproduce("table-3", *rows, *TINY, "--out", finished, "--data-root", mnist)
    assert_refused(outcome, "1 of 2 runs failed", RUN, "not a checkpoint")
    assert "mnist-table-f-a-advibp-0.4-paper-x0.01-seed0" in outcome[1]
    other = RunDirectory(finished / "mnist-table-f-a-advibp-0.4-paper-x0.01-seed0")
    assert other.results()


def test_a_reader_that_has_left_ends_all_runs(mnist, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    rows = ("--models", "table-f-a", "--epsilons", "0.2")
    command = [sys.executable, "-m", "robust_app", "reproduce", "table-3", *rows, *TINY]
    command += ["--out", str(tmp_path / "out"), "--data-root", str(mnist)]
    done = subprocess.run(command, env=ONE_THREAD, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"standard output was closed" in done.stderr
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_damage_that_all_processes_find_is_said_once(finished, mnist):
    run = RunDirectory(finished / RUN)
    run.results_file.unlink()
    run.last_file.write_bytes(b"damaged")
    command = [*TORCHRUN, "-m", "robust_app", "reproduce", "table-3", *ONE_ROW, *TINY]
    command += ["--out", str(finished), "--data-root", str(mnist)]
    done = subprocess.run(command, env=ONE_THREAD, text=True, capture_output=True)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("robust-app: "))
    assert "not a checkpoint" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("table-9",), ("'table-9'", "table-2, table-3, table-4")),
        (("table-4", "--models", "cnn7"), ("'cnn7'", "dm-small, dm-medium, dm-large")),
        (("table-2", "--epsilons", "0.3"), ("'0.3'", "2/255, 8/255, 16/255")),
        (("table-4", "--methods", "advibp,pgd"), ("'pgd'", "advcrown-ibp")),
        (("table-4", "--epochs-scale", "0"), ("--epochs-scale",)),
        (("table-4", "--seeds", "0,-1"), ("--seeds", "found '0,-1'")),
        (("table-4", "--seeds", "1" * 5000), ("--seeds", "of 64 bits", "…")),
        (("table-4", "--schedule", "quick"), ("'quick'", "'paper', 'authors', 'short'")),
        (("table-4", "--methods", "crown-ibp", "--schedule", "authors"), ("authors", "crown-ibp")),
        (("table-4", "--models", "dm-small", "--stages", "4"), ("--stages", "at most 3")),
        (("table-4", *TINY), ("mnist needs --data-root",)),
        (("table-4", *TINY, "--data-root", "nowhere"), ("not found in nowhere",)),
    ],
)
def test_what_the_user_can_mend_is_said_in_a_line(reproduce, tmp_path, arguments, words):
    assert_refused(reproduce(*arguments), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_layer_wise_stages_are_trained_and_drawn(reproduce, mnist):
    rows = ("--models", "dm-small", "--epsilons", "0.3", "--stages", "1")
    scale = ("--epochs-scale", "0.004")
    status, out, _ = reproduce("figure-a", *rows, *scale, "--out", "out", "--data-root", mnist)
    assert status == 0
    assert "after stage 1" in out
    run = RunDirectory(Path("out/mnist-dm-small-advibp-0.4-paper-x0.004-stages1-seed0"))
    assert len(run.metrics()) == 2
    assert {r["network"] for r in run.results()} == {"stage-0 (epoch 1)", "stage-1 (epoch 2)"}
    assert Path("out/figure-a.png").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(mnist, tmp_path):
    command = [sys.executable, "-m", "robust_app", "reproduce", "table-3", *ONE_ROW]
    command += ["--epochs-scale", "0.5", "--data-root", str(mnist)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        run = tmp_path / "runs/reproduce/mnist-table-f-a-crown-ibp-0.4-paper-x0.5-seed0"
        while not (run / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command continues" in out
    assert RunDirectory(run).metrics()
    assert (tmp_path / "runs/reproduce/table-3.md").exists()
