"""Synthetic sets that differ in one injected factor, and two segmenters whose sensitivity is known or learned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from polypseg.data.catalog import get_spec
from polypseg.data.polyps import PolypDataset, SyntheticOptions, SyntheticSource, index_records
from polypseg.data.synthetic import CAMERAS
from polypseg.shift import FACTORS, MeasuredSet
from polypseg.shift.frame_statistics import measure_frame

SIDE, COUNT = 96, 12
PLAIN = replace(CAMERAS["a"], text_share=0.0, box_share=0.0, polyp_area_spread=0.35, second_polyp_share=0.0)
INJECTED = {
    "colour": replace(PLAIN, mucosa=(0.62, 0.42, 0.42)),
    "sharpness": replace(PLAIN, blur=(0.02, 0.022)),
    "border": replace(PLAIN, border="ellipse", border_size=0.97, border_color=(15, 16, 19)),
    "scale": replace(PLAIN, polyp_area_median=0.032),
    "compression": replace(PLAIN, jpeg_quality=(8, 9)),
}
"""Factor -> the camera in which only it is changed."""
STYLES = {"plain": PLAIN, **INJECTED}
"""What ``draw`` draws by; a test puts them among the package's cameras for its time."""


def draw(camera: str, *, seed: int, count: int = COUNT) -> PolypDataset:
    """Frames of one of STYLES."""
    source = SyntheticSource(camera, SyntheticOptions(count=count, seed=seed, size=(SIDE, SIDE)))
    spec = replace(get_spec("synthetic_a"), title=f"camera {camera}, seed {seed}")
    return PolypDataset(spec=spec, source=source, records=index_records(spec, source))


def pixel_features(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) -> (H, W, K): color, local contrast at two scales, fine detail, blurred lightness, block steps."""
    lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = lab[..., 0]
    layers = [*np.moveaxis(lab, 2, 0)]
    for sigma in (3, 9):
        mean = cv2.GaussianBlur(light, (0, 0), sigma)
        layers += [mean, np.sqrt(np.maximum(cv2.GaussianBlur(light**2, (0, 0), sigma) - mean**2, 0))]
    layers.append(cv2.GaussianBlur(np.abs(cv2.Laplacian(light, cv2.CV_32F)), (0, 0), 4))
    layers += [cv2.GaussianBlur(plane, (0, 0), 12) for plane in np.moveaxis(lab, 2, 0)]
    return np.stack(layers, axis=-1)


@dataclass(frozen=True)
class PixelClassifier:
    """A logistic regression of pixel features as a source of predictions."""

    model: object
    name: str = "pixels"
    origin: dict = field(default_factory=dict)

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for record_id in ids:
            frame = np.asarray(dataset.frame(dataset.by_id[record_id]))
            features = pixel_features(frame).reshape(-1, 11)
            share = self.model.predict_proba(features)[:, 1].reshape(frame.shape[:2])
            yield record_id, share.astype(np.float32)


@cache
def pixel_classifier() -> PixelClassifier:
    """Trained on the plain camera."""
    data, rng = draw("plain", seed=1, count=30), np.random.default_rng(0)
    xs, ys = [], []
    for record in data.records:
        frame, mask = data.pair(record)
        chosen = rng.permutation(SIDE * SIDE)[:1500]
        xs.append(pixel_features(np.asarray(frame)).reshape(-1, 11)[chosen])
        ys.append(mask.reshape(-1)[chosen])
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
    return PixelClassifier(model.fit(np.concatenate(xs), np.concatenate(ys)))


@dataclass(frozen=True)
class KnownSensitivity:
    """Finds the true mask, displaced by how far a frame's measures lie from those of a reference set.

    Each factor counts alike: its displacement is the mean distance of its measures, in the reference's spreads, at
    most 4. So what a factor costs is known: it grows with how far the factor moves its own measures.
    """

    reference: MeasuredSet
    name: str = "known"
    origin: dict = field(default_factory=dict)

    def displacement(self, frame: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
        """In pixels."""
        found, total = measure_frame(frame, mask), 0.0
        for factor in FACTORS:
            names = [name for name in factor.measures if name in found and name in self.reference.values]
            if not names or factor.name == "resolution":  # all frames have one size
                continue
            columns = {name: self.reference.values[name] for name in names}
            z = [abs(found[name] - x.mean()) / max(x.std(), 1e-3) for name, x in columns.items()]
            total += min(4.0, float(np.mean(z)))
        return total

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for record_id in ids:
            frame, mask = dataset.pair(dataset.by_id[record_id])
            moved = self.displacement(np.asarray(frame), mask)
            yield record_id, np.roll(mask, round(moved), axis=1).astype(np.float32)


__all__ = ["INJECTED", "KnownSensitivity", "draw", "pixel_classifier"]
