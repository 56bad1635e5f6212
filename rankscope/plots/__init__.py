"""Results as matplotlib figures: object-oriented, no pyplot, no global state."""

from rankscope.plots.figure import check_suffix, save
from rankscope.plots.matrix_figure import plot_matrix
from rankscope.plots.overlap_figure import plot_overlap
from rankscope.plots.spectrum_figure import plot_spectra

__all__ = [
    "check_suffix",
    "plot_matrix",
    "plot_overlap",
    "plot_spectra",
    "save",
]
