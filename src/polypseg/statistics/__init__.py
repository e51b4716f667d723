"""Statistics of generalization: intervals, comparisons, gaps and rankings that respect clips, repeats and seeds."""

from polypseg.statistics.comparisons import PairComparison, compare_models, effect_sizes, holm, sign_flip_p_values
from polypseg.statistics.generalization import (
    Contrast,
    Gap,
    Generalization,
    analyze_generalization,
    generalization_gaps,
    group_contrasts,
    study_groups,
)
from polypseg.statistics.intervals import (
    Interval,
    SampleWeight,
    design_effect,
    intra_cluster_correlation,
    mean_intervals,
    mean_rows,
    sample_weights,
)
from polypseg.statistics.rankings import (
    Agreement,
    RankChange,
    Ranking,
    agreement_row,
    analyze_rank_change,
    competition_ranks,
)
from polypseg.statistics.resampling import RESAMPLES, Draws, draw_both, draw_means
from polypseg.statistics.runs import RunVariation, run_variation, widened
from polypseg.statistics.scores import ScoreSet, score_set

__all__ = [
    "RESAMPLES",
    "Agreement",
    "Contrast",
    "Draws",
    "Gap",
    "Generalization",
    "Interval",
    "PairComparison",
    "RankChange",
    "Ranking",
    "RunVariation",
    "SampleWeight",
    "ScoreSet",
    "agreement_row",
    "analyze_generalization",
    "analyze_rank_change",
    "compare_models",
    "competition_ranks",
    "design_effect",
    "draw_both",
    "draw_means",
    "effect_sizes",
    "generalization_gaps",
    "group_contrasts",
    "holm",
    "intra_cluster_correlation",
    "mean_intervals",
    "mean_rows",
    "run_variation",
    "sample_weights",
    "score_set",
    "sign_flip_p_values",
    "study_groups",
    "widened",
]
