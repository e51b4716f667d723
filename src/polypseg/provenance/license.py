"""The license that a model carries: what its pretraining weights, its conversion and its training data impose.

Not legal advice: the chain names each link and where it is stated, so that a reader can check it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polypseg import zoo
from polypseg.data.catalog import DATASETS, DatasetSpec, is_synthetic
from polypseg.errors import UsageError
from polypseg.provenance.local import CONFIG, local_folder
from polypseg.provenance.origin import WeightsOrigin
from polypseg.zoo import RANDOM, STARTERS

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

UNKNOWN = "unknown"
"""The Hub's identifier for a license that nobody has stated."""
MODELS_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
SSL4GIE = "https://github.com/ESandML/SSL4GIE"
APACHE_2 = "https://www.apache.org/licenses/LICENSE-2.0"


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """A license in plain English, for whoever uses or passes on the weights."""

    link: str
    may: tuple[str, ...]
    must: tuple[str, ...]
    may_not: tuple[str, ...] = ()


_ANY_USE = ("use, change and share the weights for any purpose",)
_NO_COMMERCE = "use them primarily for commercial advantage or monetary compensation"
_CREDIT = "name the authors of the weights, link to the license and say what you changed"
_TERMS = {
    "cc-by-nc-4.0": _Terms(
        link="https://creativecommons.org/licenses/by-nc/4.0/",
        may=("use, change and share the weights for purposes that are not commercial",),
        must=(_CREDIT,),
        may_not=(_NO_COMMERCE, "put further legal or technical restrictions on them"),
    ),
    "cc-by-nc-sa-4.0": _Terms(
        link="https://creativecommons.org/licenses/by-nc-sa/4.0/",
        may=("use, change and share the weights for purposes that are not commercial",),
        must=(_CREDIT, "share what you make of them under the same license"),
        may_not=(_NO_COMMERCE, "put further legal or technical restrictions on them"),
    ),
    "mit": _Terms(
        link="https://opensource.org/license/mit",
        may=_ANY_USE,
        must=("pass on the copyright notice and the license's text with the weights",),
    ),
    "bsd-3-clause": _Terms(
        link="https://opensource.org/license/bsd-3-clause",
        may=_ANY_USE,
        must=("pass on the copyright notice and the license's text with the weights",),
        may_not=("advertise with the names of the weights' authors",),
    ),
    "apache-2.0": _Terms(
        link=APACHE_2,
        may=_ANY_USE,
        must=("pass on the license's text and notices with the weights, and mark what you changed",),
        may_not=("use the authors' trademarks",),
    ),
}
"""Licenses that say by themselves what may be done; all are identifiers of the Hub's list."""


@dataclass(frozen=True, kw_only=True)
class ModelLicense:
    """What a model's card says of its license."""

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
    weights: str
    """License of the weights by themselves, without the images' terms."""
    images: tuple[DatasetSpec, ...] = ()
    """The known sets that the weights were made from, fine-tuning first."""

    @property
    def may(self) -> tuple[str, ...]:
        """What you may do, each to follow "You may"."""
        if self.weights == UNKNOWN:
            return ()
        if any(not _is_open(spec) for spec in self.images):
            return ("use, change and share the weights for research and education",)
        return _TERMS[self.weights].may

    @property
    def must(self) -> tuple[str, ...]:
        """What you owe when you do it, each to follow "You must"."""
        if self.weights == UNKNOWN:
            return ("ask the publisher of the weights for their terms before any use",)
        cited = [f"cite {spec.title}: {spec.citation}" for spec in self.images if spec.citation]
        return (*_TERMS[self.weights].must, *cited)

    @property
    def may_not(self) -> tuple[str, ...]:
        """What you may not do, each to follow "You may not"."""
        if self.weights == UNKNOWN:
            return ("use, change or share the weights: nobody has said that you may",)
        closed = [f"go beyond the terms of {spec.title}: {spec.license}" for spec in self.images if not _is_open(spec)]
        return (*_TERMS[self.weights].may_not, *closed)

    @property
    def links(self) -> tuple[str, ...]:
        """Where every term is written: the result's, the weights' and the images'."""
        weights = [] if self.weights == UNKNOWN else [_TERMS[self.weights].link]
        images = [spec.homepage for spec in self.images if spec.homepage]
        return tuple(dict.fromkeys([self.link, *weights, *images]))


def model_license(origin: WeightsOrigin) -> ModelLicense:
    """The license of a model from where its weights come from.

    Weights converted from the reference's files keep their CC BY-NC-SA 4.0. Published non-commercial pretraining
    weights (MoCo v3, MAE, everything from Hyperkvasir) make the model CC BY-NC 4.0. Otherwise the weights' own license
    is permissive, but the images of fine-tuning, and those of a pretraining of one's own, may be for research and
    education only, which no identifier says: ``other``.
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
    corpus, data = _own_corpus(origin), _finetuning_set(origin)
    chain += [f"Pretraining images: {corpus.title}, {corpus.license}."] if corpus else []
    chain += [f"Training images: {data.title}, {data.license}."] if data else []
    chain += ["Adapted to frames of the publisher, whose terms are not recorded."] if origin.adapted else []
    images = tuple({spec.name: spec for spec in (data, corpus) if spec}.values())
    bound = [spec for spec in images if not _is_open(spec)]
    if weights == UNKNOWN:
        chain.append("Result: not known; ask the publisher before any use.")
        return ModelLicense(
            identifier=UNKNOWN,
            name=None,
            link=MODELS_PAGE,
            commercial_use=False,
            chain=tuple(chain),
            weights=UNKNOWN,
            images=images,
        )
    if "-nc" in weights:
        chain.append(f"Result: {weights}, no commercial use.")
        return _plain(weights, chain, commercial_use=False, images=images)
    if not bound:
        chain.append(f"Result: {weights}.")
        return _plain(weights, chain, commercial_use=True, images=images)
    chain.append(
        f"Result: the weights may be used as {weights} allows, within the terms of "
        f"{' and '.join(spec.title for spec in bound)}; whether a model is "
        "bound by its training images' terms is not settled, so treat it as for research and education only."
    )
    return ModelLicense(
        identifier="other",
        name=f"{'-and-'.join([weights, *(spec.name.replace('_', '-') for spec in bound)])}-terms",
        link=bound[0].homepage or APACHE_2,
        commercial_use=False,
        chain=tuple(chain),
        weights=weights,
        images=images,
    )


def license_contradictions(origin: WeightsOrigin, card: "ModelCard", config: Mapping[str, Any]) -> list[str]:
    """What a model folder's card and config.json say of its license against what its weights' origin demands.

    One phrase each; empty when they agree, so that nobody publishes non-commercial weights as MIT by editing a line. A
    license that is not known is a finding too.
    """
    terms = model_license(origin)
    if terms.identifier == UNKNOWN:
        return [f"its license is not known. {terms.chain[1]} Train it from weights of a known license"]
    findings = []
    wanted = (terms.identifier, terms.name, terms.link)
    stated = tuple(card.data.get(key) for key in ("license", "license_name", "license_link"))
    if stated[:2] != wanted[:2] or stated[2] not in (None, terms.link):
        findings.append(f"it states the license {stated}, but the weights' origin demands {wanted}")
    if config.get("license") not in (None, terms.identifier):
        findings.append(f"config.json states the license {config['license']!r}, not {terms.identifier!r}")
    if terms.chain[-1] not in card.text:
        findings.append(f"its section License does not say: {terms.chain[-1]}")
    random = origin.kind == "trained" and origin.random_start
    if random and not origin.model_id.endswith(f".{RANDOM}"):
        findings.append(f"its id {origin.model_id} claims pretrained weights and its record a random start")
    return findings


@dataclass(frozen=True, kw_only=True)
class LicenseReport:
    """The license of a named model, step by step."""

    model: str
    """The name under which the weights are, or would be, published."""
    planned: bool
    """Whether it is a row of the table as it would be when trained as the study says: no weights were looked at."""
    terms: ModelLicense

    def lines(self) -> list[str]:
        """For a terminal: the chain, the result, what you may, must and may not do, where the terms are."""
        terms = self.terms
        planned = ", as it would be when fine-tuned on Kvasir-SEG; no weights were looked at" if self.planned else ""
        steps = [f"{number}. {sentence}" for number, sentence in enumerate(terms.chain, start=1)]
        name = f"{terms.identifier} ({terms.name})" if terms.name else terms.identifier
        phrases = {"You may": terms.may, "You must": terms.must, "You may not": terms.may_not}
        rules = [f"{start} {phrase}." for start, listed in phrases.items() for phrase in listed]
        links = f"Terms: {', '.join(terms.links)}"
        closing = "A summary, not legal advice. " + DISCLAIMER.replace("**", "")
        return [self.model + planned, *steps, f"License: {name}", *rules, links, closing]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        terms = self.terms
        listed = ("identifier", "name", "link", "commercial_use", "chain", "may", "must", "may_not", "links")
        images = [{"name": s.name, "title": s.title, "terms": s.license, "link": s.homepage} for s in terms.images]
        return {
            "model": self.model,
            "planned": self.planned,
            **{key: getattr(terms, key) for key in listed},
            "weights": terms.weights,
            "images": images,
        }


def report_license(model: str, *, revision: str | None = None) -> LicenseReport:
    """The license of a model folder, of a row of the table (id or short name), or of a model on the Hub.

    A row stands for what it will be: trained by the study's recipe on Kvasir-SEG. Of a Hub model only config.json is
    fetched. Raises UsageError for a name that is none of these, PolypSegError when the Hub cannot be reached.
    """
    from polypseg.provenance.fetch import resolve_id

    rows = {name: row for row in zoo.rows() for name in (row.model_id, row.short_name)}
    folder = local_folder(model) or Path(model)
    if folder.exists():
        origin, planned = _recorded_origin(folder), False
    elif model in rows:
        origin, planned = WeightsOrigin.planned(rows[model]), True
    else:
        origin, planned = _recorded_origin(_fetch_config(resolve_id(model), revision=revision).parent), False
    known = origin.model_id != UNKNOWN
    return LicenseReport(model=origin.repo_name if known else model, planned=planned, terms=model_license(origin))


def _recorded_origin(folder: Path) -> WeightsOrigin:
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no model folder: it has no {CONFIG}. Give a run's best/ folder")
    return WeightsOrigin.of_folder(folder)


def _fetch_config(repo_id: str, *, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    from polypseg.provenance.fetch import hub_errors

    with hub_errors(repo_id, revision=revision):
        return Path(hf_hub_download(repo_id, CONFIG, revision=revision))


def _plain(
    identifier: str, chain: Sequence[str], *, commercial_use: bool, images: tuple[DatasetSpec, ...] = ()
) -> ModelLicense:
    return ModelLicense(
        identifier=identifier,
        name=None,
        link=_TERMS[identifier].link,
        commercial_use=commercial_use,
        chain=tuple(chain),
        weights=identifier,
        images=images,
    )


def _encoder_license(origin: WeightsOrigin) -> tuple[str, str]:
    """The license that the encoder's start imposes, and the sentence that says so."""
    start, own = origin.encoder_initialisation, origin.pretraining
    row = origin.entry if origin.full_size else None
    if start == RANDOM:
        return "apache-2.0", "Pretraining weights: none, the encoder started at random."
    if start in STARTERS.values():
        return "apache-2.0", f"Pretraining weights: {start}, Apache-2.0 (LICENSE of the package that carries them)."
    if start is not None and start.startswith("timm:") and not (row and start == f"timm:{row.upstream.timm}"):
        stated = _timm_license(start)
        return stated or UNKNOWN, f"Pretraining weights: {start}; license {stated or 'not known here'}."
    if own:
        corpus = own.source or "frames of their own"
        return "apache-2.0", f"Pretraining weights: made by the publisher on {corpus}, whose terms apply to them."
    if start is not None and not origin.full_size:
        return UNKNOWN, f"Pretraining weights: {start}; license not known here."
    if start is None or row is None:
        return UNKNOWN, f"Pretraining weights: {start or 'not recorded'}; their license is not known here."
    return (
        row.upstream.license,
        f"Pretraining weights: {row.upstream.license}, stated at {row.upstream.license_source}.",
    )


def _timm_license(start: str) -> str | None:
    """The license that timm records of ``timm:<name>.<tag>``; None for none, or for one without a link here."""
    import timm

    try:
        facts = timm.get_pretrained_cfg(start.removeprefix("timm:"), allow_unregistered=True)
    except RuntimeError:  # an architecture of timm's, with a tag that it does not have
        return None
    stated = str(getattr(facts, "license", None) or "")
    return stated if stated in _TERMS else None


def _finetuning_set(origin: WeightsOrigin) -> DatasetSpec | None:
    """The set that the model was fine-tuned on; None for none, or for one that the table does not have."""
    return DATASETS.get((origin.finetuned_on or "").split(" ", maxsplit=1)[0])


def _own_corpus(origin: WeightsOrigin) -> DatasetSpec | None:
    """The set of a pretraining of one's own, known by the recorded name of its folder or archive; None for another."""
    own = origin.pretraining
    return _datasets_by_folder().get(_folder_key((own.source if own else None) or ""))


@cache
def _datasets_by_folder() -> dict[str, DatasetSpec]:
    """Key of every name under which a set lies in a folder of data -> its row of the table."""
    return {
        _folder_key(name): spec
        for spec in DATASETS.values()
        if spec.name != "folder"
        for name in (spec.name, spec.title, *spec.locations)
    }


def _folder_key(name: str) -> str:
    return name.lower().removesuffix(".zip").replace("-", "_").replace(" ", "_")


def _is_open(spec: DatasetSpec) -> bool:
    """Whether a set's terms leave commercial use open."""
    return spec.may_be_republished or is_synthetic(spec)


DISCLAIMER = (
    "**For research only. Not a medical device.** Not for diagnosis, screening, treatment or the management of "
    "patients; no regulatory clearance."
)
