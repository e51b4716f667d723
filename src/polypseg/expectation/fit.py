"""What is learned of a model: its cells gathered, the learner chosen by held-out folds, one JSON file written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.isotonic import IsotonicRegression

from polypseg.data.catalog import NEGATIVES
from polypseg.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from polypseg.data.images import decode_frame
from polypseg.data.polyps import open_dataset
from polypseg.data.splits import pinned_split
from polypseg.errors import UsageError
from polypseg.evaluation.suite import open_negatives
from polypseg.expectation.calibrate import Calibration, Labeled, calibrate, save_calibration
from polypseg.expectation.cells import (
    CLEAN,
    Cell,
    FrameSet,
    SwappedColors,
    add_noise,
    choose_frames,
    measure_cells,
    table,
)
from polypseg.expectation.folds import (
    MILD,
    Columns,
    Unit,
    family_errors,
    held_out,
    held_out_baselines,
    mean_absolute,
    unit_errors,
    units,
)
from polypseg.expectation.intervals import (
    LEVEL,
    SetInterval,
    auroc,
    by_group_interval,
    conformal_quantile,
    covered_when_left_out,
    group_means,
    rank_correlation,
)
from polypseg.expectation.learner import LEARNERS, baselines
from polypseg.expectation.margins import learn_margin, margin_evidence
from polypseg.files import environment_record, read_json, write_json
from polypseg.inference.expected import EXPECTATION, FORMAT, THRESHOLD
from polypseg.inference.features import SINGLE, to_colors
from polypseg.inference.gate import MOST_UNLIKE, Gate, describe_place, learn_gate
from polypseg.inference.operating_point import OPERATING_POINT, WEIGHTS, weights_digests
from polypseg.inference.predictor import Predictor, Steps
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.runtimes import ONNX_FILES, ONNXRUNTIME, OnnxRuntime, open_runtime
from polypseg.inference.segmenter import Segmenter
from polypseg.provenance.checksums import MANIFEST, check_folder, write_manifest
from polypseg.provenance.origin import WeightsOrigin
from polypseg.shift.frame_statistics import measure_frame

Floats = NDArray[np.float64]
Echo = Callable[[str], object]
SHIPPED = "the model"
CORRUPTED = (3, 5)
"""Severities of the corrupted cells."""
PER_SET, PER_CORRUPTED_SET, PER_OTHER_MODEL = 116, 20, 30
"""Frames of each set as it is; of each set in a corrupted cell; of each set for models other than the one."""
NOISE = (0.08, 0.12)
MOST_ALARMS = 0.1
"""Share of polyp-free validation frames on which a model's own operating point may find something."""
VALIDATION, TEST = "kvasir_seg.validation", "kvasir_seg.test"
WORTH = 0.002
"""Mean absolute error that two more passes, or a larger learner, must save to be taken."""
FAILURE = 0.5
"""Dice below which a mask has failed."""


# The cells ---------------------------------------------------------------------------------------------


def open_sets(data_dir: Path | None) -> dict[str, FrameSet]:
    """Name -> frames of the labeled sets at hand, Kvasir-SEG's validation part first.

    Raises UsageError where Kvasir-SEG or CVC-ClinicDB is absent.
    """
    kvasir = open_dataset("kvasir_seg", data_dir=data_dir)
    clinicdb = open_dataset("cvc_clinicdb", data_dir=data_dir)
    parts = kvasir.split("reference")
    sets = [
        choose_frames(VALIDATION, kvasir, parts["validation"], most=PER_SET),
        choose_frames(TEST, kvasir, parts["test"], most=PER_SET),
        choose_frames("cvc_clinicdb", clinicdb, clinicdb.ids, most=PER_SET),
    ]
    center = (data_dir or Path("data")) / "PolypGen-C3"
    if center.is_dir():
        opened = open_dataset("folder", source=center)
        sets.append(choose_frames("polypgen_c3", opened, opened.ids, most=100))
    return {one.name: one for one in sets}


def gather(folder: Path, *, data_dir: Path | None, cache: Path, echo: Echo) -> list[Cell]:
    """Every cell of a model's matrix, the model's own first; those in ``cache`` are not measured again."""
    sets = open_sets(data_dir)
    corruptions = [(kind, severity) for kind in CORRUPTIONS for severity in CORRUPTED]
    found: list[Cell] = []

    def measure(segmenter: Segmenter, frames: FrameSet, kinds: Sequence[tuple[str, int]], model: str) -> None:
        for cell in measure_cells(segmenter, frames, kinds, model=model, cache=cache):
            found.append(cell)
            mean = sum(row.dice for row in cell.rows) / len(cell.rows)
            echo(f"{cell.model} {cell.set} {cell.kind} {cell.severity}: n = {len(cell.rows)}, Dice {mean:.3f}")

    model = open_model(folder)
    for frames in sets.values():
        measure(model, frames, [(CLEAN, 0)], SHIPPED)
    others = {name: _some(frames, PER_OTHER_MODEL) for name, frames in sets.items() if name != VALIDATION}
    for title, segmenter in _other_models(folder, model, cache):
        for frames in others.values():
            measure(segmenter, frames, [(CLEAN, 0)], title)
    corrupted = [_some(frames, PER_CORRUPTED_SET) for name, frames in sets.items() if name != VALIDATION]
    for corruption in corruptions:
        for frames in corrupted:
            measure(model, frames, [corruption], SHIPPED)
    return found


def open_model(folder: Path) -> Segmenter:
    """The model in a folder by its ONNX file, without what was learned of it before."""
    runtime = open_runtime(folder, runtime=ONNXRUNTIME)
    return Segmenter(runtime=runtime, processor=FrameProcessor.from_pretrained(folder), name=str(folder))


def _some(frames: FrameSet, count: int) -> FrameSet:
    step = max(1, len(frames.ids) // count)
    return FrameSet(name=frames.name, dataset=frames.dataset, ids=frames.ids[::step][:count])


def _other_models(folder: Path, model: Segmenter, cache: Path) -> list[tuple[str, Segmenter]]:
    """The model fed swapped colors, with noise on its weights, and in 8 bits."""
    processor = FrameProcessor.from_pretrained(folder)
    swapped = Segmenter(runtime=SwappedColors(runtime=model.runtime), processor=processor, name="swapped")
    found = [("red and blue swapped", swapped)]
    for amount in NOISE:
        path = cache / "noisy" / f"{model.fingerprint()[:16]}.{amount}.onnx"
        if not path.is_file():
            add_noise(folder / ONNX_FILES["fp32"], path, amount=amount)
        noisy = Segmenter(runtime=OnnxRuntime(path), processor=processor, name="noisy")
        found.append((f"weights with noise {amount}", noisy))
    if (folder / ONNX_FILES["int8"]).is_file():
        runtime = OnnxRuntime(folder / ONNX_FILES["int8"])
        found.append(("8 bits", Segmenter(runtime=runtime, processor=processor, name="8 bits")))
    return found


# The gate ----------------------------------------------------------------------------------------------

_EVERY_TRAINING, _EVERY_NEGATIVE = 6, 3


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Frames that the model learned from, described."""

    gate: Gate
    measures: Mapping[str, tuple[float, float]]
    """Shift measure -> mean and standard deviation."""
    frames: int
    polyp_free: int


def learn_frames(folder: Path, *, data_dir: Path | None) -> Learned:
    """Describe frames of the training part as they are and corrupted, and polyp-free frames where they are at hand."""
    processor = FrameProcessor.from_pretrained(folder)
    kvasir = open_dataset("kvasir_seg", data_dir=data_dir)
    rng, kinds = np.random.default_rng(0), list(CORRUPTIONS)
    described: list[Floats] = []
    groups: list[str] = []
    measured: list[dict[str, float]] = []
    ids = kvasir.split("reference")["train"][::_EVERY_TRAINING]
    for number, record_id in enumerate(ids):
        frame = kvasir.frame(kvasir.by_id[record_id])
        changed = corrupt(
            np.asarray(frame), kinds[number % len(kinds)], severity=int(rng.choice(SEVERITIES)), key=record_id
        )
        described += [_place(frame, processor), _place(Image.fromarray(changed), processor)]
        groups += [record_id, record_id]
        measured.append(measure_frame(np.asarray(frame)))
    negatives = polyp_free_frames(data_dir, "train")[::_EVERY_NEGATIVE]
    for path in negatives:
        described.append(_place(decode_frame(path.read_bytes(), name=str(path)), processor))
        groups.append(path.stem)
    columns = {name: np.array([row[name] for row in measured]) for name in measured[0]}
    return Learned(
        gate=learn_gate(described, groups),
        measures={name: (float(values.mean()), float(values.std(ddof=1))) for name, values in columns.items()},
        frames=len(ids),
        polyp_free=len(negatives),
    )


def polyp_free_frames(data_dir: Path | None, part: str) -> list[Path]:
    """Files of a part of HyperKvasir's polyp-free frames; none where they are not at hand."""
    folder = (data_dir or Path("data")) / "HyperKvasir-frames"
    if not folder.is_dir():
        return []
    opened = open_negatives(folder)
    pinned = pinned_split(NEGATIVES, "hyperkvasir") or {}
    return [folder / opened.by_id[i].image for i in pinned.get(part, []) if i in opened.by_id]


def _place(frame: Image.Image, processor: FrameProcessor) -> Floats:
    return describe_place(to_colors(processor.prepare(frame), processor))


def refusals(gate: Gate, folder: Path, *, data_dir: Path | None, seed: int = 0) -> list[dict[str, Any]]:
    """Of sets that must pass and sets that must not: the share of frames that are unlike, and the verdict."""
    processor, rng = FrameProcessor.from_pretrained(folder), np.random.default_rng(seed)

    def row(name: str, frames: Sequence[Image.Image], *, wanted: bool) -> dict[str, Any]:
        share = float(gate.unlike([_place(frame, processor) for frame in frames]).mean())
        return {"set": name, "n": len(frames), "unlike": share, "refused": share > MOST_UNLIKE, "to_refuse": wanted}

    found = []
    for name, frames in open_sets(data_dir).items():
        some = [frames.dataset.frame(frames.dataset.by_id[i]) for i in frames.ids[::4]]
        found.append(row(name, some, wanted=False))
    free = polyp_free_frames(data_dir, "test")[::20]
    natural = sorted(((data_dir or Path("data")) / "ImageNet-sample").rglob("*.[jJpP][pPnN]*[gG]"))[::2]
    for name, paths, wanted in (("hyperkvasir_polyp_free", free, False), ("imagenet_sample", natural, True)):
        if paths:
            found.append(row(name, [decode_frame(p.read_bytes(), name=str(p)) for p in paths], wanted=wanted))
            if wanted:
                gray = [decode_frame(p.read_bytes(), name=str(p)).convert("L").convert("RGB") for p in paths[:30]]
                found.append(row(f"{name}, gray", gray, wanted=True))
    reddish = np.array([150.0, 90.0, 70.0])
    drawn: dict[str, Callable[[], NDArray[Any]]] = {
        "white noise": lambda: rng.integers(0, 256, (288, 288, 3)),
        "reddish noise": lambda: np.clip(rng.normal(0, 40, (288, 288, 3)) + reddish, 0, 255),
        "smooth noise": lambda: rng.integers(0, 256, (8, 8, 3)).repeat(36, axis=0).repeat(36, axis=1),
    }
    for name, draw in drawn.items():
        shown = [Image.fromarray(draw().astype(np.uint8)) for _ in range(15)]
        found.append(row(name, shown, wanted=True))
    return found


# The choice --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A learner or baseline with its held-out predictions."""

    name: str
    baseline: bool
    expected: Floats
    """(N,)."""
    error: float
    """Mean absolute, over what was held out."""
    predictor: Callable[[], Predictor]
    """Learned from everything."""


def candidates(columns: Columns, found: Sequence[Unit]) -> list[Candidate]:
    """Baselines first, then learners by size."""
    features, dice = columns["features"], columns["dice"]
    source = (columns["set"] == VALIDATION) & (columns["model"] == SHIPPED)
    simple = baselines(features[source], dice[source])
    made = []
    for name, expected in held_out_baselines(columns, model=SHIPPED, anchor=VALIDATION).items():
        error = mean_absolute(found, unit_errors(found, expected, dice))
        made.append(
            Candidate(
                name=name, baseline=True, expected=expected, error=error, predictor=partial(simple.__getitem__, name)
            )
        )
    for name, learn in LEARNERS.items():
        expected = held_out(columns, learn, model=SHIPPED, anchor=VALIDATION)
        error = mean_absolute(found, unit_errors(found, expected, dice))
        made.append(
            Candidate(
                name=name,
                baseline=False,
                expected=expected,
                error=error,
                predictor=partial(learn, features, dice),
            )
        )
    return made


def choose(made: Sequence[Candidate]) -> Candidate:
    """The first whose error is within WORTH of the least: a smaller learner, and a baseline, before a larger one."""
    least = min(one.error for one in made)
    return next(one for one in made if one.error <= least + WORTH)


# The file ----------------------------------------------------------------------------------------------


def learn_expectation(folder: Path, *, data_dir: Path | None, cache: Path, echo: Echo) -> dict[str, Any]:
    """Everything that is learned of the model in ``folder``, as the content of its expectation file."""
    cells = gather(folder, data_dir=data_dir, cache=cache, echo=echo)
    content = fit_cells(cells)
    learned = learn_frames(folder, data_dir=data_dir)
    refused = refusals(learned.gate, folder, data_dir=data_dir)
    for row in refused:
        echo(
            f"{row['set']}: {row['unlike']:.0%} of {row['n']} frames unlike, {'' if row['refused'] else 'not '}refused"
        )
    return {
        "format": FORMAT,
        "model": {
            "id": WeightsOrigin.of_folder(folder).model_id,
            "sha256": weights_digests(folder),
            "convention": f"Dice at threshold {THRESHOLD} of frames with a polyp; 0 for an empty mask",
        },
        **content,
        "gate": learned.gate.content(),
        "gate_learnt_from": {"training_frames": learned.frames, "polyp_free_frames": learned.polyp_free},
        "seen": {name: [round(value, 6) for value in pair] for name, pair in learned.measures.items()},
        "refusals": refused,
        "environment": environment_record(),
    }


def learn_point(folder: Path, *, data_dir: Path | None) -> Calibration:
    """The model's operating point, chosen on the validation frames with polyps and those without."""
    sets, processed = open_sets(data_dir), []
    chosen = sets[VALIDATION]
    for record_id in chosen.ids:
        frame, truth = chosen.dataset.pair(chosen.dataset.by_id[record_id])
        processed.append(Labeled(name=record_id, group=record_id, frame=frame, truth=truth.astype(bool)))
    for path in polyp_free_frames(data_dir, "validation"):
        frame = decode_frame(path.read_bytes(), name=str(path))
        nothing = np.zeros((frame.height, frame.width), dtype=bool)
        processed.append(Labeled(name=path.stem, group=path.stem, frame=frame, truth=nothing))
    return calibrate(open_model(folder), processed, most_alarms=MOST_ALARMS, show_progress=False)


def learn_model(folder: Path, *, data_dir: Path | None, cache: Path, echo: Echo) -> tuple[Path, Path]:
    """Learn everything of the model in ``folder`` and write it there; return the two files.

    Raises UsageError for a folder without ONNX file or where datasets are absent, PolypSegError for weights that are
    not those of the folder's checksums, to which what is learned is bound.
    """
    check_folder(folder, names=WEIGHTS)
    learned = learn_expectation(folder, data_dir=data_dir, cache=cache, echo=echo)
    found = learn_point(folder, data_dir=data_dir)
    written = write_json(folder / EXPECTATION, learned)
    return written, _write_point(folder, found, learned["model"], echo=echo)


def learn_model_point(folder: Path, *, data_dir: Path | None, echo: Echo) -> Path:
    """Choose only the operating point of a model of which everything else was learned, and write it into its folder.

    Raises UsageError for a model of which nothing was learned or where datasets are absent, and what ``learn_model``
    raises for other weights.
    """
    check_folder(folder, names=WEIGHTS)
    if not (folder / EXPECTATION).is_file():
        raise UsageError(f"{folder} has no {EXPECTATION}: learn all of it, without --only-point")
    model = read_json(folder / EXPECTATION)["model"]
    return _write_point(folder, learn_point(folder, data_dir=data_dir), model, echo=echo)


def _write_point(folder: Path, found: Calibration, model: Mapping[str, Any], *, echo: Echo) -> Path:
    for line in found.lines():
        echo(line)
    point = save_calibration(found, folder / OPERATING_POINT, model=model["id"], weights=model["sha256"])
    if (folder / MANIFEST).is_file():
        write_manifest(folder)
    return point


def fit_cells(cells: Sequence[Cell]) -> dict[str, Any]:
    """What is learned from cells alone: predictors, interval, flag, and the evidence from held-out folds."""
    columns = table(cells)
    found = units(columns, model=SHIPPED, anchor=VALIDATION)
    made = candidates(columns, found)
    single = choose([one for one in made if set(one.predictor().features) <= set(SINGLE)])
    best = choose(made)
    several = best if best.error < single.error - WORTH else single
    dice = columns["dice"]
    own = (columns["model"] == SHIPPED) & (columns["set"] != VALIDATION)
    errors = unit_errors(found, several.expected, dice)
    families = family_errors(found, errors)
    clean = own & (columns["kind"] == CLEAN)
    spread = float(np.mean([dice[unit.rows].std(ddof=1) for unit in found if unit.sort == "set"]))
    frames = int(np.median([unit.rows.sum() for unit in found]))
    width = conformal_quantile(list(families.values()))
    if not np.isfinite(width):
        raise UsageError(
            f"{len(families)} held-out sets, corruptions and models are too few for a {LEVEL:.0%} interval"
        )
    failed = dice[own] < FAILURE
    below = _flag_limit(single.expected[own], failed)
    margin = learn_margin(columns, single.expected, model=SHIPPED, anchor=VALIDATION, usual=TEST)
    flagged = single.expected[own] < below
    return {
        "one_pass": single.predictor().content(),
        "three_passes": several.predictor().content(),
        "chosen": {"one_pass": single.name, "three_passes": several.name},
        "interval": SetInterval(half_width=width, frames=frames, spread=spread).content(),
        "failure": _probability(several.expected[own], failed).content(),
        "flag": {
            "below": below,
            "finds": float(flagged[failed].mean()) if failed.any() else None,
            "false": None if failed.all() else float(flagged[~failed].mean()),
        },
        "margin": margin.content(),
        "anchor": _anchor(columns),
        "learnt_from": _cells_content(columns, several.expected),
        "evidence": {
            "candidates": [_candidate_content(one, found, columns) for one in made],
            "units": _units_content(found, columns, several.expected, width),
            "coverage": _coverage(found, families),
            "mean_absolute_error": mean_absolute(found, errors),
            "mild": mean_absolute(found, errors, lambda unit: float(dice[unit.rows].mean()) > MILD),
            "greatest_error_of_sets": max(
                (value for (sort, _), value in families.items() if sort == "set"), default=None
            ),
            "frames": _frame_evidence(columns, single.expected, several.expected, own=own, clean=clean),
            "margin": margin_evidence(columns, margin, single.expected, model=SHIPPED, anchor=VALIDATION, usual=TEST),
        },
    }


def _flag_limit(expected: Floats, failed: NDArray[np.bool_]) -> float:
    """The expected Dice that best tells failed masks from the others: sensitivity and specificity have the greatest
    sum."""
    if failed.all() or not failed.any():
        return FAILURE
    limits = np.unique(np.round(expected, 2))
    gains = [(expected[failed] < limit).mean() - (expected[~failed] < limit).mean() for limit in limits]
    return float(limits[int(np.argmax(gains))])


def _probability(expected: Floats, failed: NDArray[np.bool_]) -> Steps:
    """Expected Dice -> probability that the mask has failed."""
    fitted = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(expected, failed.astype(np.float64))
    x, y = np.round(fitted.X_thresholds_, 5), np.round(fitted.y_thresholds_, 5)
    return Steps(feature="expected_dice", x=tuple(x.tolist()), y=tuple(y.tolist()))


def _anchor(columns: Columns) -> dict[str, Any]:
    rows = (columns["set"] == VALIDATION) & (columns["model"] == SHIPPED)
    dice = columns["dice"][rows]
    return {
        "set": VALIDATION,
        "n": int(rows.sum()),
        "dice": float(dice.mean()),
        "failed": float((dice < FAILURE).mean()),
    }


def _cells_content(columns: Columns, expected: Floats) -> list[dict[str, Any]]:
    """Every cell: what was learned from, what was measured, what was expected without it."""
    keys = list(dict.fromkeys(zip(*(columns[n].tolist() for n in ("model", "set", "kind", "severity")), strict=True)))
    found = []
    for model, name, kind, severity in keys:
        rows = (columns["model"] == model) & (columns["set"] == name)
        rows &= (columns["kind"] == kind) & (columns["severity"] == severity)
        value = float(expected[rows].mean())
        found.append(
            {
                "model": model,
                "set": name,
                "corruption": kind,
                "severity": int(severity),
                "n": int(rows.sum()),
                "dice": round(float(columns["dice"][rows].mean()), 4),
                "expected": None if np.isnan(value) else round(value, 4),
            }
        )
    return found


def _units_content(found: Sequence[Unit], columns: Columns, expected: Floats, width: float) -> list[dict[str, Any]]:
    rows = []
    for unit in found:
        measured, guess = float(columns["dice"][unit.rows].mean()), float(expected[unit.rows].mean())
        rows.append(
            {
                "sort": unit.sort,
                "held_out": unit.family,
                "severity": unit.severity,
                "n": int(unit.rows.sum()),
                "dice": round(measured, 4),
                "expected": round(guess, 4),
                "within": bool(abs(guess - measured) <= width),
            }
        )
    return rows


def _coverage(found: Sequence[Unit], families: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """How often an interval from the other families held what was left out."""
    keys = list(families)
    covered = covered_when_left_out([families[key] for key in keys])
    by_sort: dict[str, list[bool]] = {}
    for (sort, _), inside in zip(keys, covered, strict=True):
        by_sort.setdefault(sort, []).append(inside)
    return {
        "level": LEVEL,
        "families": len(keys),
        "covered": int(sum(covered)),
        "by_sort": {sort: [int(sum(values)), len(values)] for sort, values in by_sort.items()},
        "units": len(found),
    }


def _candidate_content(one: Candidate, found: Sequence[Unit], columns: Columns) -> dict[str, Any]:
    dice = columns["dice"]
    errors = unit_errors(found, one.expected, dice)
    own = (columns["model"] == SHIPPED) & (columns["set"] != VALIDATION)
    clips = own & (columns["kind"] == CLEAN) & (columns["set"] == "cvc_clinicdb")
    sorts = {sort: mean_absolute(found, errors, partial(_is_sort, sort)) for sort in ("set", "corruption", "model")}
    return {
        "name": one.name,
        "baseline": one.baseline,
        "error": _number(one.error),
        **{sort: _number(value) for sort, value in sorts.items()},
        "mild": _number(mean_absolute(found, errors, lambda unit: float(dice[unit.rows].mean()) > MILD)),
        "auroc": _number(auroc(one.expected[own], dice[own] < FAILURE)),
        "rank_correlation": _number(rank_correlation(one.expected[clips], dice[clips])) if clips.any() else None,
    }


def _is_sort(sort: str, unit: Unit) -> bool:
    return unit.sort == sort


def _auroc_at(score: Floats, failed: NDArray[np.bool_], at: NDArray[np.int64]) -> float:
    return auroc(score[at], failed[at])


def _correlation_at(score: Floats, dice: Floats, at: NDArray[np.int64]) -> float:
    return rank_correlation(score[at], dice[at])


def _frame_evidence(
    columns: Columns, single: Floats, several: Floats, *, own: NDArray[np.bool_], clean: NDArray[np.bool_]
) -> dict[str, Any]:
    """AUROC for failed masks and rank correlation by frame, each with an interval over clips."""
    content: dict[str, Any] = {}
    for name, expected in (("one_pass", single), ("three_passes", several)):
        of: dict[str, Any] = {}
        for title, rows in (("all", own), ("clean", clean)):
            score, failed, groups = expected[rows], columns["dice"][rows] < FAILURE, columns["group"][rows]
            of[f"auroc_{title}"] = _with_interval(partial(_auroc_at, score, failed), groups)
            of[f"failed_{title}"] = [int(failed.sum()), len(failed)]
        clips = clean & (columns["set"] == "cvc_clinicdb")
        if clips.any():
            score, dice, groups = expected[clips], columns["dice"][clips], columns["group"][clips]
            of["rank_correlation"] = _with_interval(partial(_correlation_at, score, dice), groups)
            of["rank_correlation_of_clips"] = _number(
                rank_correlation(group_means(score, groups.tolist()), group_means(dice, groups.tolist()))
            )
        content[name] = of
    return content


def _with_interval(statistic: Callable[[NDArray[np.int64]], float], groups: NDArray[Any]) -> dict[str, float | None]:
    value = statistic(np.arange(len(groups)))
    if np.isnan(value):
        return {"estimate": None, "low": None, "high": None}
    low, high = by_group_interval(statistic, groups.tolist())
    return {"estimate": _number(value), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
