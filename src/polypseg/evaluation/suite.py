"""The tests of the generalization suite, in one table, and one run of all those whose images are at hand."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polypseg.data.catalog import DATASETS, NEGATIVES, NEGATIVES_TITLE, DatasetSpec, get_spec
from polypseg.data.polyps import PolypDataset, Record, find_source, index_records, open_dataset
from polypseg.data.sources import open_source
from polypseg.errors import PolypSegError, UsageError, first_line, unknown_name
from polypseg.evaluation.conventions import CONVENTIONS
from polypseg.evaluation.evaluate import Measured, SuiteResult, score_predictions
from polypseg.evaluation.receipt import CONVENTION, read_receipt, receipt_path, refuse_other_weights
from polypseg.files import sole_writer, write_csv, write_json
from polypseg.inference.model_folder import model_folder
from polypseg.inference.operating_point import OPERATING_POINT_KEY
from polypseg.inference.prediction_source import PredictionSource
from polypseg.provenance.origin import WeightsOrigin
from polypseg.provenance.passport import Rule, SeenError, SplitManifest, check_seen, kept_manifest, name_partial

Frames = Literal["all", "with polyp", "without polyp"]
CENTER = "centre"
"""Split of PolypGen by hospital, and of its frames without polyp."""


@dataclass(frozen=True, kw_only=True)
class SuiteTest:
    """One test: some images of one dataset."""

    name: str
    dataset: str
    split: str
    part: str
    count: int | None
    """Images of the complete test; None where it is not pinned."""
    frames: Frames = "all"
    centre: str | None = None
    """PolypGen's hospital; the whole set then is split by it."""
    note: str = ""


# fmt: off
def _test(name: str, dataset: str, split: str, part: str, count: int | None, note: str = "", **more: Any) -> SuiteTest:
    return SuiteTest(name=name, dataset=dataset, split=split, part=part, count=count, note=note, **more)


SUITE: tuple[SuiteTest, ...] = (
    #      name                        dataset         split                part    images
    _test("kvasir-reference",          "kvasir_seg",   "reference",         "test", 100, "two near-duplicates of training images"),  # noqa: E501
    _test("kvasir-official",           "kvasir_seg",   "official",          "test", 120, "most lie in the reference's training part"),  # noqa: E501
    _test("clinicdb-full",             "cvc_clinicdb", "full",              "full", 612, "29 video clips"),
    _test("clinicdb-reference",        "cvc_clinicdb", "reference",         "test", 61,  "by frame: neighbors lie in the training part"),  # noqa: E501
    _test("clinicdb-sequence-disjoint","cvc_clinicdb", "sequence_disjoint", "test", 66,  "whole clips"),
    _test("colondb",                   "cvc_colondb",  "full",              "full", 380, "repeats count once in intervals by cluster"),  # noqa: E501
    _test("etis",                      "etis_larib",   "full",              "full", 196, "repeats count once in intervals by cluster"),  # noqa: E501
    *(
        _test(f"polypgen-{c.lower()}", "polypgen",     CENTER,              c,      None, "frames with a polyp of one hospital", centre=c, frames="with polyp")  # noqa: E501
        for c in ("C1", "C2", "C3", "C4", "C5", "C6")
    ),
    _test("polypgen-without-polyp",    "polypgen",     CENTER,              "without-polyp", None, "false alarms", frames="without polyp"),  # noqa: E501
    _test(NEGATIVES,                   NEGATIVES,      "full",              "full", None, "false alarms; any folder of frames without polyps", frames="without polyp"),  # noqa: E501
)
# fmt: on
NEGATIVES_SPEC = DatasetSpec(
    name=NEGATIVES,
    title=NEGATIVES_TITLE,
    license="yours to state",
    citation="",
    homepage="",
    count=None,
    request="give a folder of frames without polyps with --negatives, such as HyperKvasir's class bbps-2-3",
)


@dataclass(frozen=True)
class FramesWithoutPolyp(PolypDataset):
    """Frames of which somebody says that they show no polyp: every mask is empty."""

    def gray_mask(self, record: Record) -> NDArray[np.uint8]:
        """Zeros (H, W) of the frame's size. Raises PolypSegError naming a frame that is broken."""
        frame = self.frame(record)
        return np.zeros((frame.height, frame.width), dtype=np.uint8)


def open_negatives(path: Path) -> FramesWithoutPolyp:
    """A folder or archive of frames without polyps. Raises UsageError where it holds no image."""
    source = open_source(path)
    records = index_records(NEGATIVES_SPEC, source)
    if not records:
        raise UsageError(f"no images in {path}: a folder of frames without polyps was expected there")
    return FramesWithoutPolyp(spec=NEGATIVES_SPEC, source=source, records=records)


def suite_datasets() -> tuple[str, ...]:
    """The datasets of the suite's tests whose masks are read."""
    return tuple(dict.fromkeys(test.dataset for test in SUITE if test.dataset != NEGATIVES))


def own_test(name: str) -> SuiteTest:
    """The test of a user's own folder of images and masks."""
    return _test(name, name, "full", "full", None, "your own folder")


def open_own(name: str, path: Path, *, mask_values: str | None = None) -> PolypDataset:
    """A user's folder of ``images`` and ``masks`` as a dataset of its own name; values as for ``open_dataset``."""
    opened = open_dataset("folder", source=path, mask_values=mask_values)
    return replace(opened, spec=replace(opened.spec, name=name, title=name))


@dataclass(frozen=True, kw_only=True)
class SuitePlan:
    """What is to be tested, on which images, and how; a single test uses what is not about datasets."""

    output: Path
    only: tuple[str, ...] = ()
    """Names of tests; none: every test."""
    sources: Mapping[str, Path] | None = None
    """Dataset -> its folder or archive; others are looked for in the data folder."""
    own: Mapping[str, Path] | None = None
    """Name -> folder of images and masks that is tested as well."""
    mask_values: Mapping[str, str] | None = None
    """Dataset or name of ``own`` -> which values of its masks are polyp, as ``open_dataset`` takes them."""
    negatives: Path | None = None
    """Folder of frames without polyps."""
    conventions: tuple[str, ...] = tuple(CONVENTIONS)
    rule: Rule = "refuse"
    """What becomes of tests of which the model saw images."""
    allow_partial: bool = False
    save_masks: bool = False
    alarm_area: int = 1
    """Pixels from which a component on a frame without polyp is a false alarm."""

    def tests(self) -> tuple[SuiteTest, ...]:
        """The chosen tests, by dataset. Raises UsageError for an unknown test or dataset, or a name that is taken."""
        taken = {*DATASETS, *(test.name for test in SUITE)}
        for name in self.own or {}:
            if name in taken or not re.fullmatch(r"[\w-]+", name):
                raise UsageError(f"{name!r} cannot name a folder of your own: choose another word")
        known = {test.name: test for test in (*SUITE, *map(own_test, self.own or {}))}
        for name in self.only:
            if name not in known:
                raise unknown_name("test of the suite", name, known)
        datasets = suite_datasets()
        for name in self.sources or {}:
            if name not in datasets:
                raise unknown_name("dataset of the suite", name, datasets)
        return tuple(test for name, test in known.items() if not self.only or name in self.only)

    def open(self, dataset: str) -> PolypDataset:
        """One of the datasets. Raises _MissingError where it is not at hand, the errors of open_dataset otherwise."""
        values = (self.mask_values or {}).get(dataset)
        if dataset == NEGATIVES:
            if self.negatives is None:
                raise _MissingError(NEGATIVES_SPEC.request)
            return open_negatives(self.negatives)
        if self.own and dataset in self.own:
            return open_own(dataset, self.own[dataset], mask_values=values)
        path = (self.sources or {}).get(dataset)
        if path is None:
            try:
                path = find_source(get_spec(dataset))
            except UsageError as error:
                raise _MissingError(str(error)) from error
        return open_dataset(dataset, source=path, allow_partial=self.allow_partial, mask_values=values)


class _MissingError(UsageError):
    """A dataset is not at hand."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the summary."""

    test: str
    status: Literal["tested", "refused", "not at hand", "failed"]
    reason: str = ""
    """Why it was not tested, and what to do."""
    dataset: str
    split: str
    part: str
    n: int | None = None
    clusters: int | None = None
    effective_size: float | None = None
    """Of the Dice."""
    dice: float | None = None
    dice_low: float | None = None
    dice_high: float | None = None
    """`paper`'s Dice with the interval by cluster; None on tests of frames without polyp."""
    iou: float | None = None
    false_alarms_per_100: float | None = None
    false_alarms_low: float | None = None
    false_alarms_high: float | None = None
    predicted_share: float | None = None
    seen_images: int | None = None
    """Images of the test that the model saw or nearly saw; None where that is not known."""
    receipt: str = ""


def run_suite(source: PredictionSource, plan: SuitePlan, *, model_folder: Path | None = None) -> list[Outcome]:
    """Run each test whose images are at hand, write its receipt, then ``suite.csv`` and ``suite.json``.

    An image is predicted once, however many tests it is in. A test that is refused or fails does not end the run: the
    summary says why. Raises UsageError for an unknown test or dataset, and when nothing could be tested at all.
    """
    if "paper" not in plan.conventions:
        raise UsageError("the suite's summary is of the convention 'paper': ask for it as well")
    with sole_writer(plan.output / source.name):
        return _run_suite(source, plan, model_folder=model_folder)


def _run_suite(source: PredictionSource, plan: SuitePlan, *, model_folder: Path | None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for dataset, tests in groupby(plan.tests(), key=lambda test: test.dataset):
        outcomes += _run_dataset(source, plan, dataset, list(tests), model_folder=model_folder)
    folder = plan.output / source.name
    if not any(outcome.status in ("tested", "refused") for outcome in outcomes):
        told = "; ".join(dict.fromkeys(outcome.reason for outcome in outcomes))
        raise UsageError(f"no test of the suite could be run: {told}")
    write_csv(folder / "suite.csv", [asdict(outcome) for outcome in outcomes])
    write_json(folder / "suite.json", {"name": source.name, "tests": [asdict(outcome) for outcome in outcomes]})
    return outcomes


def _run_dataset(
    source: PredictionSource, plan: SuitePlan, dataset: str, tests: Sequence[SuiteTest], *, model_folder: Path | None
) -> Iterator[Outcome]:
    try:
        opened = plan.open(dataset)
    except PolypSegError as error:
        status: Any = "not at hand" if isinstance(error, _MissingError) else "failed"
        for test in tests:
            yield _untested(test, status, error)
        return
    measured: dict[str, Measured] = {}
    for test in tests:
        try:
            yield _run_test(source, plan, opened, test, measured=measured, model_folder=model_folder)
        except SeenError as error:
            yield _untested(test, "refused", error)
        except PolypSegError as error:
            yield _untested(test, "failed", error)


def _untested(test: SuiteTest, status: Any, error: PolypSegError) -> Outcome:
    return Outcome(
        test=test.name,
        status=status,
        reason=first_line(error),
        dataset=test.dataset,
        split=test.split,
        part=test.part,
    )


def _run_test(
    source: PredictionSource,
    plan: SuitePlan,
    dataset: PolypDataset,
    test: SuiteTest,
    *,
    measured: dict[str, Measured],
    model_folder: Path | None,
) -> Outcome:
    manifest = tested_images(dataset, test)
    result = score_images(source, plan, dataset, manifest, model_folder=model_folder, measured=measured)
    return _outcome(test, result.write(plan.output))


def evaluate(
    model: str | Path,
    dataset: str | PolypDataset,
    *,
    source: str | Path | None = None,
    split: str = "full",
    part: str = "full",
    conventions: Sequence[str] = (CONVENTION,),
    rule: Rule = "refuse",
    limit: int | None = None,
) -> SuiteResult:
    """Score a model, by name or folder, on a part of a dataset; ``.summary()``, ``.content()`` and ``.write(folder)``.

    ``source``: where the dataset of the table lies. ``rule``: what becomes of images that the model's passport lists:
    "refuse" the test, "report" or "exclude" them. The scores are those of ``polypseg evaluate``. Raises UsageError for
    an unknown name, SeenError as the rule says, PolypSegError for a broken file.
    """
    if not isinstance(dataset, PolypDataset):
        dataset = open_dataset(dataset, source=None if source is None else Path(source))
    from polypseg.inference.open_model import open_model

    folder = model_folder(str(model))
    manifest = name_partial(kept_manifest(dataset, split=split, part=part, limit=limit), dataset)
    manifest, seen = check_seen(folder, manifest, rule=rule)
    return score_predictions(
        open_model(str(model), folder=folder), dataset, conventions=conventions, manifest=manifest, seen=seen
    )


def score_images(
    source: PredictionSource,
    plan: SuitePlan,
    dataset: PolypDataset,
    manifest: SplitManifest,
    *,
    model_folder: Path | None,
    measured: dict[str, Measured] | None = None,
) -> SuiteResult:
    """Ask first whether the model in ``model_folder`` saw the images, then score; ``measured`` as in score_predictions.

    Raises SeenError as the plan's rule says, UsageError where a receipt of other weights would be replaced, and what
    score_predictions raises.
    """
    manifest, seen = check_seen(model_folder, manifest, rule=plan.rule)
    origin, at_point = WeightsOrigin.within(source.origin), OPERATING_POINT_KEY in source.origin
    path = receipt_path(plan.output, source.name, manifest, at_operating_point=at_point)
    refuse_other_weights(path, sha256=origin.sha256)
    return score_predictions(
        source,
        dataset,
        conventions=plan.conventions,
        manifest=manifest,
        seen=seen,
        measured=measured,
        masks=plan.output / source.name / "masks" / dataset.spec.name if plan.save_masks else None,
        alarm_area=plan.alarm_area,
    )


def tested_images(dataset: PolypDataset, test: SuiteTest) -> SplitManifest:
    """The images of a test. An incomplete set's part is named ``<part>-partial<n>``.

    Raises UsageError where there are none, PolypSegError for a broken file.
    """
    if test.frames == "all" or test.dataset == NEGATIVES:
        manifest = kept_manifest(dataset, split=test.split, part=test.part)
    else:
        wanted = [
            record.id
            for record in dataset.records
            if test.centre in (None, record.groups["centre"])
            and dataset.mask(record).any() == (test.frames == "with polyp")
        ]
        if not wanted:
            raise UsageError(f"{dataset.spec.title} in {dataset.source.path} has no image for the test {test.name}")
        manifest = kept_manifest(dataset, split="full", part="full").restrict(wanted, split=test.split, part=test.part)
    return name_partial(manifest, dataset)


def _outcome(test: SuiteTest, path: Path) -> Outcome:
    """What a receipt says, for the summary."""
    receipt = read_receipt(path)
    alarms, stated = (
        receipt.false_alarms,
        None if test.frames == "without polyp" else receipt.scores_by_cluster["paper"],
    )
    dice, per_100 = stated["dice"] if stated else None, alarms.per_100_frames if alarms else None
    return Outcome(
        test=test.name,
        status="tested",
        dataset=receipt.dataset.name,
        split=receipt.dataset.split,
        part=receipt.dataset.part,
        n=receipt.n,
        clusters=dice.clusters if dice else None,
        effective_size=dice.effective_size if dice else None,
        dice=dice.mean if dice else None,
        dice_low=dice.low if dice else None,
        dice_high=dice.high if dice else None,
        iou=stated["iou"].mean if stated else None,
        false_alarms_per_100=per_100.mean if per_100 else None,
        false_alarms_low=per_100.low if per_100 else None,
        false_alarms_high=per_100.high if per_100 else None,
        predicted_share=alarms.predicted_share.mean if alarms else None,
        seen_images=receipt.seen_images,
        receipt=path.name,
    )
