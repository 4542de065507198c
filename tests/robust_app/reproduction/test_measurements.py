import dataclasses
import json

import pytest

from robust_app.examination import find_result
from robust_app.reproduction import paper, plan
from robust_app.reproduction.measurements import epoch_of, read
from robust_app.reproduction.plan import Settings
from robust_app.run_directory import RunDirectory


def task_of(name="table-4", scale=0.012, **asked):
    """The first task of a table's rows: three epochs at this scale."""
    return plan.tasks(paper.select(paper.find(name), **asked), Settings(epochs_scale=scale))[0]


def epochs(verified):
    """Metrics of as many epochs, with these held-out errors."""
    return [
        {"epoch": number + 1, "verified_error": error, "standard_error": 1.0, "seconds": 2.5}
        for number, error in enumerate(verified)
    ]


def result(task, epoch, *, verified=20, ibp=30):
    """An entry of results.json, of 200 images."""
    return {
        "network": f"best (epoch {epoch})",
        **dataclasses.asdict(task.examination),
        "examples": 200,
        "standard_error": 1.0,
        "verified_error": float(verified),
        "pgd_error": 2.0,
        "shares": {"ibp": {"certified": 200 - 2 * ibp}},
    }


def begun(tmp_path, task, metrics, results):
    directory = RunDirectory(tmp_path / task.run.name)
    directory.path.mkdir()
    directory.start(task.run.config)
    directory.add_environment({"device": "cpu", "data_root": None})
    directory.write_metrics(metrics)
    directory.add_results(results)


@pytest.fixture
def task():
    return task_of(models=["dm-small"], methods=["advibp"], epsilons=["0.3"])


def test_nothing_is_measured_where_nothing_was_run(tmp_path, task):
    found = read(tmp_path, task)
    assert (found.begun, found.complete, found.errors) == (False, False, {})
    assert (found.epochs_done, found.epochs, found.device) == (0, 3, "")
    assert not list(tmp_path.iterdir())


def test_a_run_under_way_shows_how_far_it_is(tmp_path, task):
    begun(tmp_path, task, epochs([50, 40]), [result(task, 2)])
    found = read(tmp_path, task)
    assert (found.begun, found.complete, found.errors) == (True, False, {})
    assert (found.epochs_done, found.seconds, found.device) == (2, 5.0, "cpu")


def test_best_and_last_are_looked_up_by_their_epochs(tmp_path, task):
    results = [result(task, 2), result(task, 3, verified=25, ibp=35)]
    results.append(result(task, 12, verified=99))
    begun(tmp_path, task, epochs([50, 30, 40]), results)
    found = read(tmp_path, task)
    assert found.complete
    assert found.errors["best"] == {
        "epoch": 2, "standard": 1.0, "verified": 20.0, "pgd": 2.0, "ibp": 30.0
    }  # fmt: skip
    assert found.errors["last"]["epoch"] == 3
    assert (found.errors["last"]["verified"], found.errors["last"]["ibp"]) == (25.0, 35.0)


def test_a_run_with_one_network_evaluated_is_not_complete(tmp_path, task):
    begun(tmp_path, task, epochs([50, 30, 40]), [result(task, 2)])
    found = read(tmp_path, task)
    assert set(found.errors) == {"best"}
    assert not found.complete


def test_training_time_alone_needs_no_evaluation(tmp_path):
    task = task_of("table-d", models=["dm-small"], epsilons=["0.3"])
    begun(tmp_path, task, epochs([50, 30, 40]), [])
    assert read(tmp_path, task).complete


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.2},
        {"pgd_steps": 100},
        {"pgd_restarts": 2},
        {"verifiers": ["ibp", "crown"]},
        {"images": 100},
    ],
)
def test_another_evaluation_of_the_same_network_does_not_count(task, change):
    results = json.loads(json.dumps([result(task, 2)]))
    assert find_result(results, task.examination, 2) == results[0]
    assert find_result([results[0] | change], task.examination, 2) is None
    assert find_result(results, task.examination, 1) is None
    assert find_result(results, task.examination, 12) is None
    other = results[0] | {"network": f"best (epoch {5000 * '2'})"}  # more digits than int() takes
    assert find_result([other], task.examination, 2) is None


def test_of_two_evaluations_the_newest_counts(task):
    old, new = json.loads(json.dumps([result(task, 2), result(task, 2, verified=1)]))
    assert find_result([old, new], task.examination, 2) == new


def test_stages_end_at_their_epochs():
    task = task_of("figure-a", models=["dm-small"], epsilons=["0.3"])
    config = dataclasses.replace(task.run.config, epochs=3, stages=3, stage_epochs=2)
    metrics = epochs([1] * 9)
    assert [epoch_of(name, config, metrics) for name in task.networks] == [3, 5, 7, 9]
    assert epoch_of("stage-0", config, metrics[:8]) is None
