"""The paper's figures as they were typed in, against each other, its text and the recipes."""

import pytest

from robust_app import recipes
from robust_app.errors import UserError
from robust_app.reproduction import paper
from robust_app.verifiers import VERIFIERS


def figures(table, **which):
    """What a table's rows say, by ε and model, of one method."""
    return {
        (row.epsilon, row.model): row.figures
        for row in paper.find(table).rows
        if all(getattr(row, kind) == value for kind, value in which.items())
    }


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table-2", 3 * 2 * 3),  # ε, methods, models
        ("table-3", 2 * 2 * 10 + 2 * 7),
        ("table-4", 4 * 3 * 3),
        ("table-b", 4 * 2 * 3),
        ("table-c", 3 * 2 * 3),
        ("table-d", 4 * 3 + 3 * 3),
        ("figure-2", 4 * 2 * 3),
        ("figure-a", 4 * 3 + 3 * 3),
    ],
)
def test_every_row_of_a_table_is_there_once(name, rows):
    table = paper.find(name)
    assert len(table.rows) == len(set(table.rows)) == rows


def test_there_are_no_other_tables():
    assert len(paper.names()) == 8


@pytest.mark.parametrize(
    ("table", "epsilon", "method", "model", "expected"),
    [
        ("table-2", "2-255", "advibp", "dm-large", (40.61, 51.66, 46.97)),
        ("table-2", "16-255", "crown-ibp", "dm-medium", (67.94, 78.46, 77.21)),
        ("table-4", "0.1", "advcrown-ibp", "dm-small", (1.52, 3.19, 2.39)),
        ("table-4", "0.2", "crown-ibp", "dm-large", (1.62, 3.87, 3.81)),
        ("table-4", "0.3", "advibp", "dm-medium", (2.33, 8.73, 4.35)),
        ("table-4", "0.4", "advcrown-ibp", "dm-large", (1.90, 12.30, 3.46)),
        ("table-b", "0.1", "crown-ibp", "cnn-small", (1.44, 2.85)),
        ("table-b", "0.4", "advibp", "cnn-large", (2.04, 11.98)),
        ("table-c", "0.1", "crown-ibp", "dm-large", (2.10, 2.24, 1.81)),
        ("table-c", "0.3", "advibp", "dm-small", (9.30, 10.80, 6.83)),
    ],
)
def test_a_row_has_the_figures_of_the_paper(table, epsilon, method, model, expected):
    found = figures(table, epsilon=epsilon, method=method)[epsilon, model]
    assert tuple(found[quantity] for quantity in paper.find(table).quantities) == expected


def test_every_row_of_a_table_of_errors_has_its_figures():
    for name in ("table-2", "table-4", "table-b"):
        table = paper.find(name)
        assert all(set(row.figures) == set(table.quantities) for row in table.rows)
    verified = {key for key, found in figures("table-c").items() if "verified" in found}
    assert len(verified) == 9
    assert all({"ibp", "pgd"} <= set(row.figures) for row in paper.find("table-c").rows)


@pytest.mark.parametrize("table", ["table-2", "table-4"])
def test_no_error_exceeds_its_bound(table):
    for row in paper.find(table).rows:
        found = row.figures
        assert found["standard"] <= found["pgd"] <= found["verified"]


def test_table_c_repeats_table_4():
    first, second = figures("table-4", method="advibp"), figures("table-c", method="advibp")
    assert len(second) == 9
    for key, found in second.items():
        assert (found["ibp"], found["pgd"]) == (first[key]["verified"], first[key]["pgd"])


def test_advibp_is_better_where_the_text_says_so():
    theirs, ours = (figures("table-b", method=method) for method in ("crown-ibp", "advibp"))
    assert all(ours[key][q] < theirs[key][q] for key in ours for q in ("standard", "verified"))
    theirs, ours = (figures("table-2", method=method) for method in ("crown-ibp", "advibp"))
    large = [key for key in ours if key[0] != "2-255"]
    assert all(ours[key]["verified"] < theirs[key]["verified"] for key in large)


def test_the_statistics_of_table_3_are_in_order():
    table = paper.find("table-3")
    statistics = table.extras["statistics"]
    assert len(statistics) == 6
    for entry in statistics:
        for quantity in table.quantities:
            assert len(entry[quantity]) == 3
            assert entry[quantity] == sorted(entry[quantity])
    assert [entry["verified"][1] for entry in statistics] == [6.33, 6.13, 9.12, 8.86, 71.32, 69.36]
    assert [entry["count"] for entry in table.extras["lower"]] == [9, 8, 7]


def test_the_training_times_of_a4_are_those_of_table_d():
    mnist = {entry["model"]: entry["seconds"] for entry in paper.find("table-d").extras["seconds"]}
    assert mnist == {"dm-small": 63570, "dm-medium": 292863, "dm-large": 527667}  # CIFAR-10, last
    joint = [e for e in paper.find("figure-2").extras["seconds"] if e["method"] == "advibp"]
    assert joint == paper.find("table-d").extras["seconds"][:3]
    assert [entry["seconds"] for entry in joint] == [6683, 43024, 128747]


def test_the_pictures_have_no_figures():
    for name in ("figure-2", "figure-a"):
        assert not any(row.figures for row in paper.find(name).rows)
    assert paper.find("figure-2").extras["reduction"] == [9.1, 31.9]


@pytest.mark.parametrize("name", paper.names())
def test_every_row_can_be_trained_and_verified(name):
    known, table = set(recipes.names()), paper.find(name)
    for row in table.rows:
        assert f"{row.dataset}-{row.model}-{row.epsilon}-{row.method}-paper" in known
        assert set(row.verifiers) <= set(VERIFIERS)
        assert row.verifiers[0] == "ibp"
    assert all("  " not in note and note.strip() == note for note in table.notes)


def test_crown_stands_in_for_crown_at_2_255_alone():
    beyond = [row for row in paper.find("table-2").rows if row.verifiers != ("ibp",)]
    assert {(row.epsilon, row.method) for row in beyond} == {("2-255", "crown-ibp")}
    assert len(beyond) == 3
    assert {row.images for row in paper.find("table-c").rows} == {1000}
    assert {row.images for row in paper.find("table-4").rows} == {None}


@pytest.mark.parametrize("radius", ["8/255", "8-255"])
def test_rows_are_selected(radius):
    table = paper.find("table-2")
    kept = paper.select(table, ["dm-large", "dm-small"], [radius], ["advibp"]).rows
    assert [(row.epsilon, row.method, row.model) for row in kept] == [
        ("8-255", "advibp", "dm-small"),
        ("8-255", "advibp", "dm-large"),
    ]
    assert paper.select(table) == table


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"models": ["cnn7"]}, ("model 'cnn7'", "dm-small, dm-medium, dm-large")),
        ({"epsilons": ["0.3"]}, ("epsilon '0.3'", "2/255, 8/255, 16/255")),
        ({"methods": ["advibp", "pgd"]}, ("method 'pgd'", "crown-ibp, advibp")),
    ],
)
def test_a_row_that_does_not_exist_is_refused_with_those_that_do(asked, words):
    with pytest.raises(UserError) as error:
        paper.select(paper.find("table-2"), **asked)
    assert all(word in str(error.value) for word in words)


def test_a_combination_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"table-f-j at ε = 0.3; .*table-f-g at ε = 8/255$"):
        paper.select(paper.find("table-3"), models=["table-f-h"], epsilons=["8/255"])


def test_a_table_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"'table-1'; there are table-2, .*figure-a"):
        paper.find("table-1")
