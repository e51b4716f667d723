"""The receipts of a study, grouped by the table's row, seed and test; what does not fit together is refused."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from polypseg import zoo
from polypseg.data.catalog import OWN_FOLDER
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import CONVENTION, Receipt, Test, find_receipts
from polypseg.evaluation.receipt_reading import LIMITS
from polypseg.provenance.origin import WeightsOrigin

_OF_ONE_RUN = ("row", "seed", "sha256", "passport")
"""Fields of ``weights_origin`` that differ between runs of the same training."""


def training_of(receipt: Receipt) -> str:
    """How the weights were trained, without the seed and without the row that they stand for, as one line.

    Equal lines are repeated runs: rows that start at random with one recipe are runs of one model.
    """
    changes = [change for change in receipt.origin.recipe_changes if not change.startswith("seed=")]
    return json.dumps(receipt.origin.without(*_OF_ONE_RUN).updated(recipe_changes=changes).content, sort_keys=True)


@dataclass(frozen=True)
class Material:
    """All receipts of a study."""

    receipts: tuple[Receipt, ...]
    inside: Test
    outside: Test

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Rows in the table's order, then others by name."""
        found = {receipt.row for receipt in self.receipts}
        known = [entry.model_id for entry in zoo.rows() if entry.model_id in found]
        return (*known, *sorted(found - set(known)))

    @cached_property
    def tests(self) -> tuple[Test, ...]:
        """The two tests of the comparison first, then the others by name."""
        found = {receipt.test for receipt in self.receipts}
        first = [test for test in (self.inside, self.outside) if test in found]
        return (*first, *sorted(found - set(first)))

    @cached_property
    def polyp_tests(self) -> tuple[Test, ...]:
        """``tests`` without those whose images show no polyp, for which Dice says nothing."""
        shown = {receipt.test for receipt in self.receipts if receipt.shows_polyps}
        return tuple(test for test in self.tests if test in shown)

    def of(self, model: str, test: Test | None = None) -> tuple[Receipt, ...]:
        """A row's receipts by seed, of one test or of all."""
        chosen = (r for r in self.receipts if r.row == model and test in (None, r.test))
        return tuple(sorted(chosen, key=lambda r: (self.tests.index(r.test), -1 if r.seed is None else r.seed)))

    @cached_property
    def compared(self) -> dict[str, tuple[int | None, ...]]:
        """Rows with both tests of the comparison -> the seeds compared: as many for each, found in both tests."""
        both = {
            model: [
                r.seed for r in self.of(model, self.inside) if r.seed in {o.seed for o in self.of(model, self.outside)}
            ]
            for model in self.models
        }
        count = min((len(seeds) for seeds in both.values() if seeds), default=0)
        return {model: tuple(seeds[:count]) for model, seeds in both.items() if seeds}

    def used(self, model: str, test: Test) -> tuple[Receipt, ...]:
        """The receipts behind a row's numbers on a test: the compared seeds on the two tests of the comparison."""
        receipts = self.of(model, test)
        if test in (self.inside, self.outside) and model in self.compared:
            return tuple(r for r in receipts if r.seed in self.compared[model])
        return receipts

    def unused(self) -> tuple[Receipt, ...]:
        """Receipts beyond the seeds compared."""
        kept = {id(r) for model in self.models for test in self.tests for r in self.used(model, test)}
        return tuple(r for r in self.receipts if id(r) not in kept)

    @cached_property
    def _labels(self) -> dict[str, str]:
        labels = {model: _label(model, self.of(model)[0].origin) for model in self.models}
        shared = {label for label, count in Counter(labels.values()).items() if count > 1}
        return {m: f"{label} ({table_name(m)})" if label in shared else label for m, label in labels.items()}

    def label(self, model: str) -> str:
        """Short name of a row, no two alike; see Origin.label."""
        return self._labels[model]

    @cached_property
    def random_starts(self) -> frozenset[str]:
        """Rows named after a pretraining whose encoder started at random, for lack of weights."""
        return frozenset(
            model
            for model in self.models
            for entry, origin in [(entry_of(model), self.of(model)[0].origin)]
            if entry is not None and entry.method != "none" and origin.random_start
        )

    @cached_property
    def unknown_starts(self) -> frozenset[str]:
        """Rows of the table whose receipts do not say what the encoder started from, or say that of another row."""
        return frozenset(
            model
            for model in self.models
            for entry, origin in [(entry_of(model), self.of(model)[0].origin)]
            if entry is not None and not _start_is_known(entry, origin)
        )

    def repeated_runs(self, test: Test) -> list[list[Receipt]]:
        """The receipts of a test in groups whose training differs in nothing but the seed."""
        groups: dict[str, list[Receipt]] = {}
        for receipt in self.receipts:
            if receipt.test == test and receipt.model_sha256:
                groups.setdefault(training_of(receipt), []).append(receipt)
        return [group for group in groups.values() if len(group) > 1]

    @cached_property
    def names(self) -> dict[str, str]:
        """What stands for the table's families and corpora in small studies: key of the table -> words."""
        found: dict[str, dict[str, None]] = {}
        for receipt in self.receipts:
            entry, origin = entry_of(receipt.row), receipt.origin
            if entry is None or not origin.content or origin.full_size:
                continue
            encoder = origin.model_id.split(".", maxsplit=1)[0].removesuffix(f"_{entry.decoder}")
            found.setdefault(entry.encoder, {})[encoder.split("_patch", maxsplit=1)[0]] = None
            corpus = origin.pretraining.corpus if origin.pretraining else None
            if corpus and entry.corpus != "none":
                found.setdefault(entry.corpus, {})[corpus.replace("_", " ")] = None
        return {key: " and ".join(words) for key, words in found.items()}

    def test_title(self, test: Test) -> str:
        """``Kvasir-SEG, reference test part``."""
        titles = (r.dataset.title for r in self.receipts if r.test == test)
        return f"{next(titles, test[0])}, {part_words(test)}"

    def missing(self) -> list[str]:
        """What a complete study would have and this one lacks, one sentence each."""
        found = [
            f"No receipt on {'.'.join(test)}, the test {where} distribution."
            for where, test in (("in", self.inside), ("out of", self.outside))
            if test not in self.tests
        ]
        absent = [entry.short_name for entry in zoo.ZOO if entry.model_id not in self.models]
        if absent:
            found.append(f"No receipt of {len(absent)} of the table’s {len(zoo.ZOO)} rows: {', '.join(absent)}.")
        for test in self.tests:
            lacking = [self.label(model) for model in self.models if not self.of(model, test)]
            if lacking:
                found.append(f"{self.test_title(test)}: not tested for {', '.join(lacking)}.")
        if self.unused():
            names = ", ".join(dict.fromkeys(f"{self.label(r.row)} seed {r.seed}" for r in self.unused()))
            found.append(f"Rows are compared with as many seeds each; receipts beyond that are not used: {names}.")
        return found


def _label(model: str, origin: WeightsOrigin) -> str:
    if origin.content and entry_of(model) is not None:
        return origin.updated(row=model).label
    return origin.label if origin.scale == "small" else table_name(model)


def _start_is_known(entry: zoo.ZooEntry, origin: WeightsOrigin) -> bool:
    """Whether the encoder is recorded to have started at random or from the row's own kind of pretraining."""
    if origin.converted_from:
        return True
    if origin.encoder_initialisation is None or origin.random_start:
        return origin.random_start
    pretrained_with = origin.pretraining.method if origin.pretraining else None
    return entry.method != "none" and pretrained_with in (None, entry.method)


def table_name(model: str) -> str:
    """The paper's short name of the table's row, or the name itself."""
    entry = entry_of(model)
    return entry.short_name if entry else model


def entry_of(model: str) -> zoo.ZooEntry | None:
    """The table's row of this id, if it is one."""
    return next((entry for entry in zoo.rows() if entry.model_id == model), None)


_LIMITED = re.compile(rf"(.*?)(?:-({'|'.join(LIMITS)})(\d+))?")


def part_words(test: Test) -> str:
    """What of a dataset was tested, in words."""
    _, split, part = test
    whole, reason, count = _LIMITED.fullmatch(part).groups()  # type: ignore[union-attr]
    name = "all images" if (split, whole) == ("full", "full") else f"{split} {whole} part"
    return name if count is None else f"{name}{LIMITS[reason].format(count=count)}"


def parse_test(text: str) -> Test:
    """``kvasir_seg.reference.test`` -> (dataset, split, part). Raises UsageError for another form."""
    parts = text.split(".")
    if len(parts) != 3 or not all(parts):
        raise UsageError(f"a test is named DATASET.SPLIT.PART, as kvasir_seg.reference.test, not {text!r}")
    return parts[0], parts[1], parts[2]


def read_material(folder: Path, *, inside: Test, outside: Test) -> Material:
    """The receipts below a folder.

    Raises UsageError for a folder without receipts and for receipts of different images, models or scales under one
    name; PolypSegError for a receipt whose aggregates do not follow from its rows.
    """
    receipts = [_checked(receipt) for receipt in find_receipts(folder).values()]
    if not receipts:
        raise UsageError(f"{folder} holds no receipts: write some with `polypseg evaluate --suite`")
    _refuse_mixtures(receipts)
    return Material(tuple(receipts), inside=inside, outside=outside)


def _checked(receipt: Receipt) -> Receipt:
    problems = receipt.differences()
    if problems:
        raise PolypSegError(f"{receipt.path} is refused: {problems[0]}: evaluate again")
    if CONVENTION not in receipt.definitions:
        raise UsageError(
            f"{receipt.path} lacks the convention {CONVENTION!r}, which the report states: evaluate again with it"
        )
    return receipt


def _refuse_mixtures(receipts: Iterable[Receipt]) -> None:
    for a, b in combinations(receipts, 2):
        for same, what, values in _must_agree(a, b):
            if same and values[0] != values[1]:
                raise UsageError(f"{a.path} and {b.path} differ in {what}: evaluate both on the same, or remove one")
        if a.row == b.row and a.test == b.test and a.seed == b.seed:
            raise UsageError(f"{a.path} and {b.path} are of the same row, seed and test: remove one")
        if a.model_sha256 and a.model_sha256 == b.model_sha256 and (a.row, a.seed) != (b.row, b.seed):
            raise UsageError(f"{a.path} and {b.path} are of the same weights under two rows or seeds: remove one")


def _must_agree(a: Receipt, b: Receipt) -> list[tuple[bool, str, tuple[Any, Any]]]:
    """(whether the two must agree, in what, their values)."""
    same_model = a.row == b.row
    # A study of two folders of one's own has one in distribution and the other out of it.
    same_dataset = a.test == b.test or a.test[0] == b.test[0] != OWN_FOLDER
    same_run = same_model and a.seed == b.seed and bool(a.model_sha256 and b.model_sha256)
    return [
        (same_dataset, "the dataset’s content", (a.dataset.content_id, b.dataset.content_id)),
        (a.test == b.test, "the number of images", (len(a.images), len(b.images))),
        (a.test == b.test, "the images", (a.dataset.manifest, b.dataset.manifest)),
        (same_model, "the model", (a.origin.model_id, b.origin.model_id)),
        (bool(a.origin.content and b.origin.content), "scale", (a.origin.scale, b.origin.scale)),
        (same_run, "the model’s sha256", (a.model_sha256, b.model_sha256)),
    ]
