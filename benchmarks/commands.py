"""What a person waits for at the shell: a first mask, and ``import polypseg``; each in a process of its own.

OMP_NUM_THREADS=1 python benchmarks/commands.py

Before: the same picture by transformers in torch, as the model card shows; and ``import torch``, without which nothing
of the reference's code can be imported.
"""

import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.cli.console import run_script
from polypseg.files import SAMPLE_FRAMES
from polypseg.provenance.local import STARTER_FOLDER
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

FRAME = SAMPLE_FRAMES / "polypgen_1.jpg"
CARD = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
import polypseg  # in the place of the code that a repository of the Hub brings
frame = Image.open(sys.argv[2]).convert("RGB")
processor = AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil")
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1]).eval()
outputs = model(**processor(images=[frame], return_tensors="pt"))
mask = processor.post_process_semantic_segmentation(outputs, target_sizes=[(frame.height, frame.width)])[0]
Image.fromarray((mask.numpy() * 255).astype("uint8")).save(sys.argv[3])
"""


def run(*arguments: str) -> None:
    """A command in a process of its own; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def rows(*, repeats: int = 5) -> list[Row]:
    """From the shell to the written mask, and to the imported package."""
    with tempfile.TemporaryDirectory() as name:
        mask, numbers = str(Path(name) / "mask.png"), count()
        segment = ("-m", "polypseg_command", "segment", str(FRAME), "--output")
        first = {
            BASELINE: lambda: run("-c", CARD, str(STARTER_FOLDER), str(FRAME), mask),
            "polypseg segment": lambda: run(*segment, f"{name}/{next(numbers)}"),
        }
        imports = {BASELINE: lambda: run("-c", "import torch"), "polypseg": lambda: run("-c", "import polypseg")}
        return [
            *side_by_side("first mask of one picture, from the shell", first, repeats=repeats),
            *side_by_side("import", imports, repeats=repeats),
        ]


def main(repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5) -> None:
    """Time what a person waits for at the shell."""
    neighbors = Neighbors()
    print(show(rows(repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
