"""Effective rank against performance, and how much of its rank an update uses."""

from rankscope.evidence.effective.measure import EffectiveRanks, measure_effective, verdicts

__all__ = ["EffectiveRanks", "measure_effective", "verdicts"]
