"""The authors' interpretation: Markdown whose numbers are filled in from the same data as the report's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment
from markdown_it import MarkdownIt

from polypseg.errors import UsageError, first_line, unknown_name
from polypseg.evaluation.receipt import Test
from polypseg.report.analysis import SIDES, Analysis
from polypseg.report.receipts import parse_test, table_name
from polypseg.report.wording import number, p_value, percent, rank, span, with_interval
from polypseg.statistics import agreement_row
from polypseg.statistics.scores import METRICS

_TABLE = '<div class="scroll" role="region" tabindex="0" aria-label="Table of the reading"><table class="words">\n'
"""Opens a table that scrolls by itself on a narrow screen."""


def render_reading(path: Path, analysis: Analysis) -> str:
    """The text as HTML; HTML and pictures in it are left as text.

    It may use ``mean(row, test)``, ``gap(row)``, ``rank(row, test)``, ``contrast(name)``, ``floor(side)`` (noise floor
    of a pair of rows), ``agreement``, ``tau`` and the filters ``number``, ``percent`` and ``p_value``; a test is
    ``"in"``, ``"out"`` or DATASET.SPLIT.PART. Raises
    UsageError naming the file for a missing file, a mistake in the template or a number that is not there.
    """
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "percent": percent, "p_value": p_value}
    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(**_numbers(analysis))
    except (OSError, UnicodeDecodeError, jinja2.TemplateError, TypeError) as error:
        raise UsageError(f"{path} cannot be used as the reading: {first_line(error)}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    markdown.add_render_rule("table_open", lambda *_: _TABLE)
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return markdown.render(text)


def _numbers(analysis: Analysis) -> dict[str, Any]:
    material, change = analysis.material, analysis.change
    models = {name: model for model in material.models for name in (material.label(model), table_name(model), model)}

    def test_of(name: str) -> Test:
        return {"in": material.inside, "out": material.outside}.get(name) or parse_test(name)

    def mean(row: str, test: str, metric: str = "dice") -> str:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
        found = _choose(row, models, "row")
        key = (found, test_of(test), metric)
        if key not in analysis.means:
            raise UsageError(f"there is no receipt of {row} on {test}")
        value = analysis.means[key]
        return with_interval(value["mean"], value["mean_low"], value["mean_high"])

    def gap(row: str) -> str:
        value = _choose(_choose(row, models, "row"), {g.model: g for g in analysis.gaps}, "compared row").gap
        return with_interval(value.estimate, value.low, value.high)

    def contrast(name: str, which: str = "gap") -> str:
        value = getattr(_choose(name, {c.name: c for c in analysis.contrasts}, "contrast"), which)
        return with_interval(value.estimate, value.low, value.high, signed=True)

    def rank_of(row: str, test: str) -> str:
        rows = {r["model"]: r for r in change.rows()} if change else {}
        found = _choose(_choose(row, models, "row"), rows, "compared row")
        return rank(found[{"in": "rank_inside", "out": "rank_outside"}[test]])

    def floor(which: str) -> str:
        if which not in SIDES:
            raise unknown_name("side", which, SIDES)
        return number(analysis.floor(which, 1, 1))

    functions: dict[str, Callable[..., str]] = {
        "mean": mean,
        "gap": gap,
        "contrast": contrast,
        "rank": rank_of,
        "floor": floor,
    }
    if change is None:
        return functions
    return {**functions, "agreement": agreement_row(change.agreement), "tau": span(change.agreement.tau)}


def _choose(name: str, known: dict[str, Any], kind: str) -> Any:
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]
