"""Panels in rows, and files that are whole or not there."""

import pytest

from robust_app import pictures
from robust_app.errors import UserError


@pytest.mark.parametrize(
    ("count", "across", "rows", "columns"),
    [(1, 3, 1, 1), (3, 3, 1, 3), (4, 3, 2, 3), (13, 3, 5, 3), (2, 4, 1, 2)],
)
def test_panels_fill_rows(count, across, rows, columns):
    figure, panels = pictures.panels(count, across, (4, 2))
    assert len(panels) == count
    assert tuple(figure.get_size_inches()) == (4 * columns, 2 * rows)
    places = [axes.get_subplotspec() for axes in panels]
    expected = [divmod(place, columns) for place in range(count)]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == expected


def test_a_suffix_says_the_format(tmp_path):
    figure, _ = pictures.panels(1, 1, (1, 1))
    pictures.save(figure, [tmp_path / f"page.{kind}" for kind in pictures.FORMATS])
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_not_there_is_named(tmp_path):
    figure, _ = pictures.panels(1, 1, (1, 1))
    with pytest.raises(UserError, match=r"nowhere/page\.png: cannot be written"):
        pictures.save(figure, [tmp_path / "nowhere" / "page.png"])
