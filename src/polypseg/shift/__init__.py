"""How two datasets differ, and which of the differences costs a model what it loses between them."""

from polypseg.shift.attribution import Attribution, attribute_shift
from polypseg.shift.comparison import MeasuredSet, SetComparison, compare_sets, measure_set
from polypseg.shift.factors import FACTORS, Factor, Look, typical_look

__all__ = [
    "FACTORS",
    "Attribution",
    "Factor",
    "Look",
    "MeasuredSet",
    "SetComparison",
    "attribute_shift",
    "compare_sets",
    "measure_set",
    "typical_look",
]
