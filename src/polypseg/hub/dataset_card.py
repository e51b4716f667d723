"""Cards for prepared copies of datasets, and the guard that keeps what may not be republished off the public Hub.

No dataset is published by this project. Users who push their own prepared copy get a card with terms, source and split
lists; the card goes first, so that no data is ever on the Hub without its terms.
"""

import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import DatasetCard, DatasetCardData

from polypseg import __version__
from polypseg.data.catalog import DatasetSpec, get_spec, is_synthetic, may_be_public, population_of
from polypseg.data.splits import DESCRIPTIONS
from polypseg.errors import UsageError
from polypseg.provenance.license import DISCLAIMER
from polypseg.tables import template_environment

TEMPLATES = Path(__file__).parent / "templates"
"""What cards, the published folder and the Space are made from."""
_log = logging.getLogger(__name__)
_LICENSE_IDS = {"CC BY 4.0": "cc-by-4.0", "Apache-2.0": "apache-2.0"}
_OPEN_TERMS = re.compile(r"(CC BY 4\.0|Apache-2\.0)(?= \(procedural|$)")
"""Terms in the catalog that one of the Hub's identifiers says completely."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@cache
def load_template(name: str) -> jinja2.Template:
    """A template of this folder, strict about names: a missing fact is an error, never an empty place."""
    return template_environment(TEMPLATES, escape=False).get_template(name)


@cache
def load_references() -> dict[str, str]:
    """Key -> BibTeX entry, from references.bib."""
    text = (TEMPLATES / "references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in re.split(r"\n(?=@)", text)]
    return {entry.split("{", maxsplit=1)[1].split(",", maxsplit=1)[0]: entry for entry in entries}


# -- dataset cards ----------------------------------------------------------------------------------------------------


def render_dataset_card(
    spec: DatasetSpec,
    *,
    repo_id: str,
    split: str,
    counts: Mapping[str, int],
    features: Mapping[str, str],
    content_id: str,
) -> DatasetCard:
    """The card of a prepared copy.

    ``counts``: part -> number of images, in order; ``features``: column -> what it holds; ``content_id``: identity of
    the content (``PolypDataset.content_id``).
    """
    total = sum(counts.values())
    identifier, name, link = license_of(spec)
    population = population_of(spec)
    data = DatasetCardData(
        license=identifier,
        license_name=name,
        license_link=link,
        pretty_name=f"{spec.title}, prepared copy ({split} split)",
        task_categories=["image-segmentation"],
        size_categories=[next((label for limit, label in _SIZES if total < limit), "n>1M")],
        tags=["medical", "endoscopy", "colonoscopy", "polyp-segmentation", spec.name.replace("_", "-")],
    )
    body = load_template("dataset_card.md.jinja").render(
        spec=spec,
        repo_id=repo_id,
        split=split,
        split_meaning=DESCRIPTIONS.get(split, "see the package's split lists"),
        counts=counts,
        total=total,
        complete=spec.count is None or total == spec.count,
        features=features,
        content_id=content_id,
        synthetic=is_synthetic(spec),
        population=population,
        public=may_be_public(spec),
        disclaimer=DISCLAIMER,
        reference=load_references().get(population.reference, ""),
        version=__version__,
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def license_of(spec: DatasetSpec) -> tuple[str, str | None, str | None]:
    """The Hub's ``license``, ``license_name`` and ``license_link`` of a dataset's terms.

    Only terms that an identifier says completely get that identifier; all others are ``other``.
    """
    terms = _OPEN_TERMS.match(spec.license)
    if terms and may_be_public(spec):
        return _LICENSE_IDS[terms.group(1)], None, None
    if not spec.homepage:
        return "unknown", None, None
    return "other", f"{spec.name.replace('_', '-')}-terms", spec.homepage


def check_may_upload(spec: DatasetSpec, *, private: bool, override: bool = False) -> None:
    """Refuse to publish what may not be republished; ``override`` is for who has the owners' written permission.

    A private copy is allowed and logged as a warning. Raises UsageError that states the terms.
    """
    if may_be_public(spec):
        return
    terms = f"{spec.title} is not this package's to give away. Its terms: {spec.license}"
    if spec.homepage:
        terms += f" ({spec.homepage})"
    if not private and not override:
        raise UsageError(
            f"{terms}. A public copy is refused: push it as private, or, with the owners' written permission to "
            "publish, override this explicitly"
        )
    kind = (
        "A private copy on a server abroad can be a transfer too" if private else "You override this for a public copy"
    )
    _log.warning("%s. %s: whether the terms allow it is yours to answer for.", terms, kind)


def push_dataset(
    dataset_name: str,
    repo_id: str,
    *,
    source: Path | None = None,
    split: str = "reference",
    private: bool = True,
    override: bool = False,
    allow_partial: bool = False,
    mask_values: str | None = None,
    token: str | None = None,
) -> str:
    """Push a prepared copy of a dataset with its card and return the commit of the data.

    ``source``: folder or archive, else the data folder is searched; ``override`` as in ``check_may_upload``. Raises
    UsageError before anything is sent when the terms forbid it, or when ``private`` is asked for and the repository
    exists as a public one; PolypSegError when the Hub cannot be reached or refuses.
    """
    from polypseg.data.polyps import open_dataset
    from polypseg.provenance.fetch import hub_api, hub_errors

    spec = get_spec(dataset_name)
    check_may_upload(spec, private=private, override=override)
    opened = open_dataset(dataset_name, source=source, allow_partial=allow_partial, mask_values=mask_values)
    prepared = opened.load(split=split)
    columns = next(iter(prepared.values())).features
    card = render_dataset_card(
        spec,
        repo_id=repo_id,
        split=split,
        counts={part: len(rows) for part, rows in prepared.items()},
        features={name: _describe_column(name, opened.mask_values) for name in columns},
        content_id=opened.content_id,
    )
    lists = {part: list(rows["id"]) for part, rows in prepared.items()}
    api = hub_api(token=token)
    with hub_errors(repo_id):
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.dataset_info(repo_id).private:
            raise UsageError(f"{repo_id} exists and is public: choose another name, or make it private first")
        files = {"README.md": str(card), "split.json": json.dumps(lists, indent=1) + "\n"}
        for name, text in files.items():
            api.upload_file(
                path_or_fileobj=text.encode(),
                path_in_repo=name,
                repo_id=repo_id,
                repo_type="dataset",
                commit_message=f"Add {name}",
            )
        # datasets adds its own metadata (columns, parts, files) to the card that it finds.
        commit = prepared.push_to_hub(repo_id, private=private, token=token)
    return str(commit.oid)


def _describe_column(name: str, mask_values: object = None) -> str:
    coding = f"{mask_values} are polyp" if mask_values else "thresholded above 127"
    known = {
        "id": "the published file name without its suffix",
        "image": "the frame, RGB, as published",
        "mask": f"PNG of the frame's size; 0 is background, 1 is polyp (published masks: {coding})",
        "sequence_id": "the video clip that the frame belongs to",
        "centre": "the center that contributed the frame",
        "class": "the published class",
    }
    return known.get(name, "a column of the dataset")
