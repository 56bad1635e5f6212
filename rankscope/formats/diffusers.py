"""Files of diffusers: PEFT's names, or its own older ones, behind ``unet.``, ``transformer.``, ``text_encoder.``.

``unet.….to_q.lora_A.weight``, older ``….to_q.lora.down.weight``, ``….q_proj.lora_linear_layer.down.weight`` and
``….processor.to_q_lora.down.weight``. α is in the metadata (``lora_adapter_metadata``: PEFT's configuration, keys
behind the component's name; or one number), or in ``.alpha`` tensors, or nowhere, and is then r. Trainers of diffusion
models (DiffSynth, ai-toolkit, ModelScope) also leave out the component, write PEFT's adapter name, and call DoRA's
magnitude ``.magnitude``. Layouts: github.com/huggingface/diffusers, loaders/lora_base.py, utils/state_dict_utils.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.adapter_file import FACTOR_BIAS_PART, FileStore, ParsedFileKey, metadata_alpha
from rankscope.formats.file_io import TensorFile
from rankscope.formats.lycoris import ALPHA_LEAF, LOCON, MAGNITUDE_LEAF
from rankscope.formats.peft_config import resolve_pattern
from rankscope.formats.peft_keys import PEFT_PREFIX, parse_key
from rankscope.formats.pickle_file import PickledFile

LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = re.compile(
    r"(?P<component>unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|diffusion_model|model\.diffusion_model)"
    r"\.(?P<module>.+)"
)
_OLD = re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<half>down|up)\.weight")
_OLDEST = re.compile(
    r"(?P<module>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<half>down|up)\.weight"
)
_OWN = re.compile(r"(?P<module>.+)\.(?P<leaf>alpha|diff|diff_b|dora_scale|magnitude)")  # trainers' own additions
# Old text encoders had the attention's names of the denoiser, without a processor.
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Paths of modules that only denoising models have. A file whose names have no component is one of these tools' where
# it has such paths or its own α; in other models a missing α is not r.
_DENOISER = re.compile(
    r"(?:^|\.)(?:\w*blocks\.\d+|mid_block|double_layers\.\d+|single_layers\.\d+|(?:noise|context)_refiner\.\d+"
    r"|to_(?:q|k|v|qkv|out|add_out)|(?:x|context|time_text)_embed(?:der)?|(?:img|txt)_in)(?:\.|$)"
)
_LEAVES = {
    "lora_A": LOCON.b,
    "lora_B": LOCON.a,
    "down": LOCON.b,
    "up": LOCON.a,
    "lora_magnitude_vector": MAGNITUDE_LEAF,
    "magnitude": MAGNITUDE_LEAF,
}


class ComponentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of PEFT's configuration that decide the scale."""

    lora_alpha: float
    use_rslora: bool | None = False
    alpha_pattern: dict[str, float] | None = None

    def alpha(self, module: str, rank: int) -> float:
        """α of a layer such that its scale is α/r."""
        alpha: float = resolve_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def parse_diffusers_key(key: str) -> ParsedFileKey | None:
    """What a key says; None where it is no part of an update."""
    if match := _OLD.fullmatch(key):
        return ParsedFileKey(match["module"], _LEAVES[match["half"]])
    if match := _OLDEST.fullmatch(key):
        text = ".self_attn" in match["module"]
        name = _TEXT_NAMES[match["name"]] if text else match["name"] + (".0" if match["name"] == "to_out" else "")
        return ParsedFileKey(f"{match['module']}.{name}", _LEAVES[match["half"]])
    if match := _OWN.fullmatch(key):
        return ParsedFileKey(match["module"], _LEAVES.get(match["leaf"], match["leaf"]))
    parsed = parse_key(key)
    if parsed is None or parsed.part not in _LEAVES or parsed.leaf not in ("weight", "bias", ""):
        return None
    if parsed.leaf == "bias":
        return ParsedFileKey(parsed.module, FACTOR_BIAS_PART)
    if parsed.leaf == "" and parsed.part != "lora_magnitude_vector":  # loralib's
        return None
    return ParsedFileKey(parsed.module, _LEAVES[parsed.part])


def is_diffusers(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Whether keys are those of diffusers: its older names, or PEFT's behind a component, in a denoising model, or
    with an α of their own."""
    own = [key for key in keys if not key.startswith(PEFT_PREFIX)]
    parsed = {key: part for key in own if (part := parse_diffusers_key(key)) is not None}
    plain = {key: part for key, part in parsed.items() if part.leaf in (LOCON.a, LOCON.b)}
    if not plain:
        return False
    alphas = {part.module for part in parsed.values() if part.leaf == ALPHA_LEAF}
    return (
        LORA_ADAPTER_METADATA_KEY in metadata
        or metadata_alpha(metadata) is not None
        or any(part.module in alphas or _is_diffusers_factor(key, part.module) for key, part in plain.items())
    )


def _is_diffusers_factor(key: str, module: str) -> bool:
    return any(
        match is not None
        for match in (_OLD.fullmatch(key), _OLDEST.fullmatch(key), COMPONENTS.match(key), _DENOISER.search(module))
    )


def split_component(name: str) -> tuple[str, str]:
    """(component, path within it) of a layer's name; the component is "" where the name has none."""
    match = COMPONENTS.fullmatch(name)
    return (match["component"], match["module"]) if match else ("", name)


class DiffusersStore(FileStore):
    """An adapter that diffusers saved, or one in its layout."""

    kind: ClassVar[str] = "diffusers"

    def __init__(self, path: Path, file: TensorFile | PickledFile, *options: Any, **others: Any) -> None:
        self._configs: dict[str, ComponentConfig | None] = {}
        super().__init__(path, file, *options, **others)

    def _parse(self, key: str) -> ParsedFileKey | None:
        return parse_diffusers_key(key)

    def _scale_alpha(self, module: str, rank: int | None, kernel: tuple[int, ...]) -> float | None:
        component, inner = split_component(module)
        if component not in self._configs:
            self._configs[component] = read_component_config(self.file.metadata, component)
        config = self._configs[component]
        if rank is None:
            return None
        if config is not None:
            return config.alpha(inner, rank)
        if (alpha := self._metadata_alpha()) is not None:
            return alpha
        return None if self._alpha is not None else float(rank)

    def base_name(self) -> str | None:
        components = sorted({split_component(name)[0] for name in self.layers})
        configs = (component_config(self.file.metadata, component) for component in components)
        names = (config.get("base_model_name_or_path") for config in configs)
        return next((name for name in names if isinstance(name, str) and name), None)

    def magnitude(self, name: str) -> Tensor | None:
        """DoRA's magnitude of a layer, (out,); that of a convolution is stored as (1, out, 1, 1). None without one."""
        magnitude = super().magnitude(name)
        return None if magnitude is None else magnitude.flatten()

    def _note_oddities(self) -> None:
        own = ALPHA_LEAF in {leaf for layer in self.layers.values() for leaf in layer.keys}
        told = any(self._configs.values()) or self._metadata_alpha() is not None
        if not own and not self.given and not told:
            self.notes.append("the file gives no α; diffusers then takes α = r, so the scale is 1")


def read_component_config(metadata: Mapping[str, str], component: str) -> ComponentConfig | None:
    """The configuration of one component in a file's metadata; None where there is none.

    Raises:
        FormatError: it is no JSON object, or a value is of a wrong type or not finite.
    """
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        return None
    values = component_config(metadata, component)
    if values.get("lora_alpha") is None:
        return None
    try:
        config = msgspec.convert(values, ComponentConfig)
        alphas = (config.lora_alpha, *(config.alpha_pattern or {}).values())
        if not all(math.isfinite(alpha) for alpha in alphas):
            raise ValueError("an α is not finite")
        for pattern in config.alpha_pattern or ():
            re.compile(rf"(.*\.)?({pattern})$")
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise FormatError(f"its metadata {LORA_ADAPTER_METADATA_KEY}: {error}") from error
    return config


def component_config(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """PEFT's configuration of a component.

    Its keys stand behind the component's name, in an object of that name, or without the name.

    Raises:
        FormatError: the metadata is no JSON object.
    """
    try:
        raw = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its metadata {LORA_ADAPTER_METADATA_KEY} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise FormatError(f"its metadata {LORA_ADAPTER_METADATA_KEY} is no JSON object")
    if isinstance(raw.get(component), dict):
        return dict(raw[component])
    prefixed = {
        key.removeprefix(f"{component}."): value for key, value in raw.items() if key.startswith(f"{component}.")
    }
    return prefixed or raw
