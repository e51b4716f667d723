"""The page of an estimate: verdict, differences, the frames with the least expected Dice, what it was learned from."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from polypseg.inference.expected import FLAGS
from polypseg.report.document import render_document
from polypseg.report.figures import draw_differences
from polypseg.report.gallery import QUALITY, SIDE
from polypseg.tables import Column, Table


def render_estimate(
    content: Mapping[str, Any],
    *,
    frames: Sequence[Mapping[str, str]],
    pictures: Sequence[tuple[str, Image.Image]],
    learned: Mapping[str, Any],
) -> str:
    """One HTML document without any reference to another file.

    ``content``: what estimate.json says; ``frames``: the rows of frames.csv; ``pictures``: names and overlays;
    ``learned``: the model's expectation file.
    """
    return render_document(
        "estimate.html.jinja",
        content=content,
        flags=FLAGS,
        table=_table(frames),
        picture=draw_differences(content["differences"]),
        pictures=[(name, _jpeg(image)) for name, image in pictures],
        learned=learned,
        sets=sorted({cell["set"] for cell in learned["learnt_from"]}),
        corruptions=sorted({cell["corruption"] for cell in learned["learnt_from"]} - {"none"}),
    )


def _table(frames: Sequence[Mapping[str, str]]) -> Table:
    ordered = sorted(frames, key=lambda row: (row["expected_dice"] == "", row["expected_dice"], row["name"]))
    columns = [
        Column("Frame", "name", numeric=False),
        Column("Expected Dice", "expected_dice", lambda dice: dice or "–"),
        Column("Flag", "flag", numeric=False),
        Column("Mask's share", "polyp_share", lambda share: f"{100 * float(share):.1f} %"),
    ]
    return Table(name="frames", columns=columns, records=ordered)


def _jpeg(image: Image.Image) -> str:
    factor = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
