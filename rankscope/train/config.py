"""What a study is asked to do: one typed, strict record, from options, TOML or Python."""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from rankscope.errors import ConfigError
from rankscope.formats.interface import usable_device


class StudyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a study: its task, its grid (ranks × rates × seeds), and how each run is trained.

    Empty or None means the task's own default. ``alpha`` None is α = 2r. ``epochs`` counts only
    where ``steps`` is None. ``data`` and ``eval`` are files; without ``eval`` the held-out text is
    a tenth of ``data``.
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

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    full: bool = True
    lrs: tuple[float, ...] = ()
    full_lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)

    targets: tuple[str, ...] = ()
    alpha: float | None = None
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dropout: float = 0.0
    bias: Literal["none", "lora_only", "all"] = "none"

    steps: int | None = None
    epochs: float = 3.0
    batch: int = 16
    accumulate: int = 1
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluations: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    save_seconds: float = 20.0

    def __post_init__(self) -> None:
        for key, problem in problems(self):
            raise ConfigError(f"{key} = {getattr(self, key)!r}: {problem}")


# What may differ when a study is taken up again: the grid may grow, and the place may change.
# Files may be named otherwise: the fingerprint has their hashes.
RESUMABLE = frozenset({"ranks", "full", "lrs", "full_lrs", "seeds", "device", "save_seconds", "model", "data", "eval"})


def problems(config: StudyConfig) -> list[tuple[str, str]]:
    """Each setting whose value makes no sense, with what would."""
    found: list[tuple[str, str]] = []

    def require(key: str, holds: bool, wanted: str) -> None:
        if not holds:
            found.append((key, f"expected {wanted}"))

    require("ranks", all(rank > 0 for rank in config.ranks), "ranks of at least 1")
    for key in ("ranks", "lrs", "full_lrs", "seeds"):
        values = getattr(config, key)
        require(key, len(set(values)) == len(values), "each value once")
    for key in ("lrs", "full_lrs"):
        require(key, all(0 < lr < math.inf for lr in getattr(config, key)), "rates above 0")
    require("seeds", len(config.seeds) > 0, "at least one seed")
    require("ranks", bool(config.ranks) or config.full, "at least one rank, or full fine-tuning")
    for key in ("batch", "accumulate"):
        require(key, getattr(config, key) > 0, "at least 1")
    require("planted_rank", 1 <= config.planted_rank <= 64, "1 to 64: the planted maps are 64 × 96")
    require("planted_noise", config.planted_noise <= 1e6, "at most a million")
    for key in ("steps", "max_length"):
        value = getattr(config, key)
        require(key, value is None or value > 1, "at least 2")
    for key in ("alpha", "epochs", "clip"):
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
    return found


def read_config(path: Path, overrides: Mapping[str, Any]) -> StudyConfig:
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
    return make_config({**values, **overrides}, str(path))


def make_config(values: Mapping[str, Any], where: str) -> StudyConfig:
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


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by what it is for, e.g. ``generator(seed, "init", rank)``.

    Hashing keeps streams apart that small neighbouring seeds would share: with one torch seed
    the first rows of A at rank 64 *are* A at rank 8.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def seeded(device: torch.device, *parts: object) -> Iterator[None]:
    """Within, torch's global stream is the one named by ``parts``; afterwards it is what it was.

    Models of others, such as BERT with its dropout, draw from the global stream and take no other.
    """
    seed = generator(*parts).initial_seed()
    kept = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for stream in streams(device):
            stream.manual_seed(seed)
        try:
            yield
        finally:
            if kept is not None:
                torch.mps.set_rng_state(kept)


def streams(device: torch.device) -> list[torch.Generator]:
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
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return usable_device(name)
