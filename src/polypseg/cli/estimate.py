"""Commands about quality on a hospital's own frames: estimate it without labels, calibrate it with few."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from polypseg.cli.predict import ModelOption, RuntimeOption


def estimate(
    frames: Annotated[
        list[str],
        Argument(help="Images, folders, globs, videos, or a dataset as DATASET[.SPLIT.PART]; no masks needed."),
    ],
    model: ModelOption = "starter",
    runtime: RuntimeOption = "auto",
    limit: Annotated[int, Option(min=30, help="Most frames that are looked at.")] = 200,
    output: Annotated[Path, Option(help="Folder of estimate.json, estimate.html and frames.csv.")] = Path("estimate"),
) -> None:
    """Say what mean Dice to expect on frames without masks, with a 90 % interval, and what not to rely on."""
    from polypseg.errors import PolypSegError
    from polypseg.expectation.estimate import estimate_files
    from polypseg.files import sole_writer
    from polypseg.inference.segmenter import load
    from polypseg.provenance.local import local_folder

    segmenter = load(model, runtime=runtime)
    with sole_writer(output):
        found = estimate_files(segmenter, frames, output, folder=local_folder(model), limit=limit)
    print("\n".join(found.verdict))
    print(f"page, numbers and every frame: {output / 'estimate.html'}, estimate.json, frames.csv")
    if found.refused:
        raise PolypSegError(f"no estimate: {found.refused}")


def calibrate(
    frames: Annotated[Path, Argument(help="Folder or archive of frames.")],
    masks: Annotated[Path, Argument(help="Folder or archive of their masks, paired by name.")],
    model: ModelOption = "starter",
    runtime: RuntimeOption = "auto",
    clip: Annotated[
        str | None, Option(help="Which frames are of one clip: a regular expression such as '(.*)_[0-9]+'.")
    ] = None,
    output: Annotated[Path, Option(help="File to write.")] = Path("operating_point.json"),
) -> None:
    """Choose threshold, temperature and minimum area on labelled frames; keep the default if none is better."""
    from polypseg.expectation.calibrate import calibrate_files
    from polypseg.inference.segmenter import load
    from polypseg.provenance.local import local_folder

    segmenter = load(model, runtime=runtime)
    found = calibrate_files(segmenter, frames, masks, output, folder=local_folder(model), clip=clip)
    print("\n".join(found.lines()))
    print(f"{output}: for `polypseg segment` and `polypseg evaluate` with --operating-point, and for polypseg.load")
