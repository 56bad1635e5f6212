"""What every source of updates offers, whatever file it reads."""

from __future__ import annotations

import difflib
import html
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rankscope.errors import ConfigError, FormatError, prefix_errors
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.names import natural_key
from rankscope.updates import Update

SHOWN_ROWS = 40  # of a store's table in a notebook


class UnknownLayerError(FormatError, KeyError):
    """A name that a store does not hold. Also a KeyError, as for any mapping."""

    __str__ = Exception.__str__  # KeyError's would print the sentence in quotes


@dataclass(frozen=True)
class SkippedItem:
    """Something the file holds that is not analysed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class UpdateInfo:
    """What the headers say about one update.

    ``shape`` is (out, in); ``nominal_rank`` is LoRA's r and None for an update that is no product; ``scale``
    multiplies B·A; ``dtype`` is the stored one, of A or of the tuned weight; ``method`` is "lora",
    "dora-product" (scale·B·A of a DoRA layer), "dora" (the whole of it), "full", "update", or the name of another
    method of PEFT or LyCORIS in small letters ("loha", "vera", …).
    """

    shape: tuple[int, int]
    nominal_rank: int | None
    scale: float
    dtype: torch.dtype
    method: str


class StoredTensors(NamedTuple):
    """The headers of the tensors that a source consists of, and the files that they lie in."""

    infos: Mapping[str, TensorInfo]
    paths: tuple[Path, ...]


class Store(ABC):
    """Lazy, named source of updates: opening reads headers, ``store[name]`` reads one update.

    ``path`` is what was opened, ``skipped`` what it holds besides updates, ``notes`` what a reader of its
    numbers must know.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        self.device = check_device(device)
        self.skipped: list[SkippedItem] = []
        self.notes: list[str] = []
        self._infos: dict[str, UpdateInfo] = {}

    @abstractmethod
    def _read(self, name: str) -> Update:
        """The update ``name``, which the store holds, on ``self.device``."""

    @abstractmethod
    def _read_weight(self, name: str) -> Tensor | None:
        """The pre-trained weight (out, in) in its stored dtype; None without a base, or where it has none."""

    def stored_tensors(self) -> StoredTensors:
        """Every tensor of the source, whether it is read or not; none for a source that does not lie in files."""
        return StoredTensors({}, ())

    def layer_alpha(self, name: str) -> float | None:
        """LoRA's α of a layer, None where there is none."""
        return None

    def base_name(self) -> str | None:
        """The base model that the source itself names, None where it names none."""
        return None

    def training_script(self) -> str | None:
        """The program that trained the source, as the source names it; None where it names none."""
        return None

    def names(self) -> list[str]:
        """Module paths in natural order, without ``base_model.model.`` and ``.weight``."""
        return sorted(self._infos, key=natural_key)

    def info(self, name: str) -> UpdateInfo:
        """What the headers say about one update; reads no tensor.

        Raises:
            UnknownLayerError: the store does not hold ``name``.
        """
        if name not in self._infos:
            raise UnknownLayerError(f"{self.path}: no layer {name!r}{self._suggestion(name)}")
        return self._infos[name]

    def __getitem__(self, name: str) -> Update:
        """Read and build one update.

        Raises:
            UnknownLayerError: the store does not hold ``name``.
            NonFiniteError: a tensor holds NaN or infinity.
            FormatError: the file cannot be read.
        """
        self.info(name)
        with prefix_errors(f"{self.path}: layer {name}"):
            return self._read(name)

    def weight(self, name: str) -> Tensor:
        """The pre-trained weight (out, in) that ``name`` updates, in float32 on the store's device.

        Raises:
            FormatError: the store was opened without a base, or the base lacks this weight.
        """
        self.info(name)
        with prefix_errors(f"{self.path}: layer {name}"):
            weight = self._read_weight(name)
            if weight is None:
                raise FormatError("no pre-trained weight is known that fits it; open it with its base model (--base)")
        return weight.to(self.device).float()

    def __len__(self) -> int:
        return len(self._infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def _suggestion(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._infos, n=1)
        return f"; did you mean {close[0]!r}?" if close else f"; it holds {examples(self.names())}"

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(SkippedItem(name, reason))

    def __repr__(self) -> str:
        extra = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{type(self).__name__}({str(self.path)!r}: {len(self)} updates{extra})"

    def _repr_html_(self) -> str:
        names = self.names()
        rows = "".join(self._row(name) for name in names[:SHOWN_ROWS])
        more = f"<p>… and {len(names) - SHOWN_ROWS} more</p>" if len(names) > SHOWN_ROWS else ""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        skipped = "".join(f"<li>{html.escape(s.name)}: {html.escape(s.reason)}</li>" for s in self.skipped)
        return (
            f"<p><b>{html.escape(repr(self))}</b></p><table><thead><tr><th>layer</th><th>out × in</th><th>r</th>"
            f"<th>scale</th><th>stored</th><th>method</th></tr></thead><tbody>{rows}</tbody></table>{more}"
            + (f"<ul>{notes}</ul>" if notes else "")
            + (f"<details><summary>skipped</summary><ul>{skipped}</ul></details>" if skipped else "")
        )

    def _row(self, name: str) -> str:
        info = self._infos[name]
        cells = (
            name,
            f"{info.shape[0]} × {info.shape[1]}",
            info.nominal_rank or "",
            f"{info.scale:g}",
            str(info.dtype).removeprefix("torch."),
            info.method,
        )
        return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def examples(names: list[str], count: int = 3) -> str:
    """The first few names, for a message."""
    shown = ", ".join(names[:count]) or "nothing"
    return f"{shown}, … ({len(names)} in all)" if len(names) > count else shown


def check_device(device: torch.device | str) -> torch.device:
    """The device, after a tensor was put on it. ``cuda`` is the GPU of this process where torchrun started several.

    Raises:
        ConfigError: torch does not know the device, or this machine does not have it.
    """
    try:
        result = torch.device(device)
        if result.type == "cuda" and result.index is None and "LOCAL_RANK" in os.environ:
            result = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        if result.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.empty(1, device=result)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used ({reason}); use cpu") from error
    return result
