"""Singular values and effective ranks of the updates, beside those of noise."""

from rankscope.evidence.spectra.measure import Spectra, measure_spectra, verdicts

__all__ = ["Spectra", "measure_spectra", "verdicts"]
