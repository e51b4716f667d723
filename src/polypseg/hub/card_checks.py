"""The check that a model's card must pass before a byte is sent to the Hub."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from polypseg.errors import UsageError, first_line
from polypseg.evaluation.receipt_reading import read_results
from polypseg.provenance.license import DISCLAIMER

LICENSE_IDS = frozenset(
    {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "other", "unknown"}
)
"""The Hub's identifiers that models and datasets of this package can have."""
HEADINGS = (
    "Use",
    "Intended use",
    "Where the weights come from",
    "Training data",
    "Fine-tuning",
    "Evaluation",
    "Limits and failures",
    "Compute",
    "License",
    "Citation",
    "Version and checksums",
    "Contact",
)
_FORMER_HEADINGS = {"Licence": "License"}
"""What cards of folders exported before said -> what they say now."""
_FORBIDDEN = {
    r"\bNone\b|\bnan\b|\bNaN\b": "an empty value",
    r"\bTODO\b|\bFIXME\b|More Information Needed": "an unfinished place",
    r"\bhf_[A-Za-z0-9]{16,}": "what looks like an access token",
    r"(?<![\w.:/])/(?:home|root|tmp|work|mnt|media|data|Users|var|opt|srv|scratch|content)/|\b[A-Za-z]:\\|file://": (
        "a path of the machine that it was written on"
    ),
}
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def load_card(path: Path) -> ModelCard:
    """A card from its file. Raises UsageError when the file is missing or its metadata cannot be read."""
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"the card {path} cannot be read: {first_line(error)}. Export the model again") from error


def lint_card(card: ModelCard, *, folder: Path | None = None) -> list[str]:
    """What is wrong with a card, one phrase each; empty when it may be published.

    With ``folder`` (the model folder that the card lies in) pictures must exist and the numbers of the model-index must
    be those of the receipts in ``results``, which must be as they were written.
    """
    text = str(card)
    try:
        metadata = yaml.safe_load(text.split("---", maxsplit=2)[1])
    except (IndexError, ValueError, RecursionError, yaml.YAMLError) as error:
        return [f"its metadata is not valid YAML: {' '.join(str(error).split())}"]
    findings = [*_metadata_findings(metadata or {}), *_text_findings(card.text, whole=text)]
    pictures = [*_IMAGE.findall(card.text), *_widget_files(metadata or {})]
    findings += list(_picture_findings(pictures, folder=folder))
    if folder is not None:
        findings += list(_number_findings(metadata or {}, folder=folder))
    return findings


def _metadata_findings(metadata: Mapping[str, Any]) -> Iterable[str]:
    for key in ("license", "library_name", "pipeline_tag", "tags"):
        if not metadata.get(key):
            yield f"its metadata lacks {key}"
    license = metadata.get("license")
    if license and license not in LICENSE_IDS:
        yield f"license {license!r} is not one of {', '.join(sorted(LICENSE_IDS))}"
    if license == "other" and not (metadata.get("license_name") and metadata.get("license_link")):
        yield "license 'other' needs license_name and license_link"
    if "license_name" in metadata and not re.fullmatch(r"[a-z0-9.+-]+", str(metadata["license_name"])):
        yield "license_name may hold only lower-case letters, digits, '.', '+' and '-'"
    expected = {"library_name": "transformers", "pipeline_tag": "image-segmentation"}
    for key, value in expected.items():
        if metadata.get(key) not in (None, value):
            yield f"{key} is {metadata[key]!r}, not {value!r}"


def _text_findings(body: str, *, whole: str) -> Iterable[str]:
    headings = [_FORMER_HEADINGS.get(h, h) for h in re.findall(r"^## (.+?)\s*$", body, re.MULTILINE)]
    missing = [heading for heading in HEADINGS if heading not in headings]
    if missing:
        yield f"it lacks the section(s) {', '.join(missing)}"
    if DISCLAIMER not in body:
        yield "it does not say that the model is no medical device"
    for pattern, what in _FORBIDDEN.items():
        found = re.search(pattern, whole)
        if found:
            line = 1 + whole.count("\n", 0, found.start())
            yield f"line {line} holds {what}"


def _widget_files(metadata: Mapping[str, Any]) -> list[str]:
    examples = metadata.get("widget") or []
    return [name for example in examples for name in (example["src"], example.get("output", {}).get("url")) if name]


def _picture_findings(pictures: Iterable[str], *, folder: Path | None) -> Iterable[str]:
    for name in pictures:
        if name.startswith("https://"):
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"the picture {name} lies outside the model's folder"
        elif folder is not None and not (folder / name).is_file():
            yield f"the picture {name} does not exist"


def _number_findings(metadata: Mapping[str, Any], *, folder: Path) -> Iterable[str]:
    """Every number of the model-index must be found in the folder's receipts, and these must bear their digests."""
    measured: dict[tuple[str, ...], set[float]] = {}
    for receipt in read_results(folder / "results"):
        if not receipt.is_unchanged:
            yield f"its receipt of {' '.join(receipt.test)} was changed after it was written"
        for metric, value in receipt.stated.items():
            if value.mean is not None:
                measured.setdefault((*receipt.test, metric), set()).add(round(value.mean, 4))
    for model in metadata.get("model-index") or []:
        for entry in model["results"]:
            dataset = entry["dataset"]
            for metric in entry["metrics"]:
                key = (dataset["type"], str(dataset.get("config")), str(dataset.get("split")), metric["type"])
                if metric["value"] not in measured.get(key, set()):
                    number = f"{metric['type']} {metric['value']} on {key[0]}"
                    yield f"the model-index says {number}, which no receipt says"
