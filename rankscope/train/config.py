"""What a study is asked to do: one typed, strict record, from options, TOML or Python."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from rankscope.errors import ConfigError
from rankscope.formats.abstract_store import check_device
from rankscope.train.method_table import methods_of, selectable_methods

PlantedSpectrum = Literal["even", "flat", "decaying"]


class StudyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a study: its task, its grid (methods × targets × ranks × rates × seeds), how each run is trained.

    Empty or None means the task's own default. ``epochs`` counts only where ``steps`` is None. ``data`` and
    ``eval`` are files; without ``eval`` the held-out text is a tenth of ``data``. Each entry of ``targets`` is one
    set of modules, such as "q_proj,v_proj"; ``budget`` gives each set the rank that makes this many parameters.
    ``alpha`` is a number, or a multiple of the rank such as "2r"; None is 2r, and 16 for rsLoRA. ``dims`` are the
    numbers that ``subspace`` and ``said`` train, as far as they fit the base: not more than it has, and for ``said``
    more than it has layers.
    ``tokens`` is how many tokens may pass at once: it decides how many runs are trained together.
    """

    task: Literal["docs", "planted", "classify", "lm"] = "docs"
    model: str | None = None
    data: str | None = None
    eval: str | None = None
    text: str = "text"
    label: str = "label"
    max_length: int | None = None
    planted_rank: int = 4
    planted_noise: float = 0.5
    planted_spectrum: PlantedSpectrum = "even"

    methods: tuple[str, ...] = ("lora",)
    targets: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    budget: int | None = None
    dims: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384)
    lrs: tuple[float, ...] = ()
    full: bool = True
    full_lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    extend_lrs: bool = False
    halving: bool = False

    alpha: float | str | None = None
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dropout: float = 0.0
    bias: Literal["none", "lora_only", "all"] = "none"
    lora_plus_ratio: float = 16.0

    steps: int | None = None
    epochs: float = 3.0
    batch: int | None = None
    accumulate: int = 1
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluations: int = 1

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tf32: bool = False
    compile: bool = False
    checkpointing: bool = False
    device: str = "auto"
    tokens: int | None = None
    data_parallel: bool = False
    shard: bool = False
    save_seconds: float = 20.0

    def __post_init__(self) -> None:
        for key, problem in find_invalid_settings(self):
            raise ConfigError(f"{key} = {getattr(self, key)!r}: {problem}")


# What may differ when a study is taken up again: the grid may grow, and the place may change.
GRID_KEYS = frozenset(
    {"methods", "targets", "ranks", "budget", "dims", "lrs", "full", "full_lrs", "seeds", "extend_lrs", "halving"}
)
RUNTIME_KEYS = frozenset({"device", "tokens", "checkpointing", "data_parallel", "shard", "save_seconds"})
# Files may be named otherwise: the fingerprint has their hashes.
RESUMABLE_KEYS = GRID_KEYS | RUNTIME_KEYS | {"model", "data", "eval"}
ALPHA_PATTERN = re.compile(r"(\d+(?:\.\d+)?)?\s*r")


def find_invalid_settings(config: StudyConfig) -> list[tuple[str, str]]:
    """Each setting whose value makes no sense, with what would."""
    problems: list[tuple[str, str]] = []

    def require(key: str, holds: bool, wanted: str) -> None:
        if not holds:
            problems.append((key, f"expected {wanted}"))

    require("ranks", all(rank > 0 for rank in config.ranks), "ranks of at least 1")
    require("dims", all(dim > 0 for dim in config.dims), "dimensions of at least 1")
    for key in ("methods", "targets", "ranks", "dims", "lrs", "full_lrs", "seeds"):
        values = getattr(config, key)
        require(key, len(set(values)) == len(values), "each value once")
    for key in ("lrs", "full_lrs"):
        require(key, all(0 < lr < math.inf for lr in getattr(config, key)), "rates above 0")
    require("seeds", len(config.seeds) > 0, "at least one seed")
    subspaces = not set(methods_of("subspace")).isdisjoint(config.methods)
    require("dims", bool(config.dims) or not subspaces, "at least one dimension of the random subspaces")
    some = bool(config.methods) and bool(config.ranks or config.budget or subspaces)
    require("ranks", some or config.full, "at least one rank, or full fine-tuning")
    require("methods", "full" not in config.methods, "methods besides full fine-tuning, which full = true asks for")
    known = selectable_methods()
    require("methods", set(config.methods) <= set(known), f"some of {', '.join(known)}")
    for key in ("batch", "accumulate", "budget", "tokens", "steps"):
        value = getattr(config, key)
        require(key, value is None or value > 0, "at least 1")
    require("alpha", parse_alpha(config.alpha) is not None, "a number above 0, or a multiple of the rank such as 2r")
    require("planted_rank", 1 <= config.planted_rank <= 64, "1 to 64: the planted maps are 64 × 96")
    require("planted_noise", config.planted_noise <= 1e6, "at most a million")
    require("max_length", config.max_length is None or config.max_length > 1, "at least 2")
    for key in ("epochs", "clip", "lora_plus_ratio"):
        value = getattr(config, key)
        require(key, value is None or 0 < value < math.inf, "a number above 0")
    for key in ("weight_decay", "planted_noise", "evaluations", "save_seconds"):
        require(key, 0 <= getattr(config, key) < math.inf, "0 or more")
    for key in ("warmup", "dropout"):
        require(key, 0 <= getattr(config, key) < 1, "a share from 0 up to 1")
    own = config.task in ("classify", "lm")
    for key in ("model", "data"):
        require(key, not own or getattr(config, key) is not None, f"a value: task {config.task!r} needs --{key}")
    for key in ("model", "data", "eval"):
        require(key, own or getattr(config, key) is None, f"nothing: task {config.task!r} brings its own")
    return problems


def parse_alpha(alpha: float | str | None) -> tuple[float, bool] | None:
    """(number, whether the rank multiplies it) of an alpha setting; None where it makes no sense."""
    if alpha is None:
        return 2.0, True
    match = ALPHA_PATTERN.fullmatch(alpha) if isinstance(alpha, str) else None
    try:
        value = float(match[1] or 1.0) if match else float(alpha)
    except ValueError:
        return None
    return (value, match is not None) if 0 < value < math.inf else None


def read_study_config(path: Path, overrides: Mapping[str, Any]) -> StudyConfig:
    """A study's settings from a TOML file, with ``overrides`` in place of what it says.

    Raises:
        ConfigError: the file is missing or not TOML; a key is unknown or of the wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    return make_study_config({**values, **overrides}, str(path))


def make_study_config(values: Mapping[str, Any], where: str) -> StudyConfig:
    """Check and convert plain values; ``where`` is named in the error."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings by name, found {type(values).__name__}")
    try:
        return msgspec.convert(dict(values), StudyConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        raise ConfigError(f"{where}: {cause if isinstance(cause, ConfigError) else error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def stream_seed(*parts: object) -> int:
    """A seed made of what it is for, e.g. ``stream_seed(seed, "dropout", step)``.

    Hashing keeps streams apart that small neighbouring seeds would share: with one torch seed
    the first rows of A at rank 64 *are* A at rank 8.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by what it is for, e.g. ``generator(seed, "init", rank)``."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def global_generators(device: torch.device) -> list[torch.Generator]:
    """torch's global generators that code running on this device draws from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.default_generator, torch.cuda.default_generators[index]]
    if device.type == "mps":
        return [torch.default_generator, torch.mps._get_default_mps_generator()]
    return [torch.default_generator]


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` means here.

    Raises:
        ConfigError: no such device, or it is not present.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return check_device(name)
