"""Top directions across ranks and seeds: do other runs find the same ones?"""

from rankscope.evidence.overlap.measure import Overlap, measure_overlap, verdicts

__all__ = ["Overlap", "measure_overlap", "verdicts"]
