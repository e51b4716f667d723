"""What a receipt says, read for tables, cards and the report."""

from collections.abc import Iterable
from pathlib import Path

from polypseg.errors import UsageError
from polypseg.evaluation.receipt import CONVENTION, SUFFIX, FalseAlarms, Receipt, Score, find_receipts
from polypseg.files import write_json
from polypseg.inference.quality import FILE
from polypseg.tables import with_bounds

LIMITS = {
    "first": ", only the first {count}",
    "partial": ", only the {count} at hand",
    "unseen": ", only the {count} not seen",
}
"""How the name of a part ends that was not tested as a whole (see data.polyps and passport) -> what it means."""


def read_results(folder: Path) -> tuple[Receipt, ...]:
    """The receipts in a folder and below it that are of a model and score by CONVENTION at 0.5, by path.

    Raises PolypSegError for a damaged receipt.
    """
    found = find_receipts(folder).values()
    return tuple(
        receipt
        for receipt in found
        if receipt.model and CONVENTION in receipt.scores_by_cluster and receipt.operating_point is None
    )


def no_results(folder: Path) -> UsageError:
    """The error for a folder without such receipts."""
    return UsageError(
        f"no receipts (*{SUFFIX}) of a model by the convention {CONVENTION!r} in {folder}, and result files of another "
        "format are not read: run training_scripts/evaluate.py or `polypseg evaluate` first"
    )


def cell_of(value: Score) -> str:
    """``mean [low, high]`` of one of a receipt's scores, for a table."""
    assert value.mean is not None, "of images that define the score"
    return with_bounds(value.mean, value.low, value.high)


def tested_on(receipt: Receipt) -> str:
    """The dataset, and which part of it where it is not tested as a whole."""
    dataset = receipt.dataset
    return dataset.title if dataset.split == "full" else f"{dataset.title}, {dataset.split} {dataset.part} part"


def size_of(receipt: Receipt) -> str:
    """How many images a receipt is of, and what they weigh for the mean Dice where clips are known."""
    if not receipt.dataset.clips_known:
        return str(receipt.n)
    dice = receipt.stated["dice"]
    return f"{receipt.n} in {dice.clusters} clips (effective n {dice.effective_size:.0f})"


def alarm_words(alarms: FalseAlarms) -> str:
    """How often a region is marked on frames without polyp."""
    rate = alarms.per_100_frames
    return (
        f"{rate.mean:.1f} per 100 frames [{rate.low:.1f}, {rate.high:.1f}], counting every region "
        f"of at least {alarms.minimal_area_pixels} pixel(s)"
    )


def seen_words(receipt: Receipt) -> str:
    """What a receipt says of whether the model saw the tested images."""
    collisions, seen = receipt.collisions, receipt.seen
    if collisions is None:
        return f"not checked against what the model saw: {seen.reason}"
    kinds = ", ".join(f"{kind}: {count}" for kind, count in collisions.kinds.items() if count)
    found = f"{collisions.colliding} of {collisions.tested} images collide with what the model saw"
    words = f"{found} ({kinds})" if kinds else found
    words += f"; {len(seen.excluded)} were left out" if seen.excluded else ""
    return words + "".join(f"; not checked, as not listed: {stage}" for stage in collisions.unchecked)


def write_quality(folder: Path, receipts: Iterable[Receipt]) -> Path | None:
    """Write ``quality.json``, which `segment`, overlays and the app show, from receipts; None where they say nothing.

    Of a set that was tested twice the larger test counts; synthetic frames are left out.
    """
    tests: dict[str, Receipt] = {}
    for receipt in sorted(receipts, key=lambda receipt: receipt.n):
        if not receipt.dataset.synthetic and receipt.plain_dice is not None:
            tests[receipt.dataset.title] = receipt
    if not tests:
        return None
    dice = {title: receipt.stated["dice"] for title, receipt in sorted(tests.items(), reverse=True)}
    long = "; ".join(f"{cell_of(value)} on {title} (n = {size_of(tests[title])})" for title, value in dice.items())
    short = ", ".join(f"{value.mean:.2f} {title}" for title, value in dice.items())
    return write_json(folder / FILE, {"words": f"mean Dice {long}", "short": f"mean Dice {short}"})
