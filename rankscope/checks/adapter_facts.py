"""What the checks of an adapter look at: its headers, every tensor's range, one update at a time, and the base."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankscope.checks.base_match import BaseMatch, match_base
from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats.abstract_store import Store
from rankscope.formats.adapter_file import NoAlphaError
from rankscope.formats.checkpoint import checkpoint_file
from rankscope.formats.file_formats import CHECKPOINT, NoBaseError
from rankscope.formats.file_io import TensorInfo, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.opening import Opening
from rankscope.formats.peft_config import convert_adapter_config
from rankscope.formats.peft_folder import PeftFolder, weights_file
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, parse_key
from rankscope.formats.pickle_file import open_tensors
from rankscope.formats.store import open_source
from rankscope.formats.study_layout import ADAPTER_FOLDER
from rankscope.spectra import Spectrum
from rankscope.track import Track
from rankscope.updates import Dense, LowRank, Update

WHOLE_METHODS = ("full", "tokens")  # trained whole, no adapter's product
DORA_WHOLE, DORA_PRODUCT = "dora", "dora-product"
NEAR_FP16 = 2.0**12
"""A bound below it is far from float16's largest number (2¹⁶), so that the product need not be formed."""


@dataclass(frozen=True)
class TensorRange:
    """One stored tensor: its header, its largest magnitude among finite entries, and how many are NaN or infinite."""

    info: TensorInfo
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class LayerFacts:
    """One update as measured. ``problem``: why it could not be read, "" where it was.

    ``values``: the singular values of a product, () of any other update. ``zero_factor``: "A" or "B" where that factor
    is all zero. ``weight_norm``: ‖W‖_F, None without a base. ``largest_merged``: a bound on |W + ΔW|, exact where the
    bound comes near float16's largest number.
    """

    name: str
    method: str
    shape: tuple[int, int]
    rank: int | None
    scale: float
    alpha: float | None
    dtype: torch.dtype
    problem: str = ""
    norm: float = 0.0
    values: tuple[float, ...] = ()
    stable_rank: float = 0.0
    k99: int = 0
    zero_factor: str = ""
    weight_norm: float | None = None
    largest_merged: float = 0.0

    @property
    def is_product(self) -> bool:
        """Whether it is the product that an adapter trains, not a weight that was trained whole."""
        return self.method not in (*WHOLE_METHODS, DORA_WHOLE)


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter. ``store`` is None where its reader refuses it, with the ``refusal``.

    ``peft``: the sorted keys of a PEFT folder, None for any other format or where they contradict each other.
    ``config``: its adapter_config.json, {} without one. ``ranges``: every tensor in the file. ``base``: None where no
    base was given or found.
    """

    path: str
    store: Store | None
    refusal: str
    is_alpha_known: bool
    config: Mapping[str, Any]
    peft: PeftFolder | None
    ranges: Mapping[str, TensorRange]
    layers: tuple[LayerFacts, ...]
    base: BaseMatch | None

    @property
    def products(self) -> list[LayerFacts]:
        """The layers that an adapter's factors make and that could be read."""
        return [layer for layer in self.layers if layer.is_product and not layer.problem]

    @property
    def is_peft(self) -> bool:
        """Whether it is a folder in PEFT's layout."""
        return bool(self.config)

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, also where the reader refuses the adapter."""
        if self.store is not None:
            return [layer.name for layer in self.layers if layer.is_product]
        parsed = (parse_key(key) for key in self.ranges)
        return list(dict.fromkeys(part.module for part in parsed if part is not None))


def read_adapter_facts(path: str | os.PathLike[str], opening: Opening, track: Track = iter) -> AdapterFacts:
    """Measure an adapter, one tensor and one update at a time.

    Raises:
        ConfigError: the path holds full weights.
        FormatError: there is nothing at the path, its files cannot be read as tensors, or the base cannot be read.
    """
    local = local_path(path)
    if not local.exists():
        raise FormatError(f"{path}: no such file or folder")
    store, refusal, is_alpha_known = _open_store(local, opening)
    try:
        ranges = _read_ranges(local, store)
    except FormatError as error:
        raise FormatError(refusal or str(error)) from error
    config = _read_config(local)
    layers = () if store is None else tuple(_measure_layers(store, track))
    base = _find_base(local, opening, config)
    facts = AdapterFacts(
        str(path), store, refusal, is_alpha_known, config, _open_peft(local, config), ranges, layers, None
    )
    if base is None:
        return facts
    known = {layer.name: layer.shape for layer in layers}
    try:
        return replace(facts, base=match_base(base, {name: known.get(name) for name in facts.modules}))
    except FormatError:
        if opening.base_path is not None:
            raise
        return facts  # nobody asked for the base that the configuration names


def _open_store(local: Path, opening: Opening) -> tuple[Store | None, str, bool]:
    """The store, with its base where that fits; why there is none; and whether α is known."""
    try:
        return _refuse_full_weights(open_source(local, opening)), "", True
    except NoBaseError as error:
        raise _full_weights_error(local) from error
    except ConfigError:
        raise
    except NoAlphaError:
        return open_source(local, replace(opening, alpha=1.0)), "", False
    except FormatError as error:
        if opening.base is None:
            return None, str(error), True
        refusal = error
    try:  # what does not fit the base is found by its headers
        return _refuse_full_weights(open_source(local, replace(opening, base=None))), "", True
    except NoBaseError as error:
        raise _full_weights_error(local) from error
    except FormatError:
        return None, str(refusal), True


def _refuse_full_weights(store: Store) -> Store:
    if store.kind == CHECKPOINT.kind:
        raise _full_weights_error(store.path)
    return store


def _full_weights_error(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: holds full weights, no adapter; give the adapter that it should contain (--adapter) and its base "
        "(--base)"
    )


def _adapter_folder(local: Path) -> Path | None:
    """The folder with an adapter_config.json, of a folder of PEFT's, a file in it, or a run; None for other formats."""
    homes = (local, local / ADAPTER_FOLDER) if local.is_dir() else (local.parent,)
    is_other_file = local.is_file() and local.name not in (WEIGHTS_NAME, OLD_WEIGHTS_NAME, CONFIG_NAME)
    return None if is_other_file else next((home for home in homes if (home / CONFIG_NAME).is_file()), None)


def _read_config(local: Path) -> dict[str, Any]:
    """The configuration as it stands; {} where it is none, or has a value that makes no sense: the refusal says so."""
    folder = _adapter_folder(local)
    try:
        config = {} if folder is None else read_json(folder / CONFIG_NAME)
        if folder is not None and config.get("peft_type") == "LORA" and config.get("lora_alpha") is not None:
            convert_adapter_config(folder / CONFIG_NAME, config)
        return config
    except FormatError:
        return {}


def _open_peft(local: Path, config: Mapping[str, Any]) -> PeftFolder | None:
    folder = _adapter_folder(local)
    if folder is None or config.get("peft_type") != "LORA":
        return None
    try:
        return PeftFolder.open(folder)
    except FormatError:
        return None


def _find_base(local: Path, opening: Opening, config: Mapping[str, Any]) -> Path | None:
    """The base that was given, or else the folder that the configuration names, where it holds weights."""
    if opening.base_path is not None:
        return opening.base_path
    named = config.get("base_model_name_or_path")
    try:
        folder = Path(named).expanduser() if isinstance(named, str) and named else None
        if folder is not None and folder.is_dir() and checkpoint_file(folder).is_file():
            return folder
    except (OSError, ValueError, FormatError):  # a name that no file can have; a folder without weights
        return None
    return None


def _read_ranges(local: Path, store: Store | None) -> dict[str, TensorRange]:
    """The range of every stored tensor, read one at a time.

    Raises:
        FormatError: a file cannot be read as tensors.
    """
    paths = store.stored_tensors().paths if store is not None else (_tensor_file(local),)
    ranges = {}
    for path in paths:
        file = open_tensors(path)
        for name, info in file.infos.items():
            if info.dtype.is_floating_point:
                ranges[name] = _measure_range(file.read(name), info)
            else:
                ranges[name] = TensorRange(info, 0.0, 0)
    return ranges


def _tensor_file(local: Path) -> Path:
    """The file of an adapter that its reader refuses."""
    folder = _adapter_folder(local)
    if folder is not None:
        return weights_file(folder)
    if local.is_dir():
        named = next((local / name for name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME) if (local / name).is_file()), None)
        return named or checkpoint_file(local)
    return local


def _measure_range(tensor: torch.Tensor, info: TensorInfo) -> TensorRange:
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values  # torch has no aminmax for float8
    if not values.numel():
        return TensorRange(info, 0.0, 0)
    low, high = values.aminmax()
    largest = float(torch.maximum(-low, high))
    if math.isfinite(largest):
        return TensorRange(info, largest, 0)
    finite = values[torch.isfinite(values)]
    return TensorRange(info, float(finite.abs().max()) if finite.numel() else 0.0, values.numel() - finite.numel())


def _measure_layers(store: Store, track: Track) -> Iterable[LayerFacts]:
    for name in track(store.names()):
        info = store.info(name)
        facts = LayerFacts(
            name, info.method, info.shape, info.nominal_rank, info.scale, store.layer_alpha(name), info.dtype
        )
        try:
            yield _measure_layer(facts, store[name], partial(_read_weight, store, name))
        except RankscopeError as error:
            yield replace(facts, problem=str(error))


def _read_weight(store: Store, name: str) -> torch.Tensor | None:
    try:
        return store.weight(name)
    except NonFiniteError:
        raise
    except FormatError:  # no base, or one without this weight
        return None


def _measure_layer(facts: LayerFacts, update: Update, read_weight: Callable[[], torch.Tensor | None]) -> LayerFacts:
    if facts.method in WHOLE_METHODS:
        return replace(facts, norm=update.norm)
    product = update.product
    if facts.rank is not None:
        spectrum = Spectrum.of(update)
        facts = replace(
            facts,
            norm=math.sqrt(spectrum.energy),
            values=tuple(spectrum.values.tolist()),
            stable_rank=float(spectrum.stable_rank),
            k99=spectrum.energy_rank(0.99),
            zero_factor=_zero_factor(product),
        )
    else:
        facts = replace(facts, norm=update.norm)
    weight = read_weight()
    largest = 0.0 if weight is None else float(weight.abs().max())
    if not math.isfinite(largest):
        raise NonFiniteError("its weight in the base holds NaN or infinity")
    weight_norm = None if weight is None else Dense(weight).norm
    return replace(facts, weight_norm=weight_norm, largest_merged=_bound_merged(update, weight, largest))


def _zero_factor(product: LowRank | None) -> str:
    if product is None:
        return ""
    return next((name for name, factor in (("B", product.B), ("A", product.A)) if not bool(factor.any())), "")


def _bound_merged(update: Update, weight: torch.Tensor | None, largest: float) -> float:
    """A bound on |W + ΔW| from the norms of the rows of B and the columns of A; exact above ``NEAR_FP16``."""
    product = update.product
    if product is not None:
        rows = torch.linalg.vector_norm(product.left, dim=1).max()
        columns = torch.linalg.vector_norm(product.right, dim=0).max()
        bound = float(rows * columns) + largest
        if bound < NEAR_FP16:
            return bound
    matrix = update.working_matrix
    merged = matrix if weight is None or weight.shape != matrix.shape else matrix + weight
    return float(merged.abs().max())
