"""Tests the low-intrinsic-rank hypothesis of LoRA: train at many ranks, measure what rank was used, compare.

The verbs of the command line are functions: ``spectrum``, ``compare`` (``compare_all`` for more than two), and
``calibrate``. ``run_study`` is ``train`` and ``hypothesis`` is ``report``, which are names of subpackages. Everything
is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankscope.analysis.comparison import CompareResult as CompareResult
    from rankscope.analysis.comparison import compare as compare
    from rankscope.analysis.layer_spectra import SpectrumResult as SpectrumResult
    from rankscope.analysis.layer_spectra import spectrum as spectrum
    from rankscope.analysis.matrix import MatrixResult as MatrixResult
    from rankscope.analysis.matrix import compare_all as compare_all
    from rankscope.analysis.process_sharing import processes as processes
    from rankscope.errors import RankscopeError as RankscopeError
    from rankscope.evidence.calibration import Calibration as Calibration
    from rankscope.evidence.calibration import calibrate as calibrate
    from rankscope.evidence.hypothesis import Hypothesis as Hypothesis
    from rankscope.evidence.hypothesis import hypothesis as hypothesis
    from rankscope.formats.store import open as open
    from rankscope.lora.bank import Bank as Bank
    from rankscope.lora.spec import AdapterSpec as AdapterSpec
    from rankscope.spectra import Spectrum as Spectrum
    from rankscope.subspace import Subspace as Subspace
    from rankscope.train.callback import RankCallback as RankCallback
    from rankscope.train.config import StudyConfig as StudyConfig
    from rankscope.train.study import Study as Study
    from rankscope.train.study import run_study as run_study
    from rankscope.updates import Dense as Dense
    from rankscope.updates import LowRank as LowRank

    __version__: str

_HOME = {
    "AdapterSpec": "lora.spec",
    "Bank": "lora.bank",
    "Calibration": "evidence.calibration",
    "CompareResult": "analysis.comparison",
    "Dense": "updates",
    "Hypothesis": "evidence.hypothesis",
    "LowRank": "updates",
    "MatrixResult": "analysis.matrix",
    "RankCallback": "train.callback",
    "RankscopeError": "errors",
    "Spectrum": "spectra",
    "SpectrumResult": "analysis.layer_spectra",
    "Study": "train.study",
    "StudyConfig": "train.config",
    "Subspace": "subspace",
    "calibrate": "evidence.calibration",
    "compare": "analysis.comparison",
    "compare_all": "analysis.matrix",
    "hypothesis": "evidence.hypothesis",
    "open": "formats.store",
    "processes": "analysis.process_sharing",
    "run_study": "train.study",
    "spectrum": "analysis.layer_spectra",
}

__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604 (strings all)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("rankscope")
        except PackageNotFoundError:
            return "not installed"  # run from a copy of the sources
    if name not in _HOME:
        raise AttributeError(f"module 'rankscope' has no attribute {name!r}")
    value = getattr(import_module(f"rankscope.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
