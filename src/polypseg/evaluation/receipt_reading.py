"""What a receipt says, read for tables, cards and the report."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polypseg.errors import UsageError
from polypseg.evaluation.receipt import SUFFIX, find_receipts
from polypseg.files import write_json
from polypseg.inference.quality import FILE

Test = tuple[str, str, str]
"""Dataset, split and part."""


CONVENTION = "paper"
"""Whose scores cards, tables and the model-index show."""


LIMITS = {
    "first": ", only the first {count}",
    "partial": ", only the {count} at hand",
    "unseen": ", only the {count} not seen",
}
"""How the name of a part ends that was not tested as a whole (see data.polyps and passport) -> what it means."""


def read_results(folder: Path) -> tuple[dict[str, Any], ...]:
    """Contents of the receipts in a folder and below it that are of a model and score by CONVENTION, by path.

    Raises PolypSegError for a damaged receipt.
    """
    found = find_receipts(folder).values()
    return tuple(content for content in found if content["model"] and CONVENTION in content["scores_by_cluster"])


def no_results(folder: Path) -> UsageError:
    """The error for a folder without such receipts."""
    return UsageError(
        f"no receipts (*{SUFFIX}) of a model by the convention {CONVENTION!r} in {folder}, and result files of another "
        "format are not read: run training_scripts/evaluate.py or `polypseg evaluate` first"
    )


def test_of(result: Mapping[str, Any]) -> Test:
    """Dataset, split and part of a receipt's content."""
    dataset = result["dataset"]
    return dataset["name"], dataset["split"], dataset["part"]


def scores_of(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """metric -> mean with its interval by cluster, by CONVENTION, of a receipt's content."""
    scores: Mapping[str, Mapping[str, Any]] = result["scores_by_cluster"][CONVENTION]
    return scores


def cell_of(value: Mapping[str, Any]) -> str:
    """``mean [low, high]`` of one of a receipt's scores, for a table."""
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{interval}"


def size_of(result: Mapping[str, Any]) -> str:
    """How many images a receipt is of, and what they weigh for the mean Dice where clips are known."""
    if not result["dataset"]["clips_known"]:
        return str(result["n"])
    dice = scores_of(result)["dice"]
    return f"{result['n']} in {dice['clusters']} clips (effective n {dice['effective_size']:.0f})"


def seen_words(result: Mapping[str, Any]) -> str:
    """What a receipt says of whether the model saw the tested images."""
    collisions = result["collisions"]
    if collisions is None:
        return f"not checked against what the model saw: {result['seen']['reason']}"
    kinds = ", ".join(f"{kind}: {count}" for kind, count in collisions["kinds"].items() if count)
    found = f"{collisions['colliding']} of {collisions['tested']} images collide with what the model saw"
    words = f"{found} ({kinds})" if kinds else found
    words += f"; {len(result['seen']['excluded'])} were left out" if result["seen"]["excluded"] else ""
    return words + "".join(f"; not checked, as not listed: {stage}" for stage in collisions["unchecked"])


def write_quality(folder: Path, contents: Iterable[Mapping[str, Any]]) -> Path | None:
    """Write ``quality.json``, which `segment`, overlays and the app show, from receipts; None where they say nothing.

    Of a set that was tested twice the larger test counts; synthetic frames are left out.
    """
    tests: dict[str, Mapping[str, Any]] = {}
    for content in sorted(contents, key=lambda content: int(content["n"])):
        real = not content["dataset"]["synthetic"] and CONVENTION in content["scores_by_cluster"]
        if real and scores_of(content)["dice"]["mean"] is not None and content["dataset"]["name"] != "negatives":
            tests[content["dataset"]["title"]] = content
    if not tests:
        return None
    dice = {title: scores_of(content)["dice"] for title, content in sorted(tests.items(), reverse=True)}
    long = "; ".join(f"{cell_of(value)} on {title} (n = {size_of(tests[title])})" for title, value in dice.items())
    short = ", ".join(f"{value['mean']:.2f} {title}" for title, value in dice.items())
    return write_json(folder / FILE, {"words": f"mean Dice {long}", "short": f"mean Dice {short}"})
