"""Pictures that a model's folder may carry: synthetic frames only, since no dataset's terms allow showing its images.

What a result says of every image, the distribution of its Dice, is a picture too, and shows no patient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg import plotting
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.evaluation.metrics import pixel_counts, score
from polypseg.evaluation.receipt import Receipt
from polypseg.files import atomic_path
from polypseg.hub.card_facts import DICE_DISTRIBUTIONS, EXAMPLES, PICTURES
from polypseg.inference.model import predict_masks

SIZE = (288, 352)
"""Height and width of the synthetic frames."""
SEED = 7
FRAMES = 8
"""Frames of each camera among which the best, the middle and the worst are found."""


@dataclass(frozen=True, kw_only=True)
class CardPictures:
    """What was written, relative to the model's folder."""

    widgets: tuple[str, ...]
    """Example frames; PICTURES names the mask of each."""
    examples: str
    dice_distributions: str | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A synthetic frame with its true mask, the model's and their Dice."""

    camera: str
    index: int
    frame: Image.Image
    truth: NDArray[np.uint8]
    prediction: NDArray[np.bool_]
    dice: float


def write_card_pictures(
    model: Any, processor: Any, folder: Path, *, name: str, results: Sequence[Receipt] = ()
) -> CardPictures:
    """Draw the pictures of a model's card into its folder.

    ``name``: what the model is called in them; ``results``: its receipts. Takes two times FRAMES forward passes.
    """
    examples = {camera: draw_examples(model, processor, camera=camera) for camera in CAMERAS}
    for (source, (mask, _)), shown in zip(PICTURES.items(), examples.values(), strict=True):
        first = shown[0]  # the same frame for every model, however well it does
        _write_image(first.frame, folder / source)
        _write_image(Image.fromarray(first.prediction.astype(np.uint8) * 255), folder / mask)
    _write_examples(examples, folder / EXAMPLES, name=name)
    return CardPictures(
        widgets=tuple(PICTURES),
        examples=EXAMPLES,
        dice_distributions=_write_distributions(results, folder, name=name),
    )


def draw_examples(model: Any, processor: Any, *, camera: str, count: int = FRAMES) -> list[Example]:
    """``count`` synthetic frames of a camera (``a`` or ``b``) with the model's masks; the same for every model."""
    drawn = [synthesize_frame(CAMERAS[camera], seed=SEED, index=index, size=SIZE) for index in range(count)]
    frames = [Image.fromarray(image) for image, _ in drawn]
    examples = []
    for index, prediction in enumerate(predict_masks(model, processor, frames)):
        truth = drawn[index][1]
        dice = float(score([pixel_counts(prediction, truth.astype(bool))])["dice"][0])
        examples.append(
            Example(camera=camera, index=index, frame=frames[index], truth=truth, prediction=prediction, dice=dice)
        )
    return examples


def _write_image(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def _write_examples(examples: Mapping[str, Sequence[Example]], path: Path, *, name: str) -> None:
    """The best, the middle and the worst frame of each camera, with both outlines."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    columns = ("best", "middle", "worst")
    size = (3.2 * len(columns), 2.7 * len(examples) + 0.3)
    figure, axes = plt.subplots(len(examples), len(columns), figsize=size, squeeze=False, layout="constrained")
    for row, (camera, shown) in enumerate(examples.items()):
        ranked = sorted(shown, key=lambda example: -example.dice)
        chosen = (ranked[0], ranked[len(ranked) // 2], ranked[-1])
        for axis, column, example in zip(axes[row], columns, chosen, strict=True):
            axis.imshow(example.frame)
            for mask, color in ((example.truth, "#00e5ff"), (example.prediction, "#ffd400")):
                if mask.any():
                    axis.contour(mask, levels=[0.5], colors=color, linewidths=1.6)
            axis.set_title(f"{column} of {len(shown)}: Dice {example.dice:.2f}", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(f"camera {camera.upper()}")
    handles = [Line2D([], [], color="#00e5ff", label="true outline"), Line2D([], [], color="#ffd400", label="model")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9, facecolor="0.2", labelcolor="white")
    plotting.add_note(figure, f"{name}. SYNTHETIC frames, drawn by a program: no statement about patients.")
    plotting.save_figure(figure, path, dpi=100)


def _write_distributions(results: Sequence[Receipt], folder: Path, *, name: str) -> str | None:
    """Dice of every image of the results that have more than one; None without such a result."""
    shown = [result for result in results if result.n > 1]
    if not shown:
        return None
    plotting.plot_dice_distributions(
        {name: [result.per_image("dice") for result in shown]},
        labels={name: "this model"},
        titles=[result.dataset.title for result in shown],
        note=f"{name}; one training run.",
        path=folder / DICE_DISTRIBUTIONS,
    )
    return DICE_DISTRIBUTIONS
