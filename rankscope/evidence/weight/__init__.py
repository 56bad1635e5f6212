"""The update against the weight that it changes: amplification, position, intruder dimensions."""

from rankscope.evidence.weight.measure import WeightComparison, measure_weight, verdicts

__all__ = ["WeightComparison", "measure_weight", "verdicts"]
