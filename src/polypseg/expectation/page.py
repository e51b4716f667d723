"""docs/estimate.md: how to ask what quality to expect, and what the answers were worth where they could be checked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from polypseg.errors import PolypSegError
from polypseg.expectation.estimate import LEAST
from polypseg.expectation.fit import WORTH
from polypseg.files import read_json
from polypseg.inference.expected import FLAGS
from polypseg.report.document import TEMPLATES
from polypseg.tables import template_environment

_NAMES = {"set": "real set", "corruption": "corruption", "model": "other model"}
ADAPTATION, TIME = "adaptation.jsonl", "time.json"
"""Of training_scripts/measure_adaptation.py, and of benchmarks/estimate_time.py."""
Rows = list[tuple[str, ...]]
Records = Sequence[Mapping[str, Any]]


def render_page(learned: Mapping[str, Any], point: Mapping[str, Any], *, measured: Path | None = None) -> str:
    """The page as Markdown, of an expectation file's content and an operating point's.

    ``measured``: folder of the measured adaptations and time, of the same weights. Raises PolypSegError for others'.
    """
    evidence, cells = learned["evidence"], learned["learnt_from"]
    name, digest = next(iter(learned["model"]["sha256"].items()))
    draws, time = _read_measured(measured, digest=digest)
    tested = [draw for draw in draws if draw["purpose"] == "test"]
    ceilings = {draw["draw"]: draw for draw in draws if draw["purpose"] == "ceiling"}
    environment = template_environment(TEMPLATES, escape=False)
    return environment.get_template("estimate.md.jinja").render(
        least=LEAST,
        worth=WORTH,
        flags=FLAGS,
        learned=learned,
        weights=f"`{name}`, SHA-256 `{digest[:16]}…`",
        sets=sum(row["sort"] == "set" for row in evidence["units"]),
        bounds=[*_bounds(learned), *_adaptation_bounds(tested, ceilings), *_time_bounds(time)],
        time=time,
        draws=_draws(tested, ceilings),
        with_ceilings=bool(ceilings),
        clips=sorted({draw["said"]["groups"] for draw in tested}),
        given=sorted({draw["given"] for draw in tested}),
        shipped=sum(draw["said"]["adapted"] for draw in tested),
        candidates=_candidates(learned),
        units=_units(evidence),
        margin=evidence["margin"],
        margin_sets=_margin_sets(evidence["margin"]),
        margin_cells=_margin_cells(evidence["margin"]),
        refusals=_refusals(learned),
        found=point["evidence"],
        point=point,
        total=sum(cell["n"] for cell in cells),
        set_names=sorted({cell["set"] for cell in cells}),
        kinds=sorted({cell["corruption"] for cell in cells} - {"none"}),
        severities=sorted({cell["severity"] for cell in cells} - {0}),
        models=sorted({cell["model"] for cell in cells}),
    )


def _read_measured(folder: Path | None, *, digest: str) -> tuple[Records, Mapping[str, Any] | None]:
    """The draws of adaptation and the record of time in a folder, those that there are."""
    draws: list[dict[str, Any]] = []
    time: dict[str, Any] | None = None
    if folder is not None and (folder / ADAPTATION).is_file():
        draws = [json.loads(line) for line in (folder / ADAPTATION).read_text(encoding="utf-8").splitlines()]
    if folder is not None and (folder / TIME).is_file():
        time = read_json(folder / TIME)
    if any(record["model"] != digest for record in (*draws, *([time] if time else []))):
        raise PolypSegError(f"{folder} was measured of other weights than {digest[:16]}: measure again")
    return draws, time


def _n(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _between(value: Mapping[str, Any]) -> str:
    return f"{_n(value['estimate'])} [{_n(value['low'])}, {_n(value['high'])}]"


def _met(value: float | None, floor: float, aim: float, *, smaller: bool = False) -> str:
    if value is None:
        return "not measured"
    sign = -1 if smaller else 1
    if sign * value >= sign * aim:
        return "aim met"
    return "floor met" if sign * value >= sign * floor else "**floor missed**"


def _bounds(learned: Mapping[str, Any]) -> Rows:
    """Every figure beside what was asked of it: what, measured, floor, aim, verdict."""
    evidence = learned["evidence"]
    rows: Rows = []
    for words, value in (
        ("error of the expected mean Dice, mean over held-out sets, corruptions and models", "mean_absolute_error"),
        ("the same where the Dice is above .6", "mild"),
    ):
        error = evidence[value]
        rows.append((words, _n(error), ".05", ".03", _met(error, 0.05, 0.03, smaller=True)))
    coverage, width = evidence["coverage"], 2 * learned["interval"]["half_width"]
    share = coverage["covered"] / coverage["families"]
    held, sets = coverage["by_sort"]["set"]
    told = f"{coverage['covered']} of {coverage['families']} ({share:.0%})"
    rows += [
        ("90 % interval from the other held-out things: those it holds", told, "85 %", "90 %", _met(share, 0.85, 0.9)),
        ("the same: real sets that it holds", f"{held} of {sets}", "all", "all", _met(held / sets, 1, 1)),
        ("width of the interval", _n(width), ".30", ".18", _met(width, 0.30, 0.18, smaller=True)),
    ]
    frames = evidence["frames"]
    for words, passes, key in (
        ("AUROC for Dice below .5, held-out sets and corruptions, interval by clip", "three_passes", "auroc_all"),
        ("the same by one pass (`segment`)", "one_pass", "auroc_all"),
        ("the same on uncorrupted frames alone", "three_passes", "auroc_clean"),
        ("the same by one pass", "one_pass", "auroc_clean"),
    ):
        found = frames[passes][key]
        rows.append((words, _between(found), ".80", ".88", _met(found["estimate"], 0.80, 0.88)))
    for words, passes in (
        ("rank correlation with the measured Dice by frame, CVC-ClinicDB, interval by clip", "three_passes"),
        ("the same by one pass", "one_pass"),
    ):
        found = frames[passes].get("rank_correlation")
        if found:
            rows.append((words, _between(found), ".5", ".7", _met(found["estimate"], 0.5, 0.7)))
    chosen = {one["name"]: one for one in evidence["candidates"]}
    best = min((one for one in evidence["candidates"] if one["baseline"]), key=lambda one: one["error"])
    ours = chosen[learned["chosen"]["three_passes"]]
    better = "met" if ours["error"] <= best["error"] else "the baseline is better"
    words = f"error of `estimate` ({ours['name']}) against the best baseline ({best['name']})"
    rows.append(
        (words, f"{_n(ours['error'])} against {_n(best['error'])}", "better, or the baseline ships", "", better)
    )
    return [*rows, *_margin_bounds(evidence["margin"]), *_refusal_bounds(learned)]


def _margin_bounds(margin: Mapping[str, Any]) -> Rows:
    splits, alarm = margin["splits"], margin["alarm"]
    found = alarm["found"] / alarm["harmed"] if alarm["harmed"] else None
    off, factor = abs(splits["mean"] - margin["level"]), margin["area_factor"]
    words = f"margin: frames of which 90 % is held, mean of {splits['number']} random halves of validation and test"
    mean = f"{_n(splits['mean'])} (sd {_n(splits['sd'])})"
    false = f"alarm: false on batches of {alarm['batch_frames']} frames of Kvasir-SEG's test part"
    return [
        (words, mean, ".90 ± .01", ".90 ± .01", _met(off, 0.01, 0.01, smaller=True)),
        ("margin: area of a round mask with it over that without", _n(factor, 2), "–", "1.4",
         "aim met" if factor <= 1.4 else "aim missed"),
        ("alarm: sets and corruptions with coverage below .80 that are found", f"{alarm['found']} of {alarm['harmed']}",
         "80 %", "95 %", _met(found, 0.80, 0.95)),
        (false, f"{alarm['false']:.1%}", "10 %", "5 %", _met(alarm["false"], 0.10, 0.05, smaller=True)),
    ]  # fmt: skip


def _refusal_bounds(learned: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    for words, wanted, floor, aim in (
        ("refusal: sets of noise and natural images", True, 0.95, 1.0),
        ("refusal: endoscopic sets", False, 0.05, 0.0),
    ):
        refused = [row["refused"] for row in learned["refusals"] if row["to_refuse"] == wanted]
        verdict = _met(sum(refused) / len(refused), floor, aim, smaller=not wanted)
        rows.append((words, f"{sum(refused)} of {len(refused)}", f"{floor:.0%}", f"{aim:.0%}", verdict))
    return rows


def _ceiling(draw: Mapping[str, Any]) -> float:
    """The most that a method gained with labels of the tested clips, chosen on the tested frames themselves."""
    return max(value for key, value in draw.items() if key.startswith(("TuningPlan", "StatisticsPlan")))


def _adaptation_bounds(tested: Records, ceilings: Mapping[str, Mapping[str, Any]]) -> Rows:
    if not tested:
        return []
    gain = fmean(draw["gain"] for draw in tested)
    words = f"gain of `adapt` on other clips of CVC-ClinicDB, mean of {len(tested)} draws"
    rows: Rows = [(words, f"{gain:+.3f}", "-.005", "+.03", _met(gain, -0.005, 0.03))]
    if ceilings:
        most = fmean(map(_ceiling, ceilings.values()))
        words = f"the most that its methods gain with labels of the tested clips, mean of {len(ceilings)} draws"
        rows.append((words, f"{most:+.3f}", "", "", ""))
    return rows


def _time_bounds(time: Mapping[str, Any] | None) -> Rows:
    if time is None:
        return []
    words = f"time of `estimate` for {time['frames']} frames, {time['cores']} cores ({time['processor']})"
    verdict = _met(time["median"], 120, 40, smaller=True)
    return [(words, f"{time['median']:.0f} s", "2 min", "40 s", verdict)]


def _draws(tested: Records, ceilings: Mapping[str, Mapping[str, Any]]) -> Rows:
    rows: Rows = []
    for draw in tested:
        said, ceiling = draw["said"], ceilings.get(draw["draw"])
        rows.append(
            (
                draw["draw"],
                _n(draw["before"]),
                f"{said['gain']:+.3f}",
                f"{said['bound']:+.3f}",
                "yes" if said["adapted"] else "no",
                f"{draw['gain']:+.3f}",
                *([] if not ceilings else ["–" if ceiling is None else f"{_ceiling(ceiling):+.3f}"]),
            )
        )
    return rows


def _candidates(learned: Mapping[str, Any]) -> Rows:
    keys = ("error", "set", "corruption", "model", "mild", "auroc", "rank_correlation")
    commands = {"three_passes": "`estimate`", "one_pass": "`segment`"}
    rows: Rows = []
    for one in learned["evidence"]["candidates"]:
        used = [words for key, words in commands.items() if learned["chosen"][key] == one["name"]]
        name = f"{one['name']} (baseline)" if one["baseline"] else one["name"]
        rows.append((name, *(_n(one[key]) for key in keys), ", ".join(used)))
    return rows


def _units(evidence: Mapping[str, Any]) -> Rows:
    return [
        (
            _NAMES[row["sort"]],
            f"{row['held_out']} {row['severity']}" if row["severity"] else row["held_out"],
            str(row["n"]),
            _n(row["dice"]),
            _n(row["expected"]),
            f"{row['expected'] - row['dice']:+.3f}",
            "yes" if row["within"] else "**no**",
        )
        for row in evidence["units"]
    ]


def _margin_sets(margin: Mapping[str, Any]) -> Rows:
    return [
        (name, str(row["n"]), _n(row["coverage"]), _n(row["coverage_by_clip"]), str(row["clips"]), str(row["empty"]))
        for name, row in margin["sets"].items()
    ]


def _margin_cells(margin: Mapping[str, Any]) -> Rows:
    return [
        (
            f"{row['corruption']} {row['severity']}",
            str(row["n"]),
            _n(row["coverage"]),
            _n(row["expected"]),
            "raised" if row["alarm"] else "",
        )
        for row in margin["cells"]
        if row["corruption"] != "none"
    ]


def _refusals(learned: Mapping[str, Any]) -> Rows:
    words = {True: "yes", False: "no"}
    return [
        (row["set"], str(row["n"]), f"{row['unlike']:.0%}", words[row["refused"]], words[row["to_refuse"]])
        for row in learned["refusals"]
    ]
