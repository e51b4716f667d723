"""The report's figures: drawn once, written as SVG and PDF, and as SVG whose colors follow the page's theme."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polypseg.report.analysis import Analysis
from polypseg.report.wording import ALPHA
from polypseg.statistics import Interval

INK, MUTED, RULE, CNN, VIT = "#1c2024", "#616b76", "#d4d9df", "#1f6fb2", "#bf4f08"
THEME = {INK: "--ink", MUTED: "--muted", RULE: "--rule", CNN: "--cnn", VIT: "--vit"}
"""Colors of the light theme -> the page's CSS variables."""
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polypseg",
    "pdf.fonttype": 42,
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
WIDTH = 5.9
"""Inches: half of the page."""
BINS = 25
"""Of the distribution of an image's Dice."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure in its three forms."""

    name: str
    title: str
    caption: str
    inline: str
    """SVG element for the page: ids of its own, colors by CSS variables."""
    svg: str
    pdf: bytes


def draw_all(analysis: Analysis) -> dict[str, Picture]:
    """Name -> figure, of those that the receipts allow."""
    with matplotlib.rc_context(_SETTINGS):
        drawn = [draw(analysis) for draw in _DRAWINGS]
        return {picture.name: picture for picture in drawn if picture is not None}


def draw_differences(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """One bar for each measure in which frames differ from those that a model saw: ``words``, ``effect``."""
    with matplotlib.rc_context(_SETTINGS):
        figure, (axis,) = _axes(WIDTH, 0.24 * len(rows) + 0.6)
        places = np.arange(len(rows))[::-1]
        effects = [float(row["effect"]) for row in rows]
        axis.axvspan(-1, 1, color=RULE, alpha=0.45, linewidth=0)
        axis.barh(places, effects, height=0.6, color=[CNN if value >= 0 else VIT for value in effects])
        axis.set_yticks(places, [str(row["words"]) for row in rows])
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_xlabel("standard deviations of the training frames")
        return _picture(
            figure,
            name="differences",
            title="In which respects these frames differ",
            caption="Differences of means from the frames that the model was trained on; gray: within their spread.",
        )


def color_of(model: str) -> str:
    """Blue for convolutional models, orange for transformers."""
    return VIT if model.startswith("vit") else CNN


def _picture(figure: Figure, *, name: str, title: str, caption: str) -> Picture:
    svg, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.03, metadata={"Date": None})
    figure.savefig(pdf, format="pdf", bbox_inches="tight", pad_inches=0.03, metadata={"CreationDate": None})
    text = svg.getvalue().decode()
    return Picture(
        name=name,
        title=title,
        caption=caption,
        inline=inline_svg(text, name=name, title=title),
        svg=text,
        pdf=pdf.getvalue(),
    )


def inline_svg(svg: str, *, name: str, title: str) -> str:
    """A matplotlib SVG as an element of a page: no prolog, ids under ``name``, the page's font and colors.

    ``title`` is plain text without markup characters; it becomes the element's accessible name.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace("\n", " ").replace("xlink:href", "href")
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in referred else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for value, variable in THEME.items():
        body = body.replace(value, f"var({variable})")
    width, height = (float(size) for size in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', body).groups())  # type: ignore[union-attr]
    size = f'width="{width * 4 / 3:.0f}" height="{height * 4 / 3:.0f}"'
    head = f'<svg role="img" aria-label="{title}" {size} viewBox="0 0 {width:g} {height:g}">'
    return re.sub(r">\s+<", "><", re.sub(r"<svg[^>]*>", head, body, count=1)).strip()


def _axes(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **options)[0]


def _distributions(analysis: Analysis) -> Picture | None:
    material = analysis.material
    tests = [test for test in (material.inside, material.outside) if test in material.tests]
    if not tests:
        return None
    figure, axes = _axes(WIDTH, 0.36 * len(material.models) + 0.7, ncols=len(tests), sharey=True)
    edges = np.linspace(0, 1, BINS + 1)
    for axis, test in zip(axes, tests, strict=True):
        for row, model in enumerate(material.models):
            used = material.used(model, test)
            if not used:
                continue
            dice = np.stack([r.per_image("dice") for r in used])
            shares = np.histogram(dice, edges)[0] / dice.size
            axis.stairs(
                row + 0.38 - 0.8 * shares / max(shares),
                edges,
                baseline=row + 0.38,
                fill=True,
                color=color_of(model),
                alpha=0.35,
            )
            low, middle, high = np.quantile(dice, [0.25, 0.5, 0.75])
            axis.plot([low, high], [row + 0.38] * 2, color=color_of(model), lw=2.2, solid_capstyle="butt")
            axis.plot([middle] * 2, [row + 0.16, row + 0.38], color=INK, lw=1.4)
            axis.plot(dice.mean(), row + 0.38, "o", ms=3.6, color=INK, mew=0)
        axis.set(xlim=(-0.01, 1.01), xlabel="Dice of an image")
        axis.set_title(f"{material.test_title(test)}\nn = {len(dice[0])}")
    axes[0].set_yticks(range(len(material.models)), [material.label(m) for m in material.models])
    axes[0].set_ylim(len(material.models) - 0.4, -0.6)
    return _picture(
        figure,
        name="dice-distributions",
        title="Distribution of Dice over images",
        caption=f"Share of images in {BINS} equal bins of Dice, each row scaled to its highest bin, all seeds "
        "together. Bar: quartiles; stroke: median; dot: mean.",
    )


def _slopes(analysis: Analysis) -> Picture | None:
    change = analysis.change
    if change is None:
        return None
    rows, count, names = change.rows(), len(change.models), analysis.material.names
    figure, (axis,) = _axes(WIDTH, 0.3 * count + 0.6)
    for place, where in ((0, "inside"), (1, "outside")):
        for offset, row in _spread_ties(rows, f"rank_{where}"):
            side, away = ("right", -1) if place == 0 else ("left", 1)
            spread = f"{row[f'rank_{where}_low']}–{row[f'rank_{where}_high']}"
            y = row[f"rank_{where}"] + offset
            name, rank = analysis.material.label(row["model"]), f"{row[f'rank_{where}']:g}"
            text = f"{name}  {rank}" if place == 0 else f"{rank}  {name}"
            axis.text(place + 0.05 * away, y, text, ha=side, va="center", color=color_of(row["model"]))
            if analysis.claims:
                axis.text(place + 0.75 * away, y, spread, ha=side, va="center", color=MUTED, fontsize=7.5)
    certain = {frozenset((p["a"], p["b"])) for p in analysis.certain_flips()}
    named = {model for pair in certain for model in pair}
    for row in rows:
        width = 2.2 if row["model"] in named else 1.2
        axis.plot([0, 1], [row["rank_inside"], row["rank_outside"]], "o-", ms=4, lw=width, color=color_of(row["model"]))
    axis.set(xlim=(-0.95, 1.95), ylim=(count + 0.6, 0.2), yticks=[], xticks=[])
    axis.spines["bottom"].set_visible(False)
    for place, where, side in ((0, "in distribution", "right"), (1, "out of distribution", "left")):
        away = 1 if place else -1
        axis.text(place + 0.05 * away, 0.2, where, ha=side, va="bottom", weight="bold")
        if analysis.claims:
            axis.text(place + 0.75 * away, 0.2, "95 %", ha=side, va="bottom", color=MUTED, fontsize=7.5)
    return _picture(
        figure,
        name="rank-slopes",
        title="Rank by mean Dice in and out of distribution",
        caption="Rank by mean Dice, 1 is best. "
        + ("95 %: range of a model's rank over joint draws of images and seeds. " if analysis.claims else "")
        + f"Blue: {names.get('resnet50', 'ResNet50')} + DeepLabV3+ rows; orange: "
        + f"{names.get('vit_base', 'ViT-B')} + DPT "
        + ("rows. Thick: part of a pair shown to change places." if analysis.claims else "rows.")
        + ("" if analysis.claims else " One training run a row: another run may rank them otherwise."),
    )


def _spread_ties(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, Mapping[str, Any]]]:
    """Rows with an offset that keeps the labels of tied models apart."""
    placed = []
    for row in rows:
        tied = [r["model"] for r in rows if r[key] == row[key]]
        placed.append((0.9 * (tied.index(row["model"]) - (len(tied) - 1) / 2), row))
    return placed


def _rank_probabilities(analysis: Analysis) -> Picture | None:
    change = analysis.change
    if change is None or not analysis.claims:
        return None
    count = len(change.models)
    figure, axes = _axes(2 * WIDTH * min(1.0, (count + 2) / 14), 0.26 * count + 0.9, ncols=2)
    for axis, ranking, where in zip(axes, (change.inside, change.outside), ("in", "out of"), strict=True):
        order = np.argsort(ranking.ranks, kind="stable")
        shares = ranking.probability[order]
        _cells(axis, np.where(shares >= 0.005, shares, np.nan))
        axis.set_yticks(range(count), [analysis.material.label(change.models[m]) for m in order])
        axis.set_xticks(range(count), range(1, count + 1))
        axis.set_xlabel("rank")
        axis.set_title(f"{where} distribution")
    return _picture(
        figure,
        name="rank-probabilities",
        title="Probability of each rank",
        caption="Share of draws, in percent, in which a model (row, best mean first) has a rank (column).",
    )


def _cells(axis: Any, shares: Any) -> None:
    """Shares (R, K) as shaded squares with whole percents; NaN leaves a square empty."""
    rows, columns = shares.shape
    for (row, column), share in np.ndenumerate(shares):
        if np.isnan(share):
            continue
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=CNN, alpha=0.04 + 0.5 * share, lw=0))
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.8)
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


def _flips(analysis: Analysis) -> Picture | None:
    change = analysis.change
    if change is None or not analysis.claims:
        return None
    count = len(change.models)
    order = np.argsort(change.inside.ranks, kind="stable")
    figure, (axis,) = _axes(min(WIDTH, 0.42 * count + 1.3), 0.27 * count + 0.7)
    shares = change.flips[np.ix_(order, order)]
    _cells(axis, np.where(np.tri(count, k=-1, dtype=bool), shares, np.nan)[1:, :-1])
    certain = {frozenset((p["a"], p["b"])) for p in analysis.certain_flips()}
    names = [change.models[m] for m in order]
    for row in range(1, count):
        for column in range(row):
            if {names[row], names[column]} in certain:
                axis.add_patch(Rectangle((column - 0.46, row - 1.46), 0.92, 0.92, fill=False, edgecolor=INK, lw=1.2))
    axis.set_yticks(range(count - 1), [analysis.material.label(m) for m in names[1:]])
    axis.set_xticks(
        range(count - 1),
        [analysis.material.label(m) for m in names[:-1]],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axis.tick_params(axis="x", labelcolor=INK)
    return _picture(
        figure,
        name="flip-probabilities",
        title="Probability that two models stand in opposite orders",
        caption="Share of draws, in percent, in which a pair stands in opposite orders in the two tests; models by "
        f"rank in distribution. Framed: shown to change places (Holm-adjusted p < {ALPHA}).",
    )


def _calibration(analysis: Analysis) -> Picture | None:
    material = analysis.material
    tests = [test for test in (material.inside, material.outside) if test in material.tests]
    if not any(receipt.has_calibration for receipt in material.receipts if receipt.test in tests):
        return None
    figure, axes = _axes(WIDTH, 3.3, ncols=len(tests), sharey=True)
    for axis, test in zip(axes, tests, strict=True):
        axis.plot([0.5, 1], [0.5, 1], color=RULE, lw=1, zorder=0)
        for model in material.models:
            inside = [receipt.calibration()[1] for receipt in material.used(model, test) if receipt.has_calibration]
            if inside:
                pixels, confidence, correct = np.sum(inside, axis=0).T
                filled = pixels > 0
                points = confidence[filled] / pixels[filled], correct[filled] / pixels[filled]
                axis.plot(*points, "o-", ms=2.4, lw=1, alpha=0.7, color=color_of(model))
        axis.set(xlabel="confidence", xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
        axis.set_title(material.test_title(test))
    axes[0].set_ylabel("share of pixels right")
    return _picture(
        figure,
        name="calibration",
        title="Calibration inside the polyp",
        caption="Pixels of the true polyp in ten bins of confidence, one line a model, all seeds together; on the "
        "diagonal, confidence is right. Pixels outside the polyp, nearly all of them certain and right, are left out.",
    )


Line = tuple[str, str, Interval, float | None]
"""Name, color, estimate with interval, noise floor of the training runs (None: not drawn)."""


def _forest(
    panels: Sequence[tuple[str, Sequence[Line]]], *, name: str, title: str, caption: str, line: float = 0.25
) -> Picture:
    """Estimates with their intervals, one line each; one panel a quantity."""
    count = len(panels[0][1])
    figure, axes = _axes(WIDTH, line * count + 0.75, ncols=len(panels), sharey=True)
    for axis, (heading, lines) in zip(axes, panels, strict=True):
        axis.axvline(0, color=RULE, lw=1)
        for row, (_, tone, value, floor) in enumerate(lines):
            if floor is not None:
                axis.barh(row, 2 * floor, left=-floor, height=0.62, color=MUTED, alpha=0.18, lw=0)
            if value.low is not None:
                axis.plot([value.low, value.high], [row, row], color=tone, lw=1.6, solid_capstyle="butt")
            axis.plot(value.estimate, row, "o", ms=4.5, color=tone, mew=0)
        axis.set_xlabel(heading)
        axis.locator_params(axis="x", nbins=10 // len(panels))
        axis.set_ylim(count - 0.4, -0.6)
    axes[0].set_yticks(range(count), [line[0] for line in panels[0][1]])
    return _picture(figure, name=name, title=title, caption=caption)


def _gaps(analysis: Analysis) -> Picture | None:
    if not analysis.gaps:
        return None
    ordered = sorted(analysis.gaps, key=lambda gap: gap.gap.estimate)
    panels = [
        ("loss of mean Dice", [(analysis.material.label(g.model), color_of(g.model), g.gap, None) for g in ordered])
    ]
    if all(gap.relative for gap in ordered):
        panels.append(
            (
                "loss relative to in distribution",
                [
                    (analysis.material.label(g.model), color_of(g.model), g.relative, None)
                    for g in ordered
                    if g.relative
                ],
            )
        )
    return _forest(
        panels,
        name="generalisation-gaps",
        title="Generalization gap of each model",
        caption="Mean Dice in distribution minus out of distribution with 95 % intervals, smallest loss first.",
    )


def _contrasts(analysis: Analysis) -> Picture | None:
    if not analysis.contrasts:
        return None
    titles = {"inside": "mean Dice, in", "outside": "mean Dice, out", "gap": "loss (in − out)"}
    panels = [
        (
            heading,
            [
                (
                    c.name.replace(" - ", " −\n"),
                    INK,
                    getattr(c, which),
                    analysis.floor(which, *map(len, c.groups)),
                )
                for c in analysis.contrasts
            ],
        )
        for which, heading in titles.items()
    ]
    return _forest(
        panels,
        name="group-contrasts",
        title="Contrasts between groups of models",
        caption="First group minus second with 95 % intervals. Positive: the first has the higher Dice in or out of "
        "distribution; negative loss: it loses less. "
        + ("Gray: noise floor, what training runs alone may make. " if analysis.runs else "")
        + ("" if analysis.claims else "One training run a row: no claim."),
        line=0.45,
    )


_DRAWINGS: tuple[Callable[[Analysis], Picture | None], ...] = (
    _slopes,
    _rank_probabilities,
    _flips,
    _gaps,
    _contrasts,
    _distributions,
    _calibration,
)
