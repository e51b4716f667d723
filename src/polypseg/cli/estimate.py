"""Commands about quality on a hospital's own frames: estimate it without labels, calibrate or adapt with few."""

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
    most_alarms: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="Best Dice on frames with polyps where at most this share of those without raises an alarm; try 0.1. "
            "Default: best mean of both.",
        ),
    ] = None,
    output: Annotated[Path, Option(help="File to write.")] = Path("operating_point.json"),
) -> None:
    """Choose threshold, temperature, minimum area and peak on labeled frames; keep the default if none is better."""
    from polypseg.expectation.calibrate import calibrate_files
    from polypseg.inference.segmenter import load
    from polypseg.provenance.local import local_folder

    segmenter = load(model, runtime=runtime)
    found = calibrate_files(
        segmenter, frames, masks, output, folder=local_folder(model), clip=clip, most_alarms=most_alarms
    )
    print("\n".join(found.lines()))
    print(f"{output}: for `polypseg segment` and `polypseg evaluate` with --operating-point, and for polypseg.load")


def adapt(
    frames: Annotated[
        str, Argument(help="Folder or archive of frames; without masks also a video, or DATASET[.SPLIT.PART].")
    ],
    masks: Annotated[Path | None, Argument(help="Folder or archive of their masks, paired by name.")] = None,
    model: ModelOption = "starter",
    clip: Annotated[
        str | None,
        Option(help="With masks: which frames are of one clip: a regular expression such as '(.*)_[0-9]+'."),
    ] = None,
    limit: Annotated[int | None, Option(min=30, help="Without masks: most frames that are looked at.")] = None,
    output: Annotated[Path, Option(help="The adapted model's folder: a new one.")] = Path("adapted"),
) -> None:
    """Adapt a model to a hospital's own frames; write it only if a gain is shown, else only what was tried."""
    from polypseg.errors import UsageError

    if masks is None and clip is not None:
        raise UsageError("--clip says which masks are of one clip: give the folder of masks, or leave it out")
    if masks is not None and limit is not None:
        raise UsageError("--limit is for frames without masks: with masks all frames are used")
    from polypseg.expectation.adapt import RECORD, adapt_files
    from polypseg.expectation.frames import LIMIT
    from polypseg.inference.model_folder import named_folder

    found = adapt_files(named_folder(model), frames, masks, output, clip=clip, limit=limit or LIMIT)
    print("\n".join(found.lines()))
    if found.model is None:
        print(f"what was tried: {output / RECORD}")
    else:
        print(f"{output}: for --model of `polypseg segment` and `polypseg evaluate`, and for polypseg.load")
