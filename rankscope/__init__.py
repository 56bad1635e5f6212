"""Tests the low-intrinsic-rank hypothesis of LoRA: train at many ranks, measure what rank was used, compare.

The commands of the program are functions: ``spectrum``, ``compare`` (``compare_all`` for more than two), ``resize``,
``extract``, ``merge`` (``merge_adapters`` for ``merge --as-adapter``), ``unmerge``, ``convert``, ``average``,
``subtract``, ``inspect``, ``check``, ``bench``, ``calibrate``, ``run_study`` for ``train`` and ``hypothesis`` for
``report`` (both words are names of subpackages). Each is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankscope.analysis.benchmark import BenchResult as BenchResult
    from rankscope.analysis.benchmark import bench as bench
    from rankscope.analysis.comparison import CompareResult as CompareResult
    from rankscope.analysis.comparison import compare as compare
    from rankscope.analysis.inspection import Inspection as Inspection
    from rankscope.analysis.inspection import inspect as inspect
    from rankscope.analysis.layer_spectra import SpectrumResult as SpectrumResult
    from rankscope.analysis.layer_spectra import spectrum as spectrum
    from rankscope.analysis.matrix import compare_all as compare_all
    from rankscope.analysis.matrix_result import MatrixResult as MatrixResult
    from rankscope.analysis.process_sharing import processes as processes
    from rankscope.checks.check import CheckResult as CheckResult
    from rankscope.checks.check import check as check
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
    from rankscope.surgery.algebra import average as average
    from rankscope.surgery.algebra import merge_adapters as merge_adapters
    from rankscope.surgery.algebra import subtract as subtract
    from rankscope.surgery.convert import convert as convert
    from rankscope.surgery.extract import extract as extract
    from rankscope.surgery.merge import merge as merge
    from rankscope.surgery.merge import unmerge as unmerge
    from rankscope.surgery.resize import resize as resize
    from rankscope.surgery.surgery_result import SurgeryResult as SurgeryResult
    from rankscope.surgery.truncate import AboveNoise as AboveNoise
    from rankscope.surgery.truncate import Budget as Budget
    from rankscope.surgery.truncate import Energy as Energy
    from rankscope.surgery.truncate import Rank as Rank
    from rankscope.surgery.truncate import SigmaRatio as SigmaRatio
    from rankscope.train.callback import RankCallback as RankCallback
    from rankscope.train.config import StudyConfig as StudyConfig
    from rankscope.train.study import Study as Study
    from rankscope.train.study import run_study as run_study
    from rankscope.updates import Dense as Dense
    from rankscope.updates import LowRank as LowRank

    __version__: str

_HOME = {
    "AboveNoise": "surgery.truncate",
    "AdapterSpec": "lora.spec",
    "Bank": "lora.bank",
    "Budget": "surgery.truncate",
    "Calibration": "evidence.calibration",
    "BenchResult": "analysis.benchmark",
    "CheckResult": "checks.check",
    "CompareResult": "analysis.comparison",
    "Dense": "updates",
    "Energy": "surgery.truncate",
    "Hypothesis": "evidence.hypothesis",
    "Inspection": "analysis.inspection",
    "LowRank": "updates",
    "MatrixResult": "analysis.matrix_result",
    "Rank": "surgery.truncate",
    "RankCallback": "train.callback",
    "RankscopeError": "errors",
    "SigmaRatio": "surgery.truncate",
    "Spectrum": "spectra",
    "SpectrumResult": "analysis.layer_spectra",
    "Study": "train.study",
    "StudyConfig": "train.config",
    "Subspace": "subspace",
    "SurgeryResult": "surgery.surgery_result",
    "average": "surgery.algebra",
    "calibrate": "evidence.calibration",
    "bench": "analysis.benchmark",
    "check": "checks.check",
    "compare": "analysis.comparison",
    "compare_all": "analysis.matrix",
    "convert": "surgery.convert",
    "extract": "surgery.extract",
    "hypothesis": "evidence.hypothesis",
    "inspect": "analysis.inspection",
    "merge": "surgery.merge",
    "merge_adapters": "surgery.algebra",
    "open": "formats.store",
    "processes": "analysis.process_sharing",
    "resize": "surgery.resize",
    "run_study": "train.study",
    "spectrum": "analysis.layer_spectra",
    "subtract": "surgery.algebra",
    "unmerge": "surgery.merge",
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
