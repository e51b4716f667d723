"""The answer of a study in three sentences: scores, ranking, starts. Nothing is claimed from one training run a row."""

from collections.abc import Sequence

from polypseg.report.analysis import Analysis
from polypseg.report.wording import number, rank_change_verdict, with_interval

_WHERE = {"inside": "in distribution", "outside": "out of distribution", "gap": "in the loss between the two"}


def answer_sentences(analysis: Analysis) -> tuple[str, str, str]:
    """What the page says first; the numbers are those of its tables."""
    if analysis.inside is None or analysis.outside is None:
        return (
            "There is no answer yet: no model was tested both in and out of distribution.",
            "The tables below hold the scores of the tests that there are.",
            "What is missing stands in the list above.",
        )
    return _scores(analysis), _ranking(analysis), _contrasts(analysis)


def _scores(analysis: Analysis) -> str:
    material = analysis.material
    parts = []
    for where, scores, test in (
        ("in distribution", analysis.inside, material.inside),
        ("out of distribution", analysis.outside, material.outside),
    ):
        assert scores is not None
        means = dict(zip(scores.models, scores.means.tolist(), strict=True))
        best = max(means, key=lambda model: means[model])
        span = " to ".join(dict.fromkeys(number(value) for value in (min(means.values()), means[best])))
        name = f", highest for {material.label(best)}" if len(means) > 1 else ""
        parts.append(f"{where} ({material.test_title(test)}) {span}{name}")
    return f"Mean Dice is {'; '.join(parts)}."


def _ranking(analysis: Analysis) -> str:
    if not analysis.claims:
        return (
            "Each row was trained once, so nothing is claimed of which model, encoder or start is better: "
            f"{_floor_sentence(analysis)}."
        )
    if analysis.change is None:
        return "There is one model, so there is no ranking to speak of."
    verdict, _ = rank_change_verdict(analysis.change, label=str, certain=analysis.certain_flips())
    return f"Does the ranking change from one to the other? {verdict}"


def _contrasts(analysis: Analysis) -> str:
    if not analysis.claims:
        return "For an answer, train every row with two or more seeds."
    if not analysis.contrasts:
        return "The rows differ in neither encoder nor start, so no question of the study can be asked of them."
    shown = [
        f"{contrast.name.replace(' - ', ' − ')} {_WHERE[which]} "
        + with_interval(value.estimate, value.low, value.high, signed=True)
        for contrast in analysis.contrasts
        for which in _WHERE
        for value in [getattr(contrast, which)]
        if analysis.is_shown(value)
    ]
    count = f"Of the {len(analysis.contrasts)} contrasts between encoders and starts"
    if not shown:
        return f"{count} none is beyond the chance of images and training runs ({_floor_sentence(analysis)})."
    return f"{count} these are beyond the chance of images and training runs: {_listed(shown)}."


def _listed(parts: Sequence[str]) -> str:
    return "; ".join(parts)


def _floor_sentence(analysis: Analysis) -> str:
    """The noise floor of two single runs in words, without a full stop."""
    runs = [analysis.runs.get(which) for which in ("inside", "outside")]
    if runs[0] is None or runs[1] is None:
        return "how far two training runs of one recipe lie apart was not measured here"
    floors = [number(run.floor(1, 1, seeds=1)) for run in runs if run is not None]
    return (
        f"two training runs of one recipe may lie {floors[0]} apart in distribution and {floors[1]} out of it "
        f"(95 % range, from {runs[0].runs} runs of {runs[0].groups} recipes)"
    )


def noise_sentences(analysis: Analysis) -> list[str]:
    """How the noise floor was measured, for the page's methods; one sentence that it was not, where it was not."""
    if not analysis.runs:
        return ["Run-to-run variation: not measured; no training was repeated with another seed."]
    found = []
    for which, words in _WHERE.items():
        run = analysis.runs.get(which)
        if run is not None:
            found.append(
                f"Run-to-run variation {words}: standard deviation {number(run.deviation, digits=4)} of mean Dice, "
                f"from {run.runs} runs of {run.groups} recipes ({run.freedom} degrees of freedom)."
            )
    return [
        *found,
        "Runs count as repeated when their records differ in nothing but the seed (and the row that a random start "
        "stands in for); an encoder pretrained once is shared by its repeats, so another pretraining is not covered. "
        "Noise floor of a difference: t(0.975) times that deviation times √(Σ 1 / (models of a side) / seeds). Drawing "
        "S trained networks from S shows (S − 1) / S of their variation; the rest of the floor is added to the "
        "interval of every difference between models, in quadrature.",
    ]
