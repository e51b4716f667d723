"""Small receipts of made-up models on drawn masks, in the real format; see test_report.py."""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from polypseg import zoo
from polypseg.data.catalog import CLIP_COLUMN, DATASETS
from polypseg.evaluation.evaluate import score_predictions
from polypseg.provenance.passport import ImagePrint, SplitManifest
from polypseg.report import write_report
from polypseg.zoo import ZooEntry

SIDE = 24
SMALL_ENCODERS = {"resnet50": "resnet10t", "vit_base": "vit_tiny_patch16_224"}


@dataclass
class DrawnDataset:
    """Discs as masks, under the name of a dataset of the table; as much of PolypDataset as scoring needs."""

    name: str
    count: int
    spec: Any = field(init=False)
    by_id: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.spec = DATASETS[self.name]
        self.by_id = {name: name for name in (f"{k + 1:03d}" for k in range(self.count))}

    def mask(self, record: str) -> np.ndarray:
        rng = np.random.default_rng(int(record))
        y, x = np.mgrid[:SIDE, :SIDE]
        top, left = rng.uniform(8, SIDE - 8, 2)
        return ((y - top) ** 2 + (x - left) ** 2 < rng.uniform(3, 7) ** 2).astype(np.uint8)

    def manifest(self, split: str, part: str) -> SplitManifest:
        clip = self.spec.groups.get(CLIP_COLUMN)
        prints = [
            ImagePrint(
                id=name,
                pixels=hashlib.sha256(f"{self.name} {name}".encode()).hexdigest()[:32],
                hash="0" * 64,
                clip=clip(name, "") if clip else None,
            )
            for name in self.by_id
        ]
        content = hashlib.sha256(f"{self.name} {self.count}".encode()).hexdigest()[:16]
        return SplitManifest(dataset=self.name, split=split, part=part, content_id=content, images=tuple(prints))


class DrawnNegatives(DrawnDataset):
    """The same without polyps."""

    def mask(self, record: str) -> np.ndarray:
        return np.zeros((SIDE, SIDE), dtype=np.uint8)


@dataclass
class DrawnPredictions:
    """The truth under noise: the less skill, the more of it."""

    name: str
    weights_origin: dict[str, Any]
    skill: float
    seed: int

    @property
    def origin(self) -> dict[str, Any]:
        return {"source": "model", "weights_origin": self.weights_origin}

    def predict(self, dataset: DrawnDataset, ids: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for record_id in ids:
            rng = np.random.default_rng([self.seed, int(record_id), len(dataset.name)])
            noise = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 2) * 14
            logit = self.skill * (4.0 * dataset.mask(record_id) - 2) + noise * rng.exponential()
            yield record_id, (1 / (1 + np.exp(-logit))).astype(np.float32)


def small_origin(entry: ZooEntry, *, seed: int) -> dict[str, Any]:
    """``weights_origin`` of a row's stand-in with a small encoder."""
    origin = {
        "model_id": f"{SMALL_ENCODERS[entry.encoder]}_{entry.decoder}.{entry.tag}",
        "row": entry.model_id,
        "scale": "small",
        "encoder_initialisation": "random" if entry.method == "none" else f"own run, {entry.tag}",
        "recipe": "finetune_small",
        "recipe_changes": [f"seed={seed}"],
        "finetuned_on": "kvasir_seg reference/train",
        "n": 800,
        "finished": True,
        "sha256": hashlib.sha256(f"{entry.model_id} {seed}".encode()).hexdigest(),
    }
    if entry.method != "none":
        origin["pretraining"] = {
            "method": entry.method,
            "recipe": f"pretrain_{entry.method}_small",
            "source": "drawn-frames",
            "frames": 2000,
        }
    return origin


def smoke_origin(entry: ZooEntry, *, seed: int) -> dict[str, Any]:
    """``weights_origin`` as the study writes it at smoke scale, where every encoder starts at random."""
    encoder = {"resnet50": "resnet18", "vit_base": "vit_tiny_patch16_224"}[entry.encoder]
    return small_origin(entry, seed=seed) | {
        "model_id": f"{encoder}_{entry.decoder}.random",
        "encoder_initialisation": "random",
        "recipe": "smoke",
        "recipe_changes": [f"seed={seed}", f'model.encoder="{encoder}"'],
        "pretraining": None,
        "finetuned_on": "synthetic_a reference/train",
    }


def write_receipt(
    folder: Path,
    entry: ZooEntry,
    *,
    seed: int,
    dataset: DrawnDataset,
    split: str,
    part: str,
    skill: float,
    conventions: Sequence[str] = ("paper", "calibration"),
    origin: dict[str, Any] | None = None,
) -> Path:
    """One receipt, with the predicted masks where ``evaluate --save-masks`` puts them; returns its path."""
    name = entry.model_id if origin else f"{small_origin(entry, seed=seed)['model_id']}-seed{seed}"
    origin = origin or small_origin(entry, seed=seed)
    number = int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
    result = score_predictions(
        DrawnPredictions(name=name, weights_origin=origin, skill=skill, seed=number),
        dataset,
        split=split,
        part=part,
        manifest=dataset.manifest(split, part),
        conventions=conventions,
        masks=folder / name / "masks" / dataset.name,
    )
    return result.write(folder)


TESTS = (("kvasir_seg", "reference", "test", 10), ("cvc_clinicdb", "full", "full", 60))


def write_study(folder: Path, skills: dict[ZooEntry, tuple[float, float]], *, seeds: int = 2) -> Path:
    """Receipts of every row and seed on both tests; ``skills``: row -> skill in and out of distribution."""
    for k, (name, split, part, count) in enumerate(TESTS):
        dataset = DrawnDataset(name, count)
        for entry, skill in skills.items():
            for seed in range(seeds):
                write_receipt(
                    folder, entry, seed=seed, dataset=dataset, split=split, part=part, skill=skill[k] + 0.05 * seed
                )
    return folder


SKILLS = {
    zoo.get("RN-IN-MC"): (1.2, 0.3),
    zoo.get("RN-NA-NA"): (0.4, 0.35),
    zoo.get("VT-IN-MA"): (1.3, 1.2),
}
INSIDE, OUTSIDE = (".".join(test[:3]) for test in TESTS)
READING = """# What we make of it

On the other set **VT-IN-MA** has a Dice of {{ mean("VT-IN-MA", "out") }}, <script>alert(1)</script>
and ![tracker](http://example.org/x.png).
"""


@cache
def rendered_report() -> Path:
    """The report of a study of three rows and two seeds with pictures and a reading, made once a session."""
    folder = Path(tempfile.mkdtemp(prefix="polypseg-report-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_study(folder / "receipts", SKILLS)
    (folder / "reading.md").write_text(READING, encoding="utf-8")
    return render(folder, "report.html")


def render(folder: Path, name: str) -> Path:
    """The report of ``folder/receipts``."""
    return write_report(
        folder / "receipts",
        folder / name,
        title="A <study> & more",
        inside=INSIDE,
        outside=OUTSIDE,
        masks=folder / "receipts",
        sources={"kvasir_seg": write_frames(folder / "frames", DrawnDataset("kvasir_seg", 10))},
        reading=folder / "reading.md",
        resamples=300,
    )


def write_frames(folder: Path, dataset: DrawnDataset) -> Path:
    """The drawn masks with gray frames, as a folder of images and masks."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for record in dataset.by_id:
        mask = dataset.mask(record)
        Image.fromarray(np.full((SIDE, SIDE, 3), 120, dtype=np.uint8)).save(folder / "images" / f"{record}.png")
        Image.fromarray(mask * 255).save(folder / "masks" / f"{record}.png")
    return folder
