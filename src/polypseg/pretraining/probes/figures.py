"""The figures of a pretraining run: nearest neighbors, reconstructions, the loss beside the spread of embeddings."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from polypseg.plotting import CNN_COLOR, VIT_COLOR, add_note, save_figure

SAME_CLASS, OTHER_CLASS = "#1a9641", "#d7191c"
MEDIAN_POINTS = 400
"""Positions at which a running median is computed, however long the run."""
SHEET_DPI = 80
"""Of sheets of frames, which are small themselves: more would only make heavy files."""


def _show(axis: Axes, image: NDArray[np.uint8], *, color: str, width: float) -> None:
    """One framed tile."""
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=width)


def _shorten(name: str, *, length: int = 21) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_neighbors(
    path: Path,
    *,
    images: NDArray[np.uint8],
    names: Sequence[str],
    queries: NDArray[np.int64],
    neighbors: NDArray[np.int64],
    similarities: NDArray[np.float32],
    title: str,
    note: str,
) -> Path:
    """Rows: query frames; columns: the query, then its nearest frames, green and ✓ where the class agrees, else red, ✗.

    images (N, S, S, 3) with N class names; queries (Q,), neighbors (Q, K) indices; similarities (Q, K).
    """
    rows, columns = neighbors.shape
    figure, axes = _grid(rows, [1, 0.1, *[1] * columns], tile=(1.4, 1.4), gap=(0.1, 0.34), head=0.7, foot=0.15)
    for row, query in enumerate(queries):
        _show(axes[row][0], images[query], color="black", width=1)
        axes[row][0].set_title(_shorten(names[query]), fontsize=7, fontweight="bold", pad=3)
        axes[row][1].set_axis_off()
        for axis, other, similarity in zip(axes[row][2:], neighbors[row], similarities[row], strict=True):
            alike = names[other] == names[query]
            color = SAME_CLASS if alike else OTHER_CLASS
            _show(axis, images[other], color=color, width=3)
            axis.set_title(f"{'✓' if alike else '✗'} {_shorten(names[other])}", fontsize=7, color=color, pad=3)
            axis.set_xlabel(f"{similarity:.3f}", fontsize=6, labelpad=2)
    _add_heading(figure, f"{title}: query (left) and its nearest frames")
    add_note(figure, note)
    return save_figure(figure, path, dpi=SHEET_DPI)


def _add_heading(figure: plt.Figure, text: str) -> None:
    """A title a fixed distance above the axes, whatever the figure's height."""
    top = figure.axes[0].get_position().y1 + 0.32 / figure.get_figheight()
    lines = textwrap.fill(text, width=int(11 * figure.get_figwidth()))
    figure.text(0.5, top, lines, ha="center", va="bottom", fontsize=11)


def _grid(
    rows: int,
    widths: Sequence[float],
    *,
    tile: tuple[float, float],
    gap: tuple[float, float],
    head: float,
    foot: float,
) -> tuple[plt.Figure, NDArray[np.object_]]:
    """Axes of equal height; columns as many tiles wide as ``widths`` says. tile, gap: (width, height) in inches."""
    columns, (across, down) = len(widths), tile
    width = across * sum(widths) + gap[0] * (columns - 1)
    height = down * rows + gap[1] * (rows - 1) + head + foot
    return plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        squeeze=False,
        gridspec_kw={
            "width_ratios": widths,
            "wspace": gap[0] * columns / (across * sum(widths)),
            "hspace": gap[1] / down,
            "left": 0,
            "right": 1,
            "bottom": foot / height,
            "top": 1 - head / height,
        },
    )


def draw_reconstructions(
    path: Path,
    *,
    originals: NDArray[np.uint8],
    masked: NDArray[np.uint8],
    reconstructed: NDArray[np.uint8],
    note: str,
) -> Path:
    """A masked autoencoder's work, one frame a row: the frame, what the encoder saw, what the decoder made of it.

    All (N, H, W, 3). Raises ValueError when the shapes differ or there is no frame.
    """
    columns = {"original": originals, "masked": masked, "reconstructed": reconstructed}
    shapes = {images.shape for images in columns.values()}
    if len(shapes) > 1 or originals.ndim != 4 or not len(originals):
        raise ValueError(f"originals, masked and reconstructed must share one shape (N, H, W, 3), not {sorted(shapes)}")
    tile = (2.0, 2.0 * originals.shape[1] / originals.shape[2])
    figure, axes = _grid(len(originals), [1, 1, 1], tile=tile, gap=(0.06, 0.06), head=0.3, foot=0.02)
    for column, (title, images) in enumerate(columns.items()):
        for row, image in enumerate(images):
            _show(axes[row][column], image, color="0.6", width=0.5)
        axes[0][column].set_title(title, fontsize=9)
    add_note(figure, note)
    return save_figure(figure, path, dpi=SHEET_DPI)


def draw_loss_curve(path: Path, *, losses: Sequence[float], spreads: Sequence[float], title: str, note: str) -> Path:
    """Loss of each step (thin) with a running median, and below it the spread of the embeddings of each step.

    NaN marks steps at which a value was not measured. Losses that span more than a factor of 20 are on a log scale.
    Raises ValueError without steps or when the two differ in length.
    """
    if not len(losses) or len(losses) != len(spreads):
        raise ValueError(f"{len(losses)} losses and {len(spreads)} spreads: one each a step, at least one")
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, gridspec_kw={"height_ratios": [2, 1], "hspace": 0.08}
    )
    _draw_series(upper, np.asarray(losses, dtype=np.float64), color=CNN_COLOR)
    upper.set(ylabel="loss", title=title)
    measured = np.asarray(losses)[np.isfinite(losses)]
    if len(measured) and 0 < measured.min() < measured.max() / 20:
        upper.set_yscale("log")
    upper.legend(fontsize=8)
    _draw_series(lower, np.asarray(spreads, dtype=np.float64), color=VIT_COLOR)
    lower.set(xlabel="step", ylim=(-0.05, 1.05))
    lower.set_ylabel("spread\n(0 collapsed, 1 even)", fontsize=8)
    figure.align_ylabels()
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_note(figure, note)
    return save_figure(figure, path)


def _draw_series(axis: Axes, values: NDArray[np.float64], *, color: str) -> None:
    """Every finite step thin, the running median bold."""
    steps = np.flatnonzero(np.isfinite(values))
    axis.grid(alpha=0.3)
    if not len(steps):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.4")
        return
    marker = "." if len(steps) <= 50 else ""
    axis.plot(steps + 1, values[steps], lw=0.6, color=color, alpha=0.45, marker=marker, ms=3, label="each step")
    at, median, width = running_median(values[steps])
    axis.plot(steps[at] + 1, median, lw=1.8, color=color, label=f"running median of {width}")


def running_median(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Positions, the median around each, and the window: a twentieth of the series, odd, narrower at both ends."""
    half = max(1, len(values) // 40)
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), MEDIAN_POINTS)).round().astype(np.int64))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))  # symmetric: no lag at the ends
    median = np.array([np.median(values[i - r : i + r + 1]) for i, r in zip(at, reach, strict=True)])
    return at, median, 2 * half + 1
