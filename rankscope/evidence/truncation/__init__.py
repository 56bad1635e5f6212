"""The tuned model with its update cut to rank k: how much rank does the task need?"""

from rankscope.evidence.truncation.measure import Truncation, measure_truncation, verdicts

__all__ = ["Truncation", "measure_truncation", "verdicts"]
