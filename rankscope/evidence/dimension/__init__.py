"""Intrinsic dimension: how many numbers, along random directions, do what full fine-tuning does."""

from rankscope.evidence.dimension.measure import IntrinsicDimension, measure_dimension, verdicts

__all__ = ["IntrinsicDimension", "measure_dimension", "verdicts"]
