"""The picture of runs: what it shows of which run, and that it can be read."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.cbook import is_math_text

from robust_app import curves
from robust_app.curves import COLORS, DASHES
from robust_app.metrics import SHOWN

NAMES = {metric.key: metric.name for metric in SHOWN}


def run(epochs=4, **metrics):
    """Metrics of a run, each a function of the epoch or a list with None where it lacks."""
    lines = [{"epoch": epoch} for epoch in range(1, epochs + 1)]
    for key, of in metrics.items():
        for line in lines:
            value = of(line["epoch"]) if callable(of) else of[line["epoch"] - 1]
            line |= {} if value is None else {key: value}
    return lines


def panels(runs):
    return {axes.get_title(): axes for axes in curves.figure(runs).axes}


def lines_of(axes):
    """The lines of the runs, without the dots of single epochs."""
    return [line for line in axes.lines if line.get_linestyle() != "None"]


def dots_of(axes):
    return [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"]


def test_there_is_a_panel_for_each_metric_that_a_run_has_and_no_other():
    old = run(epsilon=lambda epoch: 0.1 * epoch, conflicts=lambda epoch: 0.5)
    new = run(epsilon=lambda epoch: 0.2, cosine=lambda epoch: 0.1)
    found = panels({"old": old, "new": new})
    assert list(found) == [NAMES[key] for key in ("epsilon", "cosine", "conflicts")]
    shown, missing = lines_of(found[NAMES["conflicts"]])
    assert list(shown.get_ydata()) == [0.5] * 4
    assert np.isnan(missing.get_ydata()).all()


def test_lines_are_the_metrics_over_the_epochs_with_gaps():
    found = panels({"run": run(adversarial_loss=[None, 2.0, 1.0, None])})
    [line] = lines_of(found["adversarial loss"])
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    np.testing.assert_array_equal(line.get_ydata(), [math.nan, 2.0, 1.0, math.nan])


def test_a_value_between_gaps_is_a_dot_for_it_would_be_no_line():
    found = panels({"run": run(6, natural_loss=[0.5, None, 0.4, 0.3, None, 0.2])})
    assert dots_of(found["natural loss"]) == [[1, 6]]


def test_a_null_is_a_gap():
    metrics = [{"epoch": 1, "epsilon": 0.1, "verified_error": None}]
    assert list(panels({"run": metrics})) == ["ε"]


def test_runs_of_different_lengths_share_the_epochs():
    found = panels({"short": run(1, epsilon=lambda _: 0.1), "long": run(2, epsilon=lambda _: 0.2)})
    axes = found["ε"]
    assert axes.get_xlim()[1] > 2
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_the_legend_names_the_runs_in_their_order():
    page = curves.figure({name: run(epsilon=lambda _: 0.1) for name in ("b", "a")})
    [legend] = page.legends
    assert [text.get_text() for text in legend.get_texts()] == ["b", "a"]
    colors = [line.get_color() for line in legend.get_lines()]
    assert colors == [line.get_color() for line in lines_of(page.axes[0])]


def test_the_legend_says_where_a_fork_begins():
    parent = run(epsilon=lambda _: 0.1)
    fork = [{**line, "taken_over": True} for line in parent] + run(len(parent) + 1)[-1:]
    [legend] = curves.figure({"parent": parent, "fork": fork, "begun": fork[:-1]}).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["parent", f"fork (from epoch {len(parent) + 1})", "begun"]


@pytest.mark.parametrize("name", ["$SEED_$LR", "a$x^$", "a$b$c", "a_b"])
def test_names_are_no_formulas(name):
    page = curves.figure({name: run(epsilon=lambda _: 0.1)})
    [legend] = page.legends
    [text] = legend.get_texts()
    page.canvas.draw()
    assert text.get_text().replace("\\$", "$") == name
    assert not is_math_text(text.get_text())


def test_no_two_runs_look_alike():
    count = len(COLORS) * len(DASHES)
    found = panels({str(place): run(epsilon=lambda _: 0.1) for place in range(count)})
    looks = {(line.get_color(), line.get_linestyle()) for line in lines_of(found["ε"])}
    assert len(looks) == count


@pytest.mark.parametrize(
    ("runs", "scale"),
    [
        ([[100.0, 50.0, 30.0, 20.0]], "log"),
        ([[100.0, 50.0, 30.0, 25.0]], "linear"),
        ([[2.0] * 4, [90.0] * 4], "log"),
        ([[0.0] * 4], "linear"),
        ([[3.0] * 4], "linear"),
        ([[1.0, 0.5, 0.1, 0.0]], "linear"),
        ([[1.0, 0.5, 0.1, 0.0], [1e-4, 1e-4, 5e-5, 0.0]], "symlog"),
        ([[1.0, 0.5, 0.1, 0.0], [0.0] * 4], "linear"),
    ],
)
def test_large_factors_are_shown_on_a_logarithmic_scale(runs, scale):
    found = panels({str(number): run(fosc_threshold=values) for number, values in enumerate(runs)})
    axes = found[NAMES["fosc_threshold"]]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low <= value <= high for values in runs for value in values)


def test_what_is_no_ratio_has_a_linear_scale():
    assert panels({"run": run(cosine=lambda e: 0.1**e)})[NAMES["cosine"]].get_yscale() == "linear"


def overlapping(boxes):
    return [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(
    ("runs", "length", "epochs", "exponent"),
    [(1, 8, 1, 0), (19, 7, 400, -6), (3, 50, 35, -1)],
)
def test_nothing_overlaps_or_leaves_the_page(runs, length, epochs, exponent):
    falling = {metric.key: lambda epoch: 10.0 ** (exponent * epoch / epochs) for metric in SHOWN}
    names = [f"{number:0{length}}" for number in range(runs)]
    page = curves.figure(dict.fromkeys(names, run(epochs, **falling)))
    page.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in page.axes]
    boxes.append(page.legends[0].get_window_extent())
    for box in boxes:
        assert page.bbox.x0 <= box.x0 <= box.x1 <= page.bbox.x1
        assert page.bbox.y0 <= box.y0 <= box.y1 <= page.bbox.y1
    assert overlapping(boxes) == []
    for axes in page.axes:
        assert axes.bbox.height > 0.4 * axes.get_tightbbox().height  # the legend leaves room
        for axis in (axes.xaxis, axes.yaxis):
            labels = axis.get_ticklabels()
            assert overlapping([label.get_window_extent() for label in labels]) == []
