"""Learners of the expected Dice, from a line to boosted trees, and the baselines that they must beat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import Ridge

from polypseg.expectation.features import ALL, SINGLE
from polypseg.expectation.predictor import Linear, Predictor, Steps, Trees

Floats = NDArray[np.float64]
Learn = Callable[[Floats, Floats], Predictor]
"""Features (N, len(ALL)) and Dice (N,) -> a predictor."""
_LEAST = 0.02
"""Dice is kept this far from 0 and 1 before its logit is taken."""


def columns(features: Floats, names: Sequence[str]) -> Floats:
    """(N, len(ALL)) -> (N, len(names))."""
    return features[:, [ALL.index(name) for name in names]]


def predict(predictor: Predictor, features: Floats) -> Floats:
    """(N, len(ALL)) -> expected Dice (N,)."""
    return predictor(columns(features, predictor.features))


def learn_steps(features: Floats, dice: Floats, *, feature: str) -> Steps:
    """Isotonic regression on one feature."""
    values = columns(features, [feature])[:, 0]
    fitted = IsotonicRegression(increasing="auto", out_of_bounds="clip").fit(values, dice)
    x, y = fitted.X_thresholds_, fitted.y_thresholds_
    return Steps(feature=feature, x=tuple(np.round(x, 6).tolist()), y=tuple(np.round(y, 5).tolist()))


def learn_linear(features: Floats, dice: Floats, *, names: Sequence[str]) -> Linear:
    """Ridge regression of the logit of Dice, on features scaled by their spread."""
    values = columns(features, names)
    low, high = np.quantile(values, [0.005, 0.995], axis=0)
    inside = np.clip(values, low, high)
    mean, spread = inside.mean(axis=0), np.maximum(inside.std(axis=0), 1e-6)
    kept = np.clip(dice, _LEAST, 1 - _LEAST)
    fitted = Ridge(alpha=10.0).fit((inside - mean) / spread, np.log(kept / (1 - kept)))
    weights = fitted.coef_ / spread
    return Linear(
        features=tuple(names),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        weights=tuple(weights.tolist()),
        intercept=float(fitted.intercept_ - mean @ weights),
    )


def learn_trees(features: Floats, dice: Floats, *, names: Sequence[str]) -> Trees:
    """Gradient boosting of shallow trees."""
    fitted = GradientBoostingRegressor(
        n_estimators=120, learning_rate=0.06, max_depth=3, min_samples_leaf=25, subsample=0.7, max_features=0.5,
        random_state=0,
    ).fit(columns(features, names).astype(np.float32), dice)  # fmt: skip
    trees = []
    for (estimator,) in fitted.estimators_:
        tree = estimator.tree_
        leaf = tree.children_left < 0
        trees.append(
            {
                "feature": np.where(leaf, -1, tree.feature).tolist(),
                # float32 numbers: what is compared is float32 too, so nothing changes side when they are read again
                "threshold": [float(np.float32(value)) for value in np.where(leaf, 0, tree.threshold)],
                "left": tree.children_left.tolist(),
                "right": tree.children_right.tolist(),
                "value": np.round(fitted.learning_rate * tree.value[:, 0, 0], 7).tolist(),
            }
        )
    return Trees(features=tuple(names), start=float(fitted.init_.constant_[0, 0]), trees=tuple(trees))


def _learner(learn: Callable[..., Predictor], **options: Any) -> Learn:
    return lambda features, dice: learn(features, dice, **options)


LEARNERS: Mapping[str, Learn] = {
    "isotonic on soft Dice": _learner(learn_steps, feature="soft_dice"),
    "isotonic on agreement": _learner(learn_steps, feature="soft_agreement"),
    "line, soft Dice and agreement": _learner(learn_linear, names=("soft_dice", "agree_flip", "soft_agreement")),
    "line, one pass": _learner(learn_linear, names=SINGLE),
    "line, three passes": _learner(learn_linear, names=ALL),
    "trees, one pass": _learner(learn_trees, names=SINGLE),
    "trees, three passes": _learner(learn_trees, names=ALL),
}
"""In order of size."""


def baselines(anchor: Floats, anchor_dice: Floats, features: Floats) -> dict[str, Floats]:
    """What is known without learning from anything but one labelled set: name -> (N,) whose mean is the estimate.

    ``anchor`` (M, len(ALL)) and ``anchor_dice`` (M,) are that set's, ``features`` (N, len(ALL)) the frames'.
    """
    level = float(anchor_dice.mean())
    one, other = (columns(values, ["soft_dice"])[:, 0] for values in (anchor, features))
    limit = float(np.quantile(one, 1 - level))
    found = {
        "anchor Dice": np.full(len(features), level),
        "mean soft Dice": other,
        "DoC of soft Dice": level + other - one.mean(),
        "ATC of soft Dice": (other > limit).astype(np.float64),
    }
    for title, name in (("confidence", "inside"), ("entropy", "entropy"), ("agreement", "soft_agreement")):
        found[title] = predict(learn_steps(anchor, anchor_dice, feature=name), features)
    return found
