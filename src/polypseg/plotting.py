"""The study's figures, drawn from results that already exist."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.files import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OVERLAY = 2.8
"""Inches of a frame's side in the picture of overlays: 336 pixels, in which an outline can be judged."""
CNN_COLOR, VIT_COLOR = "#1f77b4", "#d95f02"


def family_color(model_id: str) -> str:
    """Blue for convolutional models, orange for transformers, in every figure."""
    return VIT_COLOR if model_id.startswith("vit") else CNN_COLOR


def save_figure(figure: "plt.Figure", path: Path, *, dpi: int = 120) -> Path:
    """Write the figure as PNG in one step, close it, return the path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight", format="png")
    plt.close(figure)
    return path


def add_note(figure: "plt.Figure", note: str) -> None:
    """The caveat, a fixed distance below the axes whatever the figure's height, wrapped to its width."""
    lines = textwrap.fill(note, width=max(40, int(15 * figure.get_figwidth())))
    figure.text(0.5, -0.25 / figure.get_figheight(), lines, ha="center", va="top", fontsize=8, color="0.3")


def plot_dice_distributions(
    scores: Mapping[str, Sequence[NDArray[np.float64]]],
    *,
    labels: dict[str, str],
    titles: Sequence[str],
    note: str,
    path: Path,
) -> Path:
    """Instance-wise Dice of every model (rows) on each dataset (columns): violin, every image as a dot, mean as a bar.

    scores: model id -> one array of per-image Dice a dataset.
    """
    names = list(scores)
    figure, axes = plt.subplots(
        1, len(titles), figsize=(5.5 * len(titles), 0.55 * len(names) + 1.6), sharey=True, squeeze=False
    )
    for column, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        values = [scores[name][column] for name in names]
        violins = axis.violinplot(values, orientation="horizontal", showextrema=False, widths=0.85)
        for body, name in zip(violins["bodies"], names, strict=True):
            body.set_facecolor(family_color(name))
        jitter = np.random.default_rng(0)
        for row, value in enumerate(values, start=1):
            axis.plot(value, row + jitter.uniform(-0.12, 0.12, len(value)), ".", ms=2, color="0.3", alpha=0.4)
            axis.plot([value.mean()] * 2, [row - 0.35, row + 0.35], color="black", lw=1.5)
        axis.set_title(f"{title} (n = {len(values[0])})")
        axis.set_xlabel("Dice of an image")
        axis.set_xlim(-0.02, 1.02)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(1, len(names) + 1), [labels[name] for name in names])
    axes[0][0].invert_yaxis()
    add_note(figure, note)
    return save_figure(figure, path)


def plot_learning_curve(
    *, loss: Sequence[float], dice: Sequence[float], rates: Sequence[float], title: str, note: str, path: Path
) -> Path:
    """A run by epoch: training loss and mean validation Dice, with the learning rate on a logarithmic scale below."""
    epochs = range(1, len(loss) + 1)
    figure, (axis, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(4, 1))
    axis.plot(epochs, loss, color="0.5", lw=1, label="training loss")
    axis.plot(epochs, dice, color=CNN_COLOR, lw=1.5, label="validation Dice")
    best = int(np.argmax(dice))
    axis.plot(best + 1, dice[best], "o", color="black", ms=5, label=f"best: {dice[best]:.3f} after epoch {best + 1}")
    axis.set_ylim(0, 1)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", frameon=False)
    below.step(epochs, rates, color="0.3", where="mid")
    below.set_yscale("log")
    below.set_ylim(min(rates) / 3, 3 * max(rates))
    below.minorticks_off()
    below.set_ylabel("learning rate")
    below.set_xlabel("epoch")
    below.grid(alpha=0.3)
    add_note(figure, note)
    return save_figure(figure, path)


def plot_rank_changes(
    ranks: dict[str, tuple[int, int]], *, labels: dict[str, str], titles: Sequence[str], note: str, path: Path
) -> Path:
    """Rank by mean Dice in distribution (left) and out of distribution (right), one line a model; 1 is best."""
    figure, axis = plt.subplots(figsize=(6, 0.42 * len(ranks) + 1.4))
    for name, (inside, outside) in ranks.items():
        axis.plot([0, 1], [inside, outside], "o-", color=family_color(name), lw=1.8)
        axis.text(-0.04, inside, f"{labels[name]}  {inside}", ha="right", va="center", fontsize=9)
        axis.text(1.04, outside, f"{outside}  {labels[name]}", ha="left", va="center", fontsize=9)
    axis.set_xticks([0, 1], list(titles))
    axis.set_xlim(-0.45, 1.45)
    axis.invert_yaxis()
    axis.set_yticks([])
    axis.set_title("Rank by mean Dice")
    for side in ("left", "right", "top", "bottom"):
        axis.spines[side].set_visible(False)
    add_note(figure, note)
    return save_figure(figure, path)


def plot_overlays(
    frames: Sequence[Image.Image],
    truths: Sequence[NDArray[np.uint8]],
    predictions: Mapping[str, Sequence[NDArray[np.bool_]]],
    *,
    captions: Sequence[str],
    note: str,
    path: Path,
) -> Path:
    """Rows: frames; columns: the frame, then each model's mask (filled) with the true outline (line) on the frame."""
    columns = ["frame", *predictions]
    figure, axes = plt.subplots(
        len(frames), len(columns), figsize=(OVERLAY * len(columns), OVERLAY * len(frames) + 0.4), squeeze=False
    )
    for row, (frame, truth) in enumerate(zip(frames, truths, strict=True)):
        for column, name in enumerate(columns):
            axis = axes[row][column]
            axis.imshow(frame)
            if truth.any():
                axis.contour(truth, levels=[0.5], colors="#00e5ff", linewidths=1)
            if name != "frame":
                mask = predictions[name][row]
                axis.imshow(np.ma.masked_equal(mask, 0), cmap="spring", alpha=0.45, vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=11)
        axes[row][0].set_ylabel(captions[row], fontsize=10)
    add_note(figure, note)
    return save_figure(figure, path)
