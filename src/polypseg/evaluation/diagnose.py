"""From which metric convention a published pair of Dice and IoU can come, and from which it cannot.

For one pair of masks, IoU = f(Dice) with f(d) = d / (2 - d): increasing, f(0) = 0, f(1) = 1, f'' = 4 / (2 - d)^3, so
convex with 1/2 <= f'' <= 4 on [0, 1]. All that follows are consequences:

- Pooled pixels are one pair of masks: J = f(D) exactly.
- Means over items (images, classes, thresholds) of pairs (d, f(d)): Jensen's inequality for a convex f gives
  J = mean f(d) >= f(mean d) = f(D), with equality only if all items agree. Convexity between 0 and 1 gives f(d) <= d,
  so J <= D. With k items, J is largest where all but one are 0 or 1 (a convex function over {d in [0, 1]^k, mean d = D}
  is largest at a vertex): J <= (m + f(kD - m)) / k with m = floor(kD).
- The gap J - f(D) lies between Var(d)/4 and 2 Var(d) (Taylor with 1/2 <= f'' <= 4), so it bounds the spread of d.
- Maxima over thresholds lie between the same lines: J_max >= J(t of D_max) >= f(D_max), J_max = J(t) <= D(t) <= D_max.
- Dice = H(precision, recall), the harmonic mean, for one pair of masks. H is concave, so for means over items
  D <= H(mean precision, mean recall).
"""

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from polypseg.errors import UsageError

THRESHOLD_COUNT = 256
CREDIBLE_SPREAD = 0.05
"""A standard deviation of per-image Dice below which a mean over images is not believed. A judgment, no theorem."""
Interval = tuple[float, float]


def iou_of_dice(dice: float) -> float:
    """IoU of one pair of masks from its Dice, f(d) = d / (2 - d)."""
    return dice / (2 - dice)


def highest_iou(dice: float, items: float) -> float:
    """The highest mean IoU of ``items`` pairs of masks (math.inf allowed) whose mean Dice is ``dice`` in [0, 1]."""
    if math.isinf(items):
        return dice
    total = dice * items
    whole = math.floor(total + 1e-12)
    return (whole + iou_of_dice(max(total - whole, 0.0))) / items


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a published pair says about how it was computed. All scores are fractions."""

    verdict: str
    """"pooled", "means", "undecided" (on the curve, but rounding is too coarse to tell), "smoothed" (Dice above 1, by
    the reference's formula) or "impossible" (by no convention that gives two empty masks at most 1)."""
    dice: float
    iou: float
    tolerance: float
    """What rounding or cutting off may have moved each number by."""
    gap: float
    """IoU - f(Dice)."""
    rounding: Interval
    """The gaps that rounding alone can make of an exact J = f(D)."""
    spread: Interval
    """Bounds of the standard deviation of Dice over the items, if the pair is a mean over items."""
    possible: tuple[str, ...]
    """Conventions of polypseg.evaluation.conventions that can give this pair."""
    excluded: tuple[str, ...]
    """Those that cannot."""
    reasons: tuple[str, ...]

    @property
    def words(self) -> str:
        """The reasons as one text."""
        return " ".join(self.reasons)


def diagnose(
    dice: float,
    iou: float,
    n: int | None = None,
    *,
    tolerance: float | None = None,
    precision: float | None = None,
    recall: float | None = None,
) -> Diagnosis:
    """Say which conventions a published (Dice, IoU) pair of ``n`` images can come from; fractions, or percent above 2.

    ``tolerance``: what each number may be off by, in its own unit; by default one unit of the last digit of the longer
    number, which covers rounding as well as cutting off. Floats lose trailing zeros: give it for 0.90 and 0.82.
    ``precision`` and ``recall`` of the same row add a second test. Raises UsageError for numbers that are no scores.
    """
    numbers = [x for x in (dice, iou, precision, recall) if x is not None]
    if not all(math.isfinite(x) and 0 <= x <= 100 for x in numbers) or (n is not None and n < 1):
        raise UsageError(
            f"Dice {dice} and IoU {iou} of {n} image(s): scores lie in 0 to 1 or 0 to 100, n is at least 1"
        )
    off = 10.0 ** -max(_decimals(dice), _decimals(iou)) if tolerance is None else tolerance
    if not off >= 0:
        raise UsageError(f"the tolerance {tolerance} is below 0")
    if max(dice, iou) > 2:
        if min(dice, iou) <= 1 and max(dice, iou) > 4:
            raise UsageError(f"Dice {dice} and IoU {iou}: one looks like a fraction, the other like percent")
        dice, iou, off = dice / 100, iou / 100, off / 100
        precision, recall = (None if x is None else x / 100 for x in (precision, recall))
    return _judge(_Pair(dice=dice, iou=iou, off=off, n=n, harmonic=_harmonic(precision, recall, off)))


def _decimals(number: float) -> int:
    return len(f"{number:.10f}".rstrip("0").partition(".")[2])


def _harmonic(precision: float | None, recall: float | None, off: float) -> Interval | None:
    """Bounds of the harmonic mean of two numbers that may each be off."""
    if precision is None or recall is None:
        return None
    pairs = ((max(precision - off, 0.0), max(recall - off, 0.0)), (precision + off, recall + off))
    low, high = (2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs)
    return low, high


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A published pair with its uncertainty."""

    dice: float
    iou: float
    off: float
    n: int | None
    harmonic: Interval | None

    @property
    def dice_range(self) -> Interval:
        return min(max(self.dice - self.off, 0.0), 1.0), min(self.dice + self.off, 1.0)

    @property
    def gaps(self) -> Interval:
        """The smallest and largest J - f(D) of numbers that round to the pair."""
        low, high = self.dice_range
        return self.iou - self.off - iou_of_dice(high), self.iou + self.off - iou_of_dice(low)

    def mean_of(self, items: float) -> bool:
        """Whether the pair can be a mean over ``items`` pairs of masks."""
        highest = highest_iou(self.dice_range[1], items)
        within = self.gaps[1] >= 0 and self.iou - self.off <= highest + 1e-12
        return self.dice - self.off <= 1 and within and not self.beats_harmonic

    @property
    def beats_harmonic(self) -> bool:
        """Whether Dice exceeds the harmonic mean of precision and recall, which no mean over items does."""
        return self.harmonic is not None and self.dice_range[0] > self.harmonic[1]

    def fits(self) -> dict[str, bool]:
        """Convention -> whether it can give the pair."""
        images = math.inf if self.n is None else self.n
        lowest_harmonic = self.harmonic[0] if self.harmonic else 0.0
        # Two empty masks are (2, 1) for the reference. With them, pairs fill the hull of the curve and that point.
        with_empties = self.dice / 2 - self.off <= self.iou <= min(self.dice, 1) + 2 * self.off and self.dice <= 2
        return {
            "paper": self.mean_of(images),
            "ssl4gie": self.mean_of(images) or with_empties,
            "pooled": self.mean_of(1) and self.dice_range[1] >= lowest_harmonic,
            "pranet": self.mean_of(images * THRESHOLD_COUNT),
            "pranet_rescaled": self.mean_of(images * THRESHOLD_COUNT),
            "fg_bg_mean": self.mean_of(2 * images),
            "fg_bg_pooled": self.mean_of(2),
        }


def _judge(pair: _Pair) -> Diagnosis:
    fits, (smallest, largest) = pair.fits(), pair.gaps
    spread = (math.sqrt(max(smallest, 0.0) / 2), min(2 * math.sqrt(max(largest, 0.0)), 0.5))
    curve, (low, high) = iou_of_dice(min(pair.dice, 1.0)), pair.dice_range
    rounding = (iou_of_dice(low) - curve - pair.off, iou_of_dice(high) - curve + pair.off)
    verdict, reasons = _verdict(pair, fits, spread)
    return Diagnosis(
        verdict=verdict,
        dice=pair.dice,
        iou=pair.iou,
        tolerance=pair.off,
        gap=pair.iou - curve,
        rounding=rounding,
        spread=spread,
        possible=tuple(name for name, fit in fits.items() if fit),
        excluded=tuple(name for name, fit in fits.items() if not fit),
        reasons=(
            f"Dice {pair.dice:.4f} as one pair of masks means IoU {curve:.4f}; published is {pair.iou:.4f}, "
            f"{pair.iou - curve:+.4f}. Rounding explains {rounding[0]:+.4f} to {rounding[1]:+.4f}.",
            *reasons,
        ),
    )


def _verdict(pair: _Pair, fits: dict[str, bool], spread: Interval) -> tuple[str, list[str]]:
    if pair.dice - pair.off > 1:
        formula = "the reference's smoothed formula gives two empty masks Dice 2 and IoU 1"
        if fits["ssl4gie"]:
            return "smoothed", [f"A Dice above 1 is no mean of scores up to 1; {formula}."]
        return "impossible", [f"A Dice above 1 is no mean of scores up to 1, and though {formula}, these do not fit."]
    if not any(fit for name, fit in fits.items() if name != "ssl4gie"):
        return "impossible", _why_impossible(pair)
    if not fits["pooled"]:
        return "means", _why_means(pair, spread)
    reasons = ["So it can be pooled over the pixels of the set (or one image)."]
    if pair.harmonic:
        reasons.append("Dice is the harmonic mean of precision and recall, as for pooled pixels.")
    if pair.n == 1:
        return "pooled", [*reasons, "Of one image, the mean over images is the same."]
    reasons.append(f"As a mean over images, their Dice would have a standard deviation of at most {spread[1]:.3f}.")
    if spread[1] < CREDIBLE_SPREAD:
        return "pooled", [*reasons, "No model is that even: it is pooled."]
    return "undecided", [
        *reasons,
        "So wide a spread is usual: these digits cannot tell a mean from pooled pixels.",
    ]


def _why_means(pair: _Pair, spread: Interval) -> list[str]:
    reasons = []
    if pair.gaps[0] > 0:
        reasons.append(
            "So it is not pooled: IoU lies above the curve, as for means, whose Dice has a standard deviation of at "
            f"least {spread[0]:.3f} over images, classes or thresholds; the pair does not say over which."
        )
    else:
        reasons.append("IoU fits pooled pixels, but Dice is not the harmonic mean of precision and recall: means.")
    if pair.n is not None and not pair.mean_of(pair.n):
        most = highest_iou(pair.dice_range[1], pair.n)
        reasons.append(
            f"A mean over {pair.n} image(s) of this Dice reaches IoU {most:.4f} at most: over thresholds then."
        )
    if pair.fits()["fg_bg_pooled"]:
        polyp, background = two_classes(pair.dice, pair.iou, tolerance=3 * pair.off + 1e-9)
        reasons.append(f"As a mean of two classes, it would be Dice {polyp:.3f} and {background:.3f}.")
    else:
        reasons.append("It is too far above for a mean of polyp and background of pooled pixels.")
    return reasons


def _why_impossible(pair: _Pair) -> list[str]:
    if pair.beats_harmonic:
        return ["Dice exceeds the harmonic mean of precision and recall, which no mean over the same masks does."]
    if pair.gaps[1] < 0:
        reasons = [
            "Means lie on or above the curve (Jensen), so no convention gives this pair for the same masks: a "
            "misprint, or two conventions or models in one row, such as Dice averaged over images and IoU pooled."
        ]
        polyp = 2 * pair.iou / (1 + pair.iou)
        background = 2 * pair.dice - polyp
        if polyp + 0.01 < background <= 1:
            reasons.append(
                f"Dice as the mean of polyp ({polyp:.3f}) and background ({background:.3f}) beside the polyp's IoU "
                "would fit."
            )
        if pair.fits()["ssl4gie"]:
            reasons.append("So would the reference's smoothed formula, if some images have no polyp: there Dice is 2.")
        return reasons
    if pair.mean_of(math.inf):
        return [f"IoU is above what {pair.n} image(s) of this mean Dice reach, even over 256 thresholds."]
    reasons = ["IoU exceeds Dice, which no mean over the same masks gives."]
    if pair.iou - pair.off <= (1 + pair.dice_range[1]) / 2:
        reasons.append("IoU averaged over polyp and background beside the polyp's Dice would fit.")
    return reasons


def two_classes(dice: float, iou: float, *, tolerance: float = 1e-9) -> Interval:
    """The two classes' Dice, lower first, whose means are ``dice`` and ``iou``; equal when IoU is too low for a mean.

    Raises ValueError when IoU is too high for two classes by more than ``tolerance``.
    """
    widest = min(dice, 1 - dice)

    def excess(half: float) -> float:
        return (iou_of_dice(dice - half) + iou_of_dice(dice + half)) / 2 - iou

    if excess(0.0) >= 0:
        return dice, dice
    if excess(widest) < -tolerance:
        raise ValueError(f"no two classes have the mean Dice {dice} and the mean IoU {iou}")
    if excess(widest) < 0:
        return dice - widest, dice + widest
    half = float(brentq(excess, 0.0, widest))
    return dice - half, dice + half
