"""What is saved is what was measured, and a section measured anew replaces itself alone."""

import json

import pytest

from tests.benchmarks.report import Report, Row, duration, markdown, table
from tests.benchmarks.timing import Summary

ORDER = ("first", "aggregation")
ROW = Row(
    "aggregation",
    "P = 10,000, K = 2",
    "a ÷ b",
    Summary(1.25, 1.0, 1.5),
    "≤ 2",
    seconds={"a": 0.00125, "b": 0.001},
    gradients={"a": 3.0},
)


def report(**rows: Row) -> Report:
    made = Report()
    for name, row in rows.items():
        made.begin(name, ORDER)
        made.add({"processor": "P", "seed": 0}, row)
    return made


def test_a_report_survives_its_file(tmp_path):
    made = report(aggregation=ROW)
    made.save(tmp_path)
    assert Report.load(tmp_path) == made
    assert Report.load(tmp_path / "elsewhere") == Report()


def test_a_section_measured_anew_replaces_its_own_rows(tmp_path):
    first = Row("first", "c", "d", Summary(2.0, 2.0, 2.0))
    report(aggregation=ROW, first=first).save(tmp_path)
    again = Report.load(tmp_path)
    assert again.rows() == [first, ROW]  # in the order of the sections, not of the runs
    again.begin("aggregation", ORDER)
    assert again.rows() == [first]


def test_the_page_shows_every_row_and_its_circumstances():
    page = markdown(report(aggregation=ROW))
    assert (
        "| aggregation | P = 10,000, K = 2 | a ÷ b | 1.250 | 1.000 to 1.500 | ≤ 2 "
        "| a 1.25 ms, b 1 ms |" in page
    )
    assert "| aggregation | P = 10,000, K = 2 | 3.00 |" in page
    assert "Measured on (aggregation): processor P; seed 0." in page
    assert table([ROW, ROW]).row_count == 2


def test_a_share_is_in_percent_and_a_single_value_has_no_quartiles():
    row = Row("first", "c", "d", Summary(0.0125, 0.0125, 0.0125), percent=True)
    assert row.cells()[3:5] == ("1.25 %", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.0, "12 s"), (0.5, "500 ms"), (1e-3, "1 ms"), (2.5e-6, "2.5 µs")]
)
def test_durations_have_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


def test_the_file_is_plain_json(tmp_path):
    report(aggregation=ROW).save(tmp_path)
    content = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert content["aggregation"]["rows"][0]["value"] == [1.25, 1.0, 1.5]
