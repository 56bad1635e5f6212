"""An adapter of any format that is to be converted: its layers, their paths in the model, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from rankscope.track import Track
from rankscope.updates import LowRank

ComponentPath = tuple[str, str]  # component, path within it


@dataclass(frozen=True)
class PendingLayer:
    """A layer that is still to be read.

    Attributes:
        name: its name in the input.
        component: the part of a pipeline that it belongs to; "" where that is not known.
        module: dotted path within that part.
        read: makes the layer from component and module.
    """

    name: str
    component: str
    module: str
    read: Callable[[str, str], LayerFactors]


@dataclass
class ConvertibleAdapter:
    """The layers of an adapter before they are read.

    Attributes:
        label: how messages name the adapter.
        kind: its format.
        folder: where it lies.
        pending: the layers that can be converted.
        skipped: what cannot be a layer of another format.
        notes: remarks for the record.
    """

    label: str
    kind: str
    folder: Path
    pending: list[PendingLayer] = field(default_factory=list)
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        source: AdapterSource,
        *,
        alpha: float | None = None,
        device: torch.device | str = "cpu",
        names: Sequence[ComponentPath] = (),
    ) -> ConvertibleAdapter:
        """Open an adapter without reading its factors.

        Args:
            source: an adapter in any format that can be read.
            alpha: α where its file has none.
            device: where the factors are read to.
            names: (component, dotted path) of modules, among which kohya's names are looked up.

        Raises:
            FormatError: not an adapter of low rank, or names with underscores whose dotted paths are not known.
        """
        store = source if isinstance(source, Store) else open_store(source, device=device, alpha=alpha)
        return _from_file(store, names) if isinstance(store, FileStore) else _from_peft(store, device)

    def read_layers(self, track: Track = iter) -> list[LayerFactors]:
        """Read every layer; those that prove to have no thin factors are added to ``skipped``.

        Raises:
            FormatError: no layer is left.
        """
        layers: list[LayerFactors] = []
        for layer in track(self.pending):
            try:
                with prefix_errors(f"{self.label}: layer {layer.name}"):
                    layers.append(layer.read(layer.component, layer.module))
            except SkippedLayerError as error:
                self.skipped.append(SkippedItem(layer.name, str(error.__cause__)))
        if not layers:
            why = f"; {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{self.label}: holds no layer that can be converted{why}")
        return layers

    def choose_component(self, component: str | None, single: bool) -> None:
        """Keep one part of a pipeline.

        Args:
            component: the part that is kept; None keeps all. Layers that belong to no part are assigned to it.
            single: whether the output can hold one model only.

        Raises:
            ConfigError: the adapter has several parts where one is needed, or no layer in ``component``.
        """
        components = sorted({layer.component for layer in self.pending})
        if component is not None and components == [""]:
            self.pending = [replace(layer, component=component) for layer in self.pending]
            return
        if component is not None and component not in components:
            raise ConfigError(f"{self.label}: has no layer in {component!r}; it has {', '.join(components)}")
        if component is None and single and len(components) > 1:
            raise ConfigError(
                f"{self.label}: has layers in {', '.join(components)}, but an adapter in PEFT's format is of one "
                "model; choose one with --component"
            )
        if component is not None:
            others = [layer for layer in self.pending if layer.component != component]
            self.skipped += [SkippedItem(layer.name, f"is not in {component}") for layer in others]
            self.pending = [layer for layer in self.pending if layer.component == component]


class SkippedLayerError(FormatError):
    """A layer that is listed instead of converted; the message is the reason."""


def _from_peft(store: Store, device: torch.device | str) -> ConvertibleAdapter:
    adapter = Adapter.open(store, device=device)
    skipped = [
        SkippedItem(strip_peft_prefix(key), "trained whole, beside the low-rank layers") for key in adapter.whole
    ]
    skipped += [SkippedItem(f"{name}.lora_B.bias", "lora_bias") for name in adapter.factor_biases]
    return ConvertibleAdapter(
        adapter.label,
        "peft",
        adapter.store.path,
        [PendingLayer(name, "", name, _make_peft_reader(adapter, name)) for name in adapter.names()],
        skipped,
        list(adapter.store.notes),
    )


def _make_peft_reader(adapter: Adapter, name: str) -> Callable[[str, str], LayerFactors]:
    """The ``read`` of a layer in PEFT's layout."""

    def read(component: str, module: str) -> LayerFactors:
        key = adapter.magnitudes.get(name)
        magnitude = None if key is None else adapter.file.read(key).flatten()
        update = _to_stored_dtype(adapter.update(name), adapter.dtype(name))
        return LayerFactors(name, component, module, update, adapter.places[name], magnitude)

    return read


def _from_file(store: FileStore, names: Sequence[ComponentPath]) -> ConvertibleAdapter:
    folder = store.path if store.path.is_dir() else store.path.parent
    adapter = ConvertibleAdapter(str(store.path), store.kind, folder)
    adapter.notes = [note for note in store.notes if not note.startswith("DoRA in")]
    adapter.skipped = [item for item in store.skipped if not item.name.endswith(WHOLE_SUFFIX)]
    fused = _find_fused_layers(store)
    paths = _paths_by_name(store, [name for name in store.layers if name not in fused], names)
    for name in store.layers:
        if name in paths:
            adapter.pending.append(PendingLayer(name, *paths[name], _make_file_reader(store, name)))
        elif name.endswith("]"):
            adapter.skipped.append(SkippedItem(name, "one of stacked experts, which no other format holds like this"))
        elif ":" in name and name not in fused:
            adapter.skipped.append(SkippedItem(name, "a part of a fused layer; the file does not say which"))
        elif name not in fused:
            adapter.skipped.append(SkippedItem(name, "no path of a module that is known has this name"))
    for name in dict.fromkeys(fused.values()):
        adapter.pending.append(PendingLayer(name, "", name, _make_fused_reader(store, name)))
    return adapter


def _make_file_reader(store: FileStore, name: str) -> Callable[[str, str], LayerFactors]:
    """The ``read`` of a layer of one file."""

    def read(component: str, module: str) -> LayerFactors:
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
            raise SkippedLayerError("its dora_scale scales the inputs, which only LyCORIS does")
        if magnitude is not None and layer.embedding:
            raise SkippedLayerError("DoRA of an embedding, whose magnitude is of other vectors in PEFT")
        update = _to_stored_dtype(thin, store.info(name).dtype)
        flat = None if magnitude is None else magnitude.flatten()
        return LayerFactors(name, component, module, update, layer.place, flat)

    return read


def _make_fused_reader(store: FileStore, name: str) -> Callable[[str, str], LayerFactors]:
    """The ``read`` that joins q, k and v of loralib's ``MergedLinear``: B (3·out, 3·r) block diagonal, A (3·r, in)."""

    def read(component: str, module: str) -> LayerFactors:
        products = [store[f"{name}:{part}"].product for part in QKV_PARTS]
        parts = [product for product in products if product is not None]
        B: torch.Tensor = torch.block_diag(*(part.B for part in parts))  # type: ignore[no-untyped-call]
        update = LowRank(B, torch.cat([part.A for part in parts]), parts[0].scale)
        return LayerFactors(name, component, module, update, store.layers[f"{name}:{QKV_PARTS[0]}"].place, None)

    return read


def _find_fused_layers(store: FileStore) -> dict[str, str]:
    """The name of the fused layer for each of its parts, where the file has all parts."""
    suffix = f":{QKV_PARTS[0]}"
    fused = [name.removesuffix(suffix) for name in store.layers if name.endswith(suffix)]
    return {f"{name}:{part}": name for name in fused for part in QKV_PARTS}


def _paths_by_name(store: FileStore, names: Sequence[str], known: Sequence[ComponentPath]) -> dict[str, ComponentPath]:
    """(component, dotted path) of the layers of a file.

    Raises:
        FormatError: names with underscores, of which no dotted path is known.
    """
    if isinstance(store, DiffusersStore):
        return {name: split_component(name) for name in names}
    if not isinstance(store, KohyaStore):
        return {name: ("", name) for name in names if ":" not in name and not name.endswith("]")}
    dotted = read_dotted_names(store.file.metadata)
    paths = {name: dotted[name] for name in names if name in dotted}
    unresolved = [name for name in names if name not in paths and "." not in name]
    paths |= {name: split_component(name) for name in names if name not in paths and "." in name}
    known_paths = {f"{component}.{module}" if component else module: (component, module) for component, module in known}
    pairs = pair_names(unresolved, known_paths).pairs
    paths |= {name: _resolve_component(name, known_paths[path]) for name, path in pairs}
    if unresolved and not any(name in paths for name in unresolved):
        tried = ""
        if known_paths:
            tried = f"; those given, such as {examples(list(known_paths), 2)}, fit none of {examples(unresolved, 2)}"
        raise FormatError(
            f"{store.path}: its names have underscores where the model's have dots ({unresolved[0]}), and several "
            f"dotted names are possible; give the model (--base) or a list of its modules (--names){tried}"
        )
    return paths


def _resolve_component(raw: str, named: ComponentPath) -> ComponentPath:
    """The component that kohya's prefix names, where the path itself has none."""
    component, module = named
    alias = next((alias.component for alias in aliases(raw) if alias.component), None)
    if component or alias is None:
        return component, module
    if alias == "denoiser":
        return denoiser_name(module), module
    number = alias.removeprefix("text ")
    return ("text_encoder" if number == "1" else f"text_encoder_{number}"), module


def _to_stored_dtype(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The factors on the CPU, in the dtype that stored them; at least float32 where they were computed."""
    if not update.B.dtype == update.A.dtype == dtype:
        dtype = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    B, A = (factor.detach().to("cpu", dtype).contiguous() for factor in (update.B, update.A))
    return LowRank(B, A, update.scale)


def read_base_names(base: str | os.PathLike[str]) -> list[ComponentPath]:
    """(component, dotted path) of the modules of a checkpoint, or of a pipeline's parts (``unet/``, ``text_encoder/``).

    Raises:
        FormatError: it cannot be read.
    """
    path = local_path(base)
    parts = [path] if not path.is_dir() or has_checkpoint(path) else []
    parts = parts or [part for part in sorted(path.iterdir()) if part.is_dir() and COMPONENTS.match(f"{part.name}.x")]
    return [
        ("" if part == path else part.name, name.removesuffix(WEIGHT_SUFFIX))
        for part in parts or [path]
        for name in Checkpoint(part).infos
        if name.endswith(WEIGHT_SUFFIX)
    ]


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
    # In GPT-2 and others "transformer." is a part of the model's own paths, not a component.
    return [("", name) if name.startswith("transformer.") else split_component(name) for name in names]
