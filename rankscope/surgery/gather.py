"""Adapters of any format as pieces: which layers another format can hold, under which paths, and what it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rankscope.errors import ConfigError, FormatError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, Store, examples
from rankscope.formats.adapter_file import WHOLE_SUFFIX, FileStore
from rankscope.formats.aliases import aliases
from rankscope.formats.checkpoint import Checkpoint, has_checkpoint
from rankscope.formats.diffusers import COMPONENTS, DiffusersStore, split_component
from rankscope.formats.file_io import read_json
from rankscope.formats.hub import local_path
from rankscope.formats.kohya import KohyaStore, read_dotted_names
from rankscope.formats.layouts import LayerFactors, denoiser_name
from rankscope.formats.names import QKV_PARTS, WEIGHT_SUFFIX, pair_names
from rankscope.formats.peft_keys import strip_peft_prefix
from rankscope.formats.store import open as open_store
from rankscope.surgery.adapter import Adapter, AdapterSource
from rankscope.updates import LowRank

ComponentPath = tuple[str, str]  # component, path within it


@dataclass(frozen=True)
class PendingLayer:
    """A layer that is still to be read, and where it goes."""

    name: str
    component: str
    module: str
    read: Callable[[str, str], LayerFactors]


@dataclass
class ConvertibleAdapter:
    """What an adapter is made of. ``skipped``: what no layer of another format can be; ``kind``: its format."""

    label: str
    kind: str
    folder: Path
    pending: list[PendingLayer] = field(default_factory=list)
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, track: Callable[[list[PendingLayer]], Iterable[PendingLayer]] = iter) -> list[LayerFactors]:
        """Every layer; those that turn out to have no thin factors are listed.

        Raises:
            FormatError: none is left.
        """
        found: list[LayerFactors] = []
        for one in track(self.pending):
            try:
                with prefix_errors(f"{self.label}: layer {one.name}"):
                    found.append(one.read(one.component, one.module))
            except SkippedLayerError as error:
                self.skipped.append(SkippedItem(one.name, str(error.__cause__)))
        if not found:
            why = f"; {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{self.label}: holds no layer that can be converted{why}")
        return found

    def choose(self, component: str | None, single: bool) -> None:
        """Keep one part of a pipeline.

        Args:
            component: the one that is meant; None keeps all. It names layers that belong to none.
            single: whether the target holds one model only.

        Raises:
            ConfigError: several parts where one is needed, or no layer in the one that is meant.
        """
        there = sorted({one.component for one in self.pending})
        if component is not None and there == [""]:
            self.pending = [PendingLayer(one.name, component, one.module, one.read) for one in self.pending]
            return
        if component is not None and component not in there:
            raise ConfigError(f"{self.label}: has no layer in {component!r}; it has {', '.join(there)}")
        if component is None and single and len(there) > 1:
            raise ConfigError(
                f"{self.label}: has layers in {', '.join(there)}, and an adapter of PEFT's is of one model; choose "
                "one with --component"
            )
        if component is not None:
            self.skipped += [SkippedItem(one.name, f"is not in {component}") for one in self.pending
                             if one.component != component]  # fmt: skip
            self.pending = [one for one in self.pending if one.component == component]


class SkippedLayerError(FormatError):
    """A layer that is listed instead of converted; the message is the reason."""


def gather_layers(
    source: AdapterSource,
    *,
    alpha: float | None = None,
    device: torch.device | str = "cpu",
    names: Sequence[ComponentPath] = (),
) -> ConvertibleAdapter:
    """Open an adapter as pieces; reads no factors.

    Args:
        source: an adapter in any format that is read.
        alpha: α where its file has none.
        device: where factors are brought.
        names: (component, dotted path) of modules, which kohya's names are looked up among.

    Raises:
        FormatError: not an adapter of low rank, or names with underscores whose dotted paths are not known.
    """
    store = source if isinstance(source, Store) else open_store(source, device=device, alpha=alpha)
    if isinstance(store, FileStore):
        return _of_file(store, names)
    return _of_peft(Adapter.open(store, device=device))


def _of_peft(adapter: Adapter) -> ConvertibleAdapter:
    kept = ConvertibleAdapter(adapter.label, "peft", adapter.store.path, notes=list(adapter.store.notes))

    def read(name: str) -> Callable[[str, str], LayerFactors]:
        def make(component: str, module: str) -> LayerFactors:
            key = adapter.magnitudes.get(name)
            magnitude = None if key is None else adapter.file.read(key).flatten()
            update = _to_stored_dtype(adapter.update(name), adapter.dtype(name))
            return LayerFactors(name, component, module, update, adapter.places[name], magnitude)

        return make

    kept.pending = [PendingLayer(name, "", name, read(name)) for name in adapter.names()]
    kept.skipped += [
        SkippedItem(strip_peft_prefix(key), "trained whole, beside the low-rank layers") for key in adapter.whole
    ]
    kept.skipped += [SkippedItem(f"{name}.lora_B.bias", "lora_bias") for name in adapter.factor_biases]
    return kept


def _of_file(store: FileStore, names: Sequence[ComponentPath]) -> ConvertibleAdapter:
    kept = ConvertibleAdapter(str(store.path), store.kind, store.path if store.path.is_dir() else store.path.parent)
    kept.notes = [note for note in store.notes if not note.startswith("DoRA in")]
    kept.skipped = [one for one in store.skipped if not one.name.endswith(WHOLE_SUFFIX)]
    joined = _fused_part_names(store)
    found = _paths(store, [name for name in store.layers if name not in joined], names)
    for name in store.layers:
        if name in found:
            kept.pending.append(PendingLayer(name, *found[name], _reader(store, name)))
        elif ":" in name and name not in joined:
            kept.skipped.append(SkippedItem(name, "a part of a fused layer; the file does not say which"))
        elif name not in joined:
            kept.skipped.append(SkippedItem(name, "no path of a module that is known has this name"))
    for name in dict.fromkeys(joined.values()):
        kept.pending.append(PendingLayer(name, "", name, _joiner(store, name)))
    return kept


def _reader(store: FileStore, name: str) -> Callable[[str, str], LayerFactors]:
    def make(component: str, module: str) -> LayerFactors:
        layer = store.layers[name]
        update = store[name]
        thin = update.product
        if thin is None:
            raise SkippedLayerError(
                f"{type(update).__name__}, nominal rank {update.nominal_rank}: no product of thin factors; merge it "
                "with the tool that made it and extract an adapter from the result"
            )
        magnitude = store.magnitude(name)
        if magnitude is not None and not magnitude.shape[:1] == (magnitude.numel(),) == update.shape[:1]:
            raise SkippedLayerError("its dora_scale is one of inputs, which only LyCORIS knows")
        update = _to_stored_dtype(thin, store.info(name).dtype)
        flat = None if magnitude is None else magnitude.flatten()
        return LayerFactors(name, component, module, update, layer.place, flat)

    return make


def _joiner(store: FileStore, name: str) -> Callable[[str, str], LayerFactors]:
    """q, k and v of loralib's ``MergedLinear`` as one layer: B block diagonal, A's blocks one below the other."""

    def make(component: str, module: str) -> LayerFactors:
        parts = [store[f"{name}:{part}"].product for part in QKV_PARTS]
        kept = [part for part in parts if part is not None]
        update = LowRank(_diagonal([part.B for part in kept]), torch.cat([part.A for part in kept]), kept[0].scale)
        return LayerFactors(name, component, module, update, store.layers[f"{name}:{QKV_PARTS[0]}"].place, None)

    return make


def _diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Blocks along the diagonal, zero elsewhere."""
    found: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return found


def _fused_part_names(store: FileStore) -> dict[str, str]:
    """Names of parts of fused layers of which all are there, and the layer's."""
    whole = [name.removesuffix(f":{QKV_PARTS[0]}") for name in store.layers if name.endswith(f":{QKV_PARTS[0]}")]
    return {f"{name}:{part}": name for name in whole for part in QKV_PARTS}


def _paths(store: FileStore, names: Sequence[str], known: Sequence[ComponentPath]) -> dict[str, ComponentPath]:
    """(component, dotted path) of the layers of a file.

    Raises:
        FormatError: names with underscores, of which no dotted path is known.
    """
    if isinstance(store, DiffusersStore):
        return {name: split_component(name) for name in names}
    if not isinstance(store, KohyaStore):
        return {name: ("", name) for name in names if ":" not in name}
    told = read_dotted_names(store.file.metadata)
    found = {name: told[name] for name in names if name in told}
    raw = [name for name in names if name not in found and "." not in name]
    found |= {name: split_component(name) for name in names if name not in found and "." in name}
    paths = {f"{component}.{module}" if component else module: (component, module) for component, module in known}
    found |= {name: _resolve_component(name, paths[path]) for name, path in pair_names(raw, paths).pairs}
    if raw and not any(name in found for name in raw):
        seen = f"; those given, such as {examples(list(paths), 2)}, fit none of {examples(raw, 2)}" if paths else ""
        raise FormatError(
            f"{store.path}: its names have underscores where the model's have dots ({raw[0]}), and the way back is not "
            f"unique; give the model (--base) or a list of its modules (--names){seen}"
        )
    return found


def _resolve_component(raw: str, named: ComponentPath) -> ComponentPath:
    """The component that kohya's prefix means, where the path itself says none."""
    component, module = named
    meant = next((way.component for way in aliases(raw) if way.component), None)
    if component or meant is None:
        return component, module
    if meant == "denoiser":
        return denoiser_name(module), module
    number = meant.removeprefix("text ")
    return ("text_encoder" if number == "1" else f"text_encoder_{number}"), module


def _to_stored_dtype(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The factors on the CPU in the dtype that they were stored in; in float32 where they were computed."""
    same = update.B.dtype == update.A.dtype == dtype
    kept = dtype if same else torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    B, A = (factor.detach().to("cpu", kept).contiguous() for factor in (update.B, update.A))
    return LowRank(B, A, update.scale)


def read_base_names(base: str | os.PathLike[str]) -> list[ComponentPath]:
    """Modules of a checkpoint, or of the parts of a pipeline (``unet/``, ``text_encoder/``).

    Raises:
        FormatError: it cannot be read.
    """
    place = local_path(base)
    parts = [place] if not place.is_dir() or has_checkpoint(place) else []
    parts = parts or [part for part in sorted(place.iterdir()) if part.is_dir() and COMPONENTS.match(f"{part.name}.x")]
    found = []
    for part in parts or [place]:
        component = "" if part == place else part.name
        found += [
            (component, name.removesuffix(WEIGHT_SUFFIX))
            for name in Checkpoint(part).infos
            if name.endswith(WEIGHT_SUFFIX)
        ]
    return found


def read_names(path: str | os.PathLike[str]) -> list[ComponentPath]:
    """Dotted paths of a text file, one a line, or of a JSON object's values or list under "names".

    Raises:
        FormatError: it cannot be read, or holds none.
    """
    place = Path(path).expanduser()
    try:
        if place.suffix == ".json":
            lines = [name for name in read_json(place).get("names", []) if isinstance(name, str)]
        else:
            lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{place}: cannot be read as a list of names ({error})") from error
    names = [line.strip().removesuffix(WEIGHT_SUFFIX) for line in lines if line.strip()]
    if not names:
        raise FormatError(f"{place}: holds no names; write one dotted path a line")
    # "transformer." is the model's own front in GPT-2 and others.
    return [("", name) if name.startswith("transformer.") else split_component(name) for name in names]
