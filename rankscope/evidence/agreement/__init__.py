"""LoRA's update against the one of full fine-tuning, rank by rank."""

from rankscope.evidence.agreement.measure import Agreement, measure_agreement, verdicts

__all__ = ["Agreement", "measure_agreement", "verdicts"]
