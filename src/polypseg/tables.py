"""Tables for people: columns declared once, records shown as HTML, Markdown, CSV or on a terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polypseg.files import csv_text

if TYPE_CHECKING:
    import jinja2
    import rich.table


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown; for the page also what it is sorted by, and where it comes from."""

    text: str
    note: str = ""
    """Second line: an interval."""
    more: str = ""
    """Third line."""
    sort: float | str | None = None
    href: str = ""
    title: str = ""


def words(value: Any) -> str:
    """A value as it is; empty for None."""
    return "" if value is None else str(value)


def with_bounds(value: float, low: float | None, high: float | None, *, sign: str = "") -> str:
    """``0.871 [0.837, 0.899]`` in plain text; the value alone where there is no interval. ``sign``: ``+`` for a change.

    Pages of the report write numbers by report.wording, with a true minus sign.
    """
    interval = "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}"


def bounds(low: float | None, high: float | None, how: str = ".4f") -> str:
    """``0.8366 to 0.8991`` for a column of its own; empty where there is no interval. ``how``: a format of numbers."""
    return "" if low is None or high is None else f"{low:{how}} to {high:{how}}"


@dataclass(frozen=True)
class Column:
    """A column: its heading, which value of a record it shows, and how."""

    title: str
    key: str = ""
    """Key or attribute of a record; empty where ``format`` gets the whole record."""
    format: Callable[[Any], Cell | str] = words
    group: str = ""
    """Heading above neighboring columns of the same group."""
    numeric: bool = True
    smallest_first: bool = False
    """Whether the first click sorts upwards."""
    hint: str = ""
    optional: bool = False
    """Whether it may be left out on a narrow terminal."""

    def cell(self, record: Any) -> Cell:
        """The column's cell of a record."""
        if not self.key:
            value = record
        else:
            value = record[self.key] if isinstance(record, Mapping) else getattr(record, self.key)
        shown = self.format(value)
        return Cell(shown) if isinstance(shown, str) else shown


@dataclass(frozen=True)
class Row:
    """The cells of one record; ``id`` is its anchor."""

    cells: Sequence[Cell]
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Records under columns."""

    columns: Sequence[Column]
    records: Sequence[Any]
    name: str = ""
    title: str = ""
    """Above the table on a terminal."""
    caption: str = ""
    total: Any = None
    """A last record that sums up the others, in bold on a terminal."""
    anchor: Callable[[Any], str] | None = None
    """A record's anchor on the page."""
    fields: Callable[[Any], Mapping[str, Any]] = dict
    """What of a record goes into files."""

    @property
    def rows(self) -> list[Row]:
        """Every record's cells, the sum last."""
        every = [*self.records, *([] if self.total is None else [self.total])]
        return [
            Row([column.cell(record) for column in self.columns], self.anchor(record) if self.anchor else "")
            for record in every
        ]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns with the columns each spans; [] where there are none."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(name for name, _ in spans) else []

    def without(self, titles: Sequence[str]) -> "Table":
        """The table without the columns of these headings."""
        return replace(self, columns=[column for column in self.columns if column.title not in titles])

    def plain_records(self) -> list[dict[str, Any]]:
        """What goes into files, one mapping per record."""
        return [dict(self.fields(record)) for record in self.records]

    def csv(self) -> str:
        """The records with a header; values as they are, not as they are shown."""
        return csv_text(self.plain_records())

    def markdown(self) -> str:
        """A Markdown table, without a line break at its end; a bar in a cell is escaped."""
        lines = [
            _markdown_line(column.title for column in self.columns),
            "|" + "---|" * len(self.columns),
            *(_markdown_line(cell.text for cell in row.cells) for row in self.rows),
        ]
        return "\n".join(lines)

    def html(self, kind: str = "") -> str:
        """The table for a page of the report; ``kind``: its class, of which "fixed" cannot be sorted."""
        previous = None
        classes = []
        for column in self.columns:  # the first of a group has a line before it
            first = " first" if previous is not None and column.group and column.group != previous else ""
            classes.append(("number" if column.numeric else "") + first)
            previous = column.group
        return _html_template().render(table=self, kind=kind, classes=classes)

    def rich(self, *, no_wrap: bool = False) -> "rich.table.Table":
        """The table for a terminal; square brackets are text, not markup."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        shown = RichTable(title=escape(self.title) or None, caption=escape(self.caption) or None)
        for column in self.columns:
            shown.add_column(escape(column.title), no_wrap=no_wrap)
        for row in self.rows:
            shown.add_row(*(escape(cell.text) for cell in row.cells))
        if self.total is not None:
            shown.rows[-1].style = "bold"
        return shown


def _markdown_line(cells: Any) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in (text.replace("|", "\\|") for text in cells))


@cache
def _html_template() -> "jinja2.Template":
    return template_environment(escape=True).from_string(_HTML)


def template_environment(folder: Path | None = None, *, escape: bool) -> "jinja2.Environment":
    """Templates strict about names: a missing value is an error, never an empty place; lines of blocks leave none.

    ``folder``: of the templates; ``escape``: whether values are text in HTML.
    """
    import jinja2

    return jinja2.Environment(
        loader=None if folder is None else jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


_HTML = """\
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.caption or 'Scores' }}">
<table id="table-{{ table.name }}" class="{{ kind }}">
{% if table.caption %}
<caption><span>{{ table.caption }}</span></caption>
{% endif %}
<thead>
{% if table.groups %}
<tr>
{%- for name, span in table.groups -%}
<th{% if name %} scope="colgroup" class="group"{% endif %} colspan="{{ span }}">{{ name }}</th>
{%- endfor -%}
</tr>
{% endif %}
<tr>
{%- for column in table.columns -%}
<th scope="col" class="{{ classes[loop.index0] }}"
{%- if column.hint %} title="{{ column.hint }}"{% endif %}
{%- if kind == "fixed" %}>{{ column.title }}
{%- else %} aria-sort="none" data-first="{{ 'ascending' if column.smallest_first else 'descending' }}">
{{- "" }}<button type="button">{{ column.title }}</button>
{%- endif %}</th>
{%- endfor -%}
</tr>
</thead>
<tbody>
{% for row in table.rows %}
<tr{% if row.id %} id="{{ row.id }}"{% endif %}>
{%- for cell in row.cells -%}
<{{ 'th scope="row"' | safe if loop.first else 'td' }} class="{{ classes[loop.index0] }}"
{%- if cell.sort is not none %} data-sort="{{ cell.sort }}"{% endif %}
{%- if cell.title %} title="{{ cell.title }}"{% endif %}>
{%- if cell.href %}<a href="{{ cell.href }}">{{ cell.text }}</a>{% else %}{{ cell.text }}{% endif %}
{%- if cell.note %}<small>{{ cell.note }}</small>{% endif %}
{%- if cell.more %}<small>{{ cell.more }}</small>{% endif %}
</{{ 'th' if loop.first else 'td' }}>
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
"""
