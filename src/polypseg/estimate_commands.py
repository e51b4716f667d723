"""Commands about quality on a hospital's own frames: estimate it without labels."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from polypseg.use_commands import ModelOption, RuntimeOption


def estimate(
    frames: Annotated[
        list[str], Argument(help="Images, folders, globs, videos, or a dataset as DATASET[.SPLIT.PART]; no masks needed.")
    ],
    model: ModelOption = "starter",
    runtime: RuntimeOption = "auto",
    limit: Annotated[int, Option(min=30, help="Most frames that are looked at.")] = 200,
    output: Annotated[Path, Option(help="Folder of estimate.json, estimate.html and frames.csv.")] = Path("estimate"),
) -> None:
    """Say what mean Dice to expect on frames without masks, with a 90 % interval, and what not to rely on."""
    from polypseg.artifacts import sole_writer
    from polypseg.errors import PolypSegError
    from polypseg.expectation.estimate import estimate_files
    from polypseg.provenance.local import local_folder
    from polypseg.segmentation import load

    segmenter = load(model, runtime=runtime)
    with sole_writer(output):
        found = estimate_files(segmenter, frames, output, folder=local_folder(model), limit=limit)
    print("\n".join(found.verdict))
    print(f"page, numbers and every frame: {output / 'estimate.html'}, estimate.json, frames.csv")
    if found.refused:
        raise PolypSegError(f"no estimate: {found.refused}")
