"""Performance against rank: the smallest rank that does what full fine-tuning does."""

from rankscope.evidence.performance.measure import Performance, measure_performance, verdicts

__all__ = ["Performance", "measure_performance", "verdicts"]
