"""One Table for terminal, Markdown, page and CSV."""

import csv
import io
import re
from dataclasses import dataclass

from rich.console import Console

from polypseg.tables import Cell, Column, Table, with_bounds


@dataclass(frozen=True)
class Score:
    name: str
    dice: float | None


RECORDS = (Score("a|b", 0.25), Score("[red]c", None), Score("=1+1", 0.5))
TABLE = Table(
    name="scores",
    title="Scores [bold]",
    columns=[
        Column("model", "name", numeric=False),
        Column("Dice", "dice", lambda dice: "" if dice is None else f"{dice:.3f}", optional=True),
        Column("both", "", lambda score: Cell(score.name.upper(), "note", sort=score.dice, href="#x"), group="G"),
    ],
    records=RECORDS,
    anchor=lambda score: f"row-{score.dice}",
    fields=lambda score: {"name": score.name, "dice": score.dice},
)


def printed(table: Table, **options) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(table.rich(**options))
    return file.getvalue()


def test_markdown_escapes_bars_and_leaves_nothing_in_empty_cells():
    assert TABLE.markdown().splitlines() == [
        "| model | Dice | both |",
        "|---|---|---|",
        "| a\\|b | 0.250 | A\\|B |",
        "| [red]c | | [RED]C |",
        "| =1+1 | 0.500 | =1+1 |",
    ]


def test_terminal_shows_brackets_of_names_and_the_sum_last():
    shown = printed(TABLE)
    assert "Scores [bold]" in shown and "[red]c" in shown and "0.250" in shown
    total = Table(columns=TABLE.columns[:2], records=RECORDS, total={"name": "all", "dice": 0.75})
    lines = printed(total).splitlines()
    assert "all" in lines[-2] and "0.750" in lines[-2]
    assert total.rich().rows[-1].style == "bold" and [row.style for row in total.rich().rows[:-1]] == [None] * 3


def test_files_hold_values_as_they_are_not_as_they_are_shown():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert [row["dice"] for row in rows] == ["0.25", "", "0.5"]
    assert rows[2]["name"] == "'=1+1"  # no spreadsheet computes it
    assert TABLE.plain_records()[0] == {"name": "a|b", "dice": 0.25}


def test_page_escapes_and_sorts_by_the_value():
    hostile = Table(name="t", columns=[Column("x<y", "x", hint='"hint"')], records=[{"x": "<script>"}])
    assert "<script>" not in hostile.html() and "x&lt;y" in hostile.html() and "&#34;hint&#34;" in hostile.html()
    page = TABLE.html()
    assert page.count("<tr") == 5 and 'id="row-0.25"' in page and page.endswith("</div>\n")
    assert '<td class="number first" data-sort="0.25"><a href="#x">A|B</a><small>note</small></td>' in page
    assert re.findall(r'colspan="(\d)"', page) == ["2", "1"]
    assert page.count("<button") == 3 and "<button" not in TABLE.html("fixed")


def test_columns_are_left_out_by_their_heading():
    assert TABLE.without(["Dice"]).markdown().splitlines()[0] == "| model | both |"


def test_a_number_has_its_interval_where_there_is_one():
    assert with_bounds(0.8714, 0.8366, 0.8991) == "0.871 [0.837, 0.899]"
    assert with_bounds(0.021, -0.009, 0.034, sign="+") == "+0.021 [-0.009, +0.034]"
    assert with_bounds(0.5, None, None) == "0.500"
