import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_app import recipes
from robust_app.errors import UserError
from robust_app.reproduction import paper
from robust_app.reproduction.plan import (
    Settings,
    by_run,
    check_stages,
    parse_seeds,
    shared_radius,
    tasks,
)

TABLES = st.sampled_from(paper.names()).map(paper.find)
SETTINGS = st.builds(
    Settings,
    schedule=st.sampled_from(["paper", "authors", "short"]),
    epochs_scale=st.sampled_from([0.001, 0.05, 1.0, 1.5]),
    seeds=st.sampled_from([(), (0,), (3, 1)]),
    stages=st.sampled_from([None, 1, 2]),
)


def runs(name, settings=None, **asked):
    """The names of the runs behind some rows of a table."""
    table = paper.select(paper.find(name), **asked)
    return [run.name for run in by_run(tasks(table, settings or Settings()))]


def test_mnist_trains_one_network_for_the_three_larger_radii():
    assert runs("table-4", models=["dm-small"], methods=["advibp"]) == [
        "mnist-dm-small-advibp-0.1-paper-seed0",
        "mnist-dm-small-advibp-0.4-paper-seed0",
    ]


def test_cifar10_trains_one_network_for_each_radius():
    assert runs("table-2", models=["dm-small"], methods=["advibp"]) == [
        f"cifar10-dm-small-advibp-{radius}-255-paper-seed0" for radius in (2, 8, 16)
    ]


def test_what_differs_is_in_the_name():
    asked = {"models": ["dm-small"], "methods": ["advibp"], "epsilons": ["0.2"]}
    settings = Settings("short", 0.05, (2, 0), 3)
    assert runs("table-4", settings, **asked) == [
        "mnist-dm-small-advibp-0.4-short-x0.05-stages3-seed2",
        "mnist-dm-small-advibp-0.4-short-x0.05-stages3-seed0",
    ]


@given(TABLES, SETTINGS)
def test_a_name_stands_for_one_configuration(table, settings):
    found = by_run(tasks(table, settings))
    names = [run.name for run in found]
    assert len(set(names)) == len(names)
    for run, of_run in found.items():
        assert run.name.endswith(f"seed{run.config.seed}")
        base = recipes.load(run.recipe)
        assert run.config.epochs == max(1, round(base.epochs * settings.epochs_scale))
        assert run.config.epsilon == base.epsilon
        for task in of_run:
            assert (task.row.model, task.row.method) == (base.model, base.method)
            assert task.examination.epsilon <= run.config.evaluation_epsilon


@given(TABLES, SETTINGS, st.data())
def test_a_row_has_the_same_tasks_whatever_else_is_asked_for(table, settings, draw):
    row = draw.draw(st.sampled_from(table.rows))
    alone = dataclasses.replace(table, rows=(row,))
    assert tasks(alone, settings) == [t for t in tasks(table, settings) if t.row == row]


def test_rows_of_different_tables_share_runs():
    assert set(runs("table-c")) <= set(runs("table-4"))
    assert set(runs("table-d")) <= {*runs("table-4"), *runs("table-2")}


def test_a_row_is_examined_as_its_recipe_and_the_table_say():
    [task] = tasks(
        paper.select(paper.find("table-c"), ["dm-small"], ["0.2"], ["advibp"]), Settings()
    )
    how = task.examination
    assert (how.epsilon, how.pgd_steps, how.pgd_restarts, how.images) == (0.2, 200, 1, 1000)
    assert how.verifiers == ("ibp", "crown-ibp", "alpha-crown-ibp", "crown", "alpha-crown")
    assert task.run.config.evaluation_epsilon == task.run.config.epsilon == 0.4
    assert task.networks == ("best", "last")


@pytest.mark.parametrize(("model", "stages"), [("dm-small", 3), ("dm-large", 6)])
def test_figure_a_has_a_stage_for_every_layer_but_the_last(model, stages):
    for task in tasks(paper.select(paper.find("figure-a"), [model], ["0.3"]), Settings()):
        assert task.run.config.stages == stages
        assert task.networks == tuple(f"stage-{stage}" for stage in range(stages + 1))


def test_only_rows_that_are_asked_for_need_as_many_layers():
    whole, settings = paper.find("figure-a"), Settings(stages=6)
    deep = paper.select(whole, models=["dm-large"])
    assert set(tasks(deep, settings)) < set(tasks(whole, settings))  # the others' are shown empty
    check_stages(deep, settings)
    with pytest.raises(UserError, match="--stages: expected at most 3 for dm-small, found 6"):
        check_stages(whole, settings)


@pytest.mark.parametrize("table", ["figure-a", "table-4"])
def test_stages_may_be_none(table):
    rows = paper.select(paper.find(table), ["dm-small"], ["0.3"], ["advibp"])
    assert {task.run.config.stages for task in tasks(rows, Settings(stages=0))} == {0}


def test_stages_may_be_fewer():
    table = paper.select(paper.find("figure-a"), ["dm-small"], ["0.3"])
    [task] = tasks(table, Settings(stages=1))
    assert task.networks == ("stage-0", "stage-1")
    assert task.run.name == "mnist-dm-small-advibp-0.4-paper-stages1-seed0"


def test_a_schedule_without_a_recipe_for_a_row_leaves_it_out():
    found = {task.row.method for task in tasks(paper.find("table-4"), Settings("authors"))}
    assert found == {"advibp"}


def test_attacks_are_trained_at_the_radius_they_are_for():
    rows = [paper.Row("mnist", radius, "fgsm", "dm-small") for radius in ("0.2", "0.3")]
    assert [shared_radius(row, "paper") for row in rows] == ["0.2", "0.3"]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(UserError, match=r"--epochs-scale: .* found"):
        Settings(epochs_scale=scale)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="'quick'; known are 'paper', 'authors', 'short'"):
        Settings("quick")


@pytest.mark.parametrize("texts", [["-1"], ["x"], ["1.5"], ["1", "1"], ["1", "01"]])
def test_wrong_seeds_are_refused(texts):
    with pytest.raises(UserError, match=f"--seeds: .*found '{','.join(texts)}'"):
        parse_seeds(texts)
