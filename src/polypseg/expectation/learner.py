"""Learners of the expected Dice, and the baselines that they must beat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from polypseg.inference.features import ALL, SINGLE
from polypseg.inference.predictor import Linear, Predictor, Steps

Floats = NDArray[np.float64]
Learn = Callable[[Floats, Floats], Predictor]
"""Features (N, len(ALL)) and Dice (N,) -> a predictor."""


_FALLING = ("entropy", "doubt")
"""Features of which more means less."""


def columns(features: Floats, names: Sequence[str]) -> Floats:
    """(N, len(ALL)) -> (N, len(names))."""
    return features[:, [ALL.index(name) for name in names]]


def predict(predictor: Predictor, features: Floats) -> Floats:
    """(N, len(ALL)) -> expected Dice (N,)."""
    return predictor(columns(features, predictor.features))


def learn_steps(features: Floats, dice: Floats, *, feature: str) -> Steps:
    """Isotonic regression on one feature."""
    values = columns(features, [feature])[:, 0]
    fitted = IsotonicRegression(increasing=feature not in _FALLING, out_of_bounds="clip").fit(values, dice)
    x, y = fitted.X_thresholds_, fitted.y_thresholds_
    return Steps(feature=feature, x=tuple(np.round(x, 6).tolist()), y=tuple(np.round(y, 5).tolist()))


def learn_linear(features: Floats, dice: Floats, *, names: Sequence[str]) -> Linear:
    """Logistic regression of Dice as a share, on features scaled by their spread: its mean is that of Dice."""
    values = columns(features, names)
    low, high = np.quantile(values, [0.005, 0.995], axis=0)
    inside = np.clip(values, low, high)
    mean, spread = inside.mean(axis=0), np.maximum(inside.std(axis=0), 1e-6)
    scaled = np.tile((inside - mean) / spread, (2, 1))
    share = np.concatenate([dice, 1 - dice])
    fitted = LogisticRegression(C=1.0, max_iter=500).fit(scaled, np.repeat([1, 0], len(dice)), sample_weight=share)
    weights = fitted.coef_[0] / spread
    return Linear(
        features=tuple(names),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        weights=tuple(weights.tolist()),
        intercept=float(fitted.intercept_[0] - mean @ weights),
    )


def _learner(learn: Callable[..., Predictor], **options: Any) -> Learn:
    return lambda features, dice: learn(features, dice, **options)


LEARNERS: Mapping[str, Learn] = {
    "isotonic on soft Dice": _learner(learn_steps, feature="soft_dice"),
    "isotonic on agreement": _learner(learn_steps, feature="soft_agreement"),
    "line, soft Dice and agreement": _learner(learn_linear, names=("soft_dice", "agree_flip", "soft_agreement")),
    "line, one pass": _learner(learn_linear, names=SINGLE),
    "line, three passes": _learner(learn_linear, names=ALL),
}
"""In order of size."""


def baselines(anchor: Floats, anchor_dice: Floats) -> dict[str, Steps]:
    """What is known without learning from anything but one labeled set: name -> a line through one feature.

    ``anchor`` (M, len(ALL)) and ``anchor_dice`` (M,) are that set's.
    """
    level = float(anchor_dice.mean())
    soft = columns(anchor, ["soft_dice"])[:, 0]
    limit, offset = float(np.quantile(soft, 1 - level)), level - float(soft.mean())
    found = {
        "anchor Dice": Steps(feature="soft_dice", x=(0.0, 1.0), y=(level, level)),
        "mean soft Dice": Steps(feature="soft_dice", x=(0.0, 1.0), y=(0.0, 1.0)),
        "DoC of soft Dice": Steps(feature="soft_dice", x=(0.0, 1.0), y=(offset, 1 + offset)),
        "ATC of soft Dice": Steps(feature="soft_dice", x=(limit, limit + 1e-9), y=(0.0, 1.0)),
    }
    for title, name in (("confidence", "inside"), ("entropy", "entropy"), ("agreement", "soft_agreement")):
        found[title] = learn_steps(anchor, anchor_dice, feature=name)
    return found
