"""The text of the tables, the files and the pictures, from errors set by hand."""

import json
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app import environment
from robust_app.errors import UserError
from robust_app.reproduction import comparison, paper, report, sheets
from robust_app.reproduction.measurements import Measurement
from robust_app.reproduction.plan import Settings

ERRORS = st.floats(0, 100)


def measurement(run="run", errors=None, *, done=2, epochs=2, seconds=10.0, complete=True):
    """A run's errors by network; a number is the verified one."""
    filled = {
        network: {"epoch": 2.0, "standard": 1.0, "verified": error, "ibp": 50.0, "pgd": 2.0}
        for network, error in (errors or {}).items()
    }
    return Measurement(run, "recipe", 0, True, done, epochs, seconds, "cpu", filled, complete)


def waiting(run="run"):
    return measurement(run, done=1, complete=False)


def titled(found, words):
    [sheet] = [sheet for sheet in found if words in sheet.title]
    return sheet


def table_of(name, **asked):
    return paper.select(paper.find(name), **asked)


def of_models(table, errors):
    """Measured verified errors of the best epoch by (method, model)."""
    return {
        row: [measurement(f"{row.method}-{row.model}", {"best": errors[row.method, row.model]})]
        for row in table.rows
        if (row.method, row.model) in errors
    }


def test_the_paper_stands_beside_what_is_measured():
    table = table_of("table-4", models=["dm-small"], epsilons=["0.3"], methods=["advibp"])
    measured = {table.rows[0]: [measurement(errors={"best": 12.345, "last": 13.0})]}
    best, last = sheets.sheets(table, measured)
    assert best.columns[4:] == (
        "standard: paper", "measured", "verified: paper", "measured", "PGD: paper", "measured"
    )  # fmt: skip
    own = ("mnist", "0.3", "advibp", "dm-small")
    assert best.lines == [(*own, "4.15", "1.00", "10.80", "12.35", "6.83", "2.00")]
    assert last.lines == [(*own, "4.15", "1.00", "10.80", "13.00", "6.83", "2.00")]
    assert "best epoch" in best.title
    assert "last epoch" in last.title


def test_a_cell_says_how_far_a_row_is():
    assert sheets.cell([], "best", "verified") == "–"
    assert sheets.cell([waiting()], "best", "verified") == "in progress"
    assert sheets.cell([waiting(), measurement(errors={"best": 3.0})], "best", "pgd") == "2.00"


def test_several_seeds_give_median_and_range():
    found = [measurement(errors={"best": error}) for error in (9.0, 8.0, 10.5)]
    assert sheets.cell(found, "best", "verified") == "9.00 (8.00–10.50)"
    assert comparison.median_error(found, "best", "verified") == 9.0
    assert comparison.median_error(found, "last", "verified") is None


@given(st.lists(st.tuples(ERRORS, ERRORS), min_size=1, max_size=10))
def test_statistics_are_over_the_models_that_are_measured(errors):
    table = table_of("table-3", epsilons=["0.3"])
    models = [f"table-f-{letter}" for letter in "abcdefghij"]
    by_model = dict(zip(models, errors, strict=False))
    measured = of_models(
        table,
        {("advibp", model): ours for model, (ours, _) in by_model.items()}
        | {("crown-ibp", model): theirs for model, (_, theirs) in by_model.items()},
    )
    found = sheets.sheets(table, measured)
    lines = titled(found, "errors over the models, %, best").lines
    [line] = [line for line in lines if line[2:4] == ("advibp", "verified")]
    ours = [error for error, _ in errors]
    expected = (min(ours), statistics.median(ours), max(ours))
    assert line[4::2] == ("7.21", "8.86", "11.32", f"{len(errors)} of 10")
    assert line[5::2] == tuple(f"{error:.2f}" for error in expected)
    lower = sum(one < other for one, other in errors)
    wins = titled(found, "AdvIBP models with a lower verified error, best").lines
    assert wins == [("mnist", "0.3", "8/10", f"{lower}/{len(errors)}")]


def test_a_model_without_its_counterpart_is_not_compared():
    table = table_of("table-3", epsilons=["0.2"])
    errors = {("advibp", "table-f-a"): 1.0, ("crown-ibp", "table-f-b"): 2.0}
    [line] = sheets.lower_sheet(table, of_models(table, errors), "best").lines
    assert line == ("mnist", "0.2", "9/10", "–")


def test_figure_2_shows_the_reduction():
    table = table_of("figure-2", epsilons=["0.3"])
    errors = {
        ("advibp", "dm-small"): 9.0,
        ("weighted-sum", "dm-small"): 10.0,
        ("advibp", "dm-large"): 6.0,
        ("weighted-sum", "dm-large"): 8.0,
        ("advibp", "dm-medium"): 7.0,  # nothing to compare with
    }
    sheet = sheets.reduction_sheet(table, of_models(table, errors), "best")
    assert sheet.lines == [
        ("0.3", "dm-small", "10.00", "9.00", "10.0%"),
        ("0.3", "dm-large", "8.00", "6.00", "25.0%"),
    ]
    assert "paper 9.1% to 31.9%, measured 10.0% to 25.0%" in sheet.title


@given(st.floats(0, 100), st.floats(1e-3, 100))
def test_a_reduction_takes_one_error_to_the_other(ours, theirs):
    assert theirs * (1 - comparison.reduction(ours, theirs) / 100) == pytest.approx(ours, abs=1e-9)


def test_training_time_is_averaged_over_runs_that_are_complete():
    table = table_of("table-d", models=["dm-small"], epsilons=["0.1", "0.2", "0.3"])
    first, shared = measurement("0.1", seconds=10.0), measurement("0.4", seconds=20.0)
    measured = dict(zip(table.rows, ([first, waiting("seed1")], [shared], [shared]), strict=True))
    assert sheets.seconds_sheet(table, measured).lines == [
        ("mnist", "advibp", "dm-small", "6683", "15", "2", "2", "cpu")
    ]
    assert sheets.seconds_sheet(table, {}).lines[0][3:6] == ("6683", "–", "0")


def test_figure_a_has_a_column_for_each_stage():
    table = table_of("figure-a", epsilons=["0.3"], models=["dm-small", "dm-large"])
    small, large = table.rows
    errors = {f"stage-{stage}": 10.0 - stage for stage in range(3)}
    sheet = sheets.stages_sheet(table, {small: [measurement(errors=errors)], large: [waiting()]})
    assert sheet.columns[4:] == ("after stage 0", "after stage 1", "after stage 2")
    assert [line[4:] for line in sheet.lines] == [("10.00", "9.00", "8.00"), ("in progress",) * 3]


def test_table_c_has_the_tighter_verifier_and_ibp():
    table = table_of("table-c", models=["dm-small"], epsilons=["0.1"])
    ours = table.rows[1]
    measured = {ours: [measurement(errors={"best": 2.5})]}
    first, second = sheets.errors_sheet(table, measured, "best").lines
    assert first[4:] == ("–", "–", "3.44", "–", "3.09", "–")
    assert second[4:] == ("2.90", "2.50", "3.69", "50.00", "2.70", "2.00")


def test_literature_is_of_the_radii_shown():
    sheet = sheets.literature_sheet(table_of("table-2", epsilons=["8/255"]))
    assert sheet.lines[0] == ("8/255", "IBP method [8]", "58.43", "70.81")
    assert [line[1] for line in sheet.lines] == ["IBP method [8]", "MIP [29]", "COLT [1]"]
    assert not sheets.literature_sheet(table_of("table-2", epsilons=["16/255"])).lines


def test_unfinished_runs_are_named_once_with_the_reason():
    rows = paper.find("table-4").rows[:4]
    evaluated = measurement("b", complete=False)
    measured = {rows[0]: [waiting("a")], rows[1]: [waiting("a")], rows[2]: [evaluated]}
    measured[rows[3]] = [measurement("c")]
    assert sheets.unfinished(measured, {"a": "in use"}) == [
        "a: 1 of 2 epochs (in use)",
        "b: 2 of 2 epochs, not all evaluated",
    ]


@pytest.mark.parametrize("name", paper.names())
def test_every_sheet_is_rectangular_with_nothing_measured_and_with_something(name):
    table = paper.find(name)
    found = measurement(errors={"best": 3.0, "last": 3.0, "stage-0": 3.0, "stage-1": 2.0})
    for measured in ({}, {row: [found] for row in table.rows}):
        for sheet in sheets.sheets(table, measured):
            assert all(len(line) == len(sheet.columns) for line in sheet.lines)
            report.as_rich(sheet)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_with():
    return environment.describe(torch.device("cpu"), 1, 0, None)


def test_the_files_of_a_figure(tmp_path, made_with):
    table = table_of("figure-2", epsilons=["0.3", "0.4"], models=["dm-small", "dm-medium"])
    errors = {
        (method, model): error
        for method, error in (("advibp", 9.0), ("weighted-sum", 10.0))
        for model in ("dm-small", "dm-medium")
    }
    out = tmp_path / "deep" / "out"
    settings = Settings(epochs_scale=0.5, seeds=(0, 1))
    report.write(table, settings, of_models(table, errors), ["run x waits"], made_with, out)
    assert {file.name for file in out.iterdir()} == {
        "figure-2.md", "figure-2.json", "figure-2.png", "figure-2.svg"
    }  # fmt: skip
    text = (out / "figure-2.md").read_text(encoding="utf-8")
    for words in (
        "command: `robust-app", "mogd", f"torch {torch.__version__.split('+')[0]}", "cpu",
        "schedule `paper`, epochs × 0.5, seeds 0, 1", "- run x waits", "9.1% to 31.9%",
        "| 0.3 | dm-small | 10.00 | 9.00 | 10.0% |", "](figure-2.png)", "| advibp-dm-small |",
    ):  # fmt: skip
        assert words in text
    content = json.loads((out / "figure-2.json").read_text(encoding="utf-8"))
    assert content["settings"]["epochs_scale"] == 0.5
    [row] = [r for r in content["rows"] if (r["epsilon"], r["method"], r["model"]) == (
        "0.4", "advibp", "dm-small"
    )]  # fmt: skip
    assert row["measured"][0]["errors"]["best"]["verified"] == 9.0
    assert (out / "figure-2.png").read_bytes().startswith(b"\x89PNG")
    drawing = (out / "figure-2.svg").read_text(encoding="utf-8")
    assert drawing.count("<svg") == 1


def test_figure_a_is_drawn_from_what_there_is(tmp_path, made_with):
    table = table_of("figure-a", models=["dm-small"])
    errors = {f"stage-{stage}": 10.0 - stage for stage in range(4)}
    measured = {table.rows[0]: [measurement(errors=errors)], table.rows[-1]: [waiting()]}
    report.write(table, Settings(), measured, [], made_with, tmp_path)
    assert (tmp_path / "figure-a.png").exists()


@pytest.mark.parametrize("name", ["figure-2", "figure-a", "table-4"])
def test_without_measurements_there_is_no_picture(tmp_path, made_with, name):
    report.write(paper.find(name), Settings(), {}, [], made_with, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.md", f"{name}.json"}
    assert "![" not in (tmp_path / f"{name}.md").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, made_with):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        report.write(paper.find("table-4"), Settings(), {}, [], made_with, tmp_path / "file")
