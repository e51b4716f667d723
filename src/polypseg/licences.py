"""The licence that a model carries: what its pretraining weights, its conversion and its training data impose.

Not legal advice: the chain names each link and where it is stated, so that a reader can check it.
"""

from dataclasses import dataclass
from typing import Any

from polypseg.data.catalog import DATASETS
from polypseg.origin import Origin
from polypseg.zoo import RANDOM, STARTER

UNKNOWN = "unknown"
"""The Hub's identifier for a licence that nobody has stated."""
MODELS_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
SSL4GIE = "https://github.com/ESandML/SSL4GIE"
APACHE_2 = "https://www.apache.org/licenses/LICENSE-2.0"
_LINKS = {
    "cc-by-nc-4.0": "https://creativecommons.org/licenses/by-nc/4.0/",
    "cc-by-nc-sa-4.0": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "mit": "https://opensource.org/license/mit",
    "bsd-3-clause": "https://opensource.org/license/bsd-3-clause",
    "apache-2.0": APACHE_2,
}
"""Licences that say by themselves what may be done; all are identifiers of the Hub's list."""


@dataclass(frozen=True, kw_only=True)
class ModelLicense:
    """What a model's card says of its licence."""

    identifier: str
    """The Hub's ``license``: one of its identifiers, or ``other``."""
    name: str | None
    """The Hub's ``license_name`` where the identifier is ``other``."""
    link: str
    """Where the terms are written."""
    commercial_use: bool
    """Whether any link of the chain leaves commercial use open."""
    chain: tuple[str, ...]
    """The links, one sentence each, from code to result."""


def model_license(origin: Origin) -> ModelLicense:
    """The licence of a model from where its weights come from.

    Weights converted from the reference's files keep their CC BY-NC-SA 4.0. Published non-commercial pretraining
    weights (MoCo v3, MAE, everything from Hyperkvasir) make the model CC BY-NC 4.0. Otherwise the weights' own licence
    is permissive, but the training images are for research and education only, which no identifier says: ``other``.
    """
    chain = ["Code: Apache-2.0 (this package)."]
    if origin.kind == "converted":
        chain += [
            f"Weights: CC BY-NC-SA 4.0, as the authors of SSL4GIE publish their fine-tuned models ({SSL4GIE}).",
            "Result: CC BY-NC-SA 4.0; share alike, no commercial use.",
        ]
        return _plain("cc-by-nc-sa-4.0", chain, commercial_use=False)
    weights, sentence = _encoder_license(origin)
    chain.append(sentence)
    data = _data_terms(origin)
    if data:
        chain.append(f"Training images: {data['title']}, {data['terms']}.")
    if weights == UNKNOWN:
        chain.append("Result: not known; ask the publisher before any use.")
        return ModelLicense(identifier=UNKNOWN, name=None, link=MODELS_PAGE, commercial_use=False, chain=tuple(chain))
    if "-nc" in weights:
        chain.append(f"Result: {weights}, no commercial use.")
        return _plain(weights, chain, commercial_use=False)
    if not data or data["open"]:
        chain.append(f"Result: {weights}.")
        return _plain(weights, chain, commercial_use=True)
    chain.append(
        f"Result: the weights may be used as {weights} allows, within the terms of {data['title']}; whether a model is "
        "bound by its training images' terms is not settled, so treat it as for research and education only."
    )
    return ModelLicense(
        identifier="other",
        name=f"{weights}-and-{data['name'].replace('_', '-')}-terms",
        link=data["homepage"],
        commercial_use=False,
        chain=tuple(chain),
    )


def _plain(identifier: str, chain: list[str], *, commercial_use: bool) -> ModelLicense:
    return ModelLicense(
        identifier=identifier, name=None, link=_LINKS[identifier], commercial_use=commercial_use, chain=tuple(chain)
    )


def _encoder_license(origin: Origin) -> tuple[str, str]:
    """The licence that the encoder's start imposes, and the sentence that says so."""
    start, own = origin.record.get("encoder_initialisation"), origin.record.get("pretraining")
    if start == RANDOM:
        return "apache-2.0", "Pretraining weights: none, the encoder started at random."
    if own:
        corpus = own.get("source", "frames of their own")
        return "apache-2.0", f"Pretraining weights: made by the publisher on {corpus}, whose terms apply to them."
    if start == STARTER:
        return "apache-2.0", f"Pretraining weights: {start}, Apache-2.0 (LICENSE of the package that carries them)."
    if start is not None and origin.record.get("scale") != "full":
        stated = _timm_license(start) if start.startswith("timm:") else None
        return stated or UNKNOWN, f"Pretraining weights: {start}; licence {stated or 'not known here'}."
    if start is None or origin.entry is None:
        return UNKNOWN, f"Pretraining weights: {start or 'not recorded'}; their licence is not known here."
    upstream = origin.entry.upstream
    return upstream.license, f"Pretraining weights: {upstream.license}, stated at {upstream.license_source}."


def _timm_license(start: str) -> str | None:
    """The licence that timm records of ``timm:<name>.<tag>``; None for none, or for one without a link here."""
    import timm

    facts = timm.get_pretrained_cfg(start.removeprefix("timm:"), allow_unregistered=True)
    stated = str(getattr(facts, "license", None) or "")
    return stated if stated in _LINKS else None


def _data_terms(origin: Origin) -> dict[str, Any]:
    """Title, terms and homepage of the set that the model was fine-tuned on; {} for none."""
    name = str(origin.record.get("finetuned_on", "")).split(" ", maxsplit=1)[0]
    spec = DATASETS.get(name)
    if spec is None:
        return {}
    synthetic = name.startswith("synthetic_")
    return {
        "name": spec.name,
        "title": spec.title,
        "terms": spec.license,
        "homepage": spec.homepage or APACHE_2,
        "open": spec.may_be_republished or synthetic,
    }
