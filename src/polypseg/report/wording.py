"""How numbers are written, and what may be said of a change of ranking."""

from collections.abc import Callable, Mapping, Sequence

from polypseg.statistics import Interval, RankChange

ALPHA = 0.05
MINUS = "−"


def number(value: float | None, *, digits: int = 3, signed: bool = False) -> str:
    """A score with a true minus sign; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    zero = float(text) == 0
    return (text.lstrip("+-") if zero else text).replace("-", MINUS)


def between(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """An interval in brackets; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]"


def with_interval(value: float, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``0.871 [0.837, 0.899]``; the number alone where there is no interval."""
    return f"{number(value, signed=signed)} {between(low, high, signed=signed)}".strip()


def percent(share: float) -> str:
    """A share as whole percent that says neither 0 nor 100 of what is neither."""
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def p_value(p: float) -> str:
    """``p = 0.013``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def short_p(p: float) -> str:
    """``0.013``, ``< 0.001``: under a heading that says p."""
    return p_value(p).removeprefix("p ").removeprefix("= ")


def rank(value: float) -> str:
    """``3``, and ``3.5`` for a shared place."""
    return f"{value:g}"


def span(interval: Interval) -> str:
    """``0.61 [0.33, 0.79]`` with two digits, for correlations."""
    bounds = (
        ""
        if interval.low is None or interval.high is None
        else (f" [{number(interval.low, digits=2)}, {number(interval.high, digits=2)}]")
    )
    return number(interval.estimate, digits=2) + bounds


def rank_change_verdict(
    change: RankChange, *, label: Callable[[str], str], certain: Sequence[Mapping[str, object]] | None = None
) -> tuple[str, tuple[str, ...]]:
    """A short answer to "is the ranking change real?" and the sentences behind it; ``label``: a row's name in text.

    ``certain``: the pairs shown to change places; by default those that the images show, whatever the training runs do.
    """
    agreement = change.agreement
    if certain is None:
        certain = [pair for pair in change.pairs if pair["p_flip_holm"] < ALPHA]
    rejected = agreement.p_one_order < ALPHA
    flipped = sum(pair["flipped"] for pair in change.pairs)
    sentences = [_observed(change), _test_sentence(agreement.p_one_order, rejected=rejected)]
    if agreement.tau.estimate < 1 - 1e-9:
        sentences.append(_noise_sentence(change))
    sentences.append(_pair_sentence(certain, flipped=flipped, label=label))
    sentences.append(_winner_sentence(change, label=label))
    return _answer(change, rejected=rejected, certain=bool(certain)), tuple(sentences)


def no_verdict(change: RankChange) -> tuple[str, tuple[str, ...]]:
    """What takes the place of the verdict with one training run per row: nothing is claimed."""
    return "Not claimed: there is one training run a row.", (
        _observed(change, interval=False),
        "These numbers describe the networks at hand: another training run of the same recipe may rank them otherwise, "
        "which images alone cannot tell.",
    )


def _observed(change: RankChange, *, interval: bool = True) -> str:
    moved, flipped = (
        sum(row["rank_change"] != 0 for row in change.rows()),
        sum(pair["flipped"] for pair in change.pairs),
    )
    tau = span(change.agreement.tau) if interval else number(change.agreement.tau.estimate, digits=2)
    return (
        f"{moved} of {len(change.models)} models change rank between the two tests; {flipped} of {len(change.pairs)} "
        f"pairs stand in opposite orders. Kendall’s τ between the rankings is {tau}."
    )


def _answer(change: RankChange, *, rejected: bool, certain: bool) -> str:
    if change.agreement.tau.estimate >= 1 - 1e-9:
        return "There is none: the models stand in the same order in both tests."
    if rejected and certain:
        return "Yes: the order changes, and single pairs that change places can be named."
    if rejected:
        return "Yes for the order as a whole; no single pair that changes places can be named."
    if certain:
        return "For single pairs yes; for the order as a whole it is not shown."
    return "Not shown: these images are compatible with one order of the models in both tests."


def _test_sentence(p: float, *, rejected: bool) -> str:
    if rejected:
        return f"That one order, ties allowed, is true in both tests is rejected ({p_value(p)})."
    return (
        f"That one order, ties allowed, is true in both tests is not rejected ({p_value(p)}), which does not prove "
        "that the order is the same: smaller changes may lie hidden in the noise."
    )


def _noise_sentence(change: RankChange) -> str:
    agreement = change.agreement
    retests = f"{number(agreement.retest_inside, digits=2)} in and {number(agreement.retest_outside, digits=2)} out of"
    share = "" if agreement.noise_share is None else f" ({percent(agreement.noise_share)} of the disagreement)"
    return (
        f"If one strict order were true in both, noise alone would leave a τ of about "
        f"{number(agreement.expected_tau, digits=2)}{share}; two draws of images agree with each other by a τ of "
        f"{retests} distribution. These describe, they do not test."
    )


def _pair_sentence(certain: Sequence[Mapping[str, object]], *, flipped: int, label: Callable[[str], str]) -> str:
    if not certain:
        return (
            ""
            if not flipped
            else ("No pair is shown to change places (both differences beyond chance, Holm over all pairs).")
        )
    names = ", ".join(f"{label(str(pair['a']))} and {label(str(pair['b']))}" for pair in certain)
    return (
        f"Shown to change places (both differences beyond chance, Holm-adjusted p < {ALPHA} over all pairs): {names}."
    )


def _winner_sentence(change: RankChange, *, label: Callable[[str], str]) -> str:
    rows = change.rows()
    best, out = min(rows, key=lambda row: row["rank_inside"]), min(rows, key=lambda row: row["rank_outside"])
    stays = percent(change.agreement.winner_stays)
    if best["model"] == out["model"]:
        return (
            f"The best model in distribution, {label(best['model'])}, is the best outside too, in {stays} of the draws."
        )
    return (
        f"The best model in distribution, {label(best['model'])}, has rank {rank(best['rank_outside'])} outside and is "
        f"the best there in {stays} of the draws; by its mean the best outside is {label(out['model'])}."
    )
