"""What transformers knows about a model without its weights: parameters, tied weights, and the table of its names.

The model is built from its configuration on the meta device, where no weight takes memory. Code that comes with a
checkpoint is never run. Only this module imports transformers below the training, and only when it is called.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from rankscope.formats.name_rules import Conversion, RenamedKey, Step

# Numbers of a configuration beyond these belong to a damaged one, and building its model would take for ever.
MOST_LAYERS = 2048
LARGEST_SIZE = 2**26
_COUNTS = ("layer", "depth", "block", "stage", "group")


@dataclass(frozen=True)
class ModelOutline:
    """A model as transformers builds it.

    Attributes:
        class_name: the class of the model.
        parameters: shapes of parameters and buffers that are saved, by their names in memory.
        modules: class names of all modules by their paths.
        tied_weights: groups of parameters that share one weight.
        stacks_inputs_first: stacked experts that are stored (experts, in, out).
        prefix: name of the inner model, which checkpoints of it alone lack.
        transforms: transformers' rules from names on disk to those in memory, in their order.
    """

    class_name: str
    parameters: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]
    tied_weights: tuple[frozenset[str], ...]
    stacks_inputs_first: frozenset[str]
    prefix: str
    transforms: tuple[Any, ...] = field(repr=False)

    def find_parameter(self, name: str) -> str | None:
        """The parameter of this name, or of the same name within or without the inner model; None: there is none."""
        inner = f"{self.prefix}." if self.prefix else ""
        candidates = (name, inner + name, name.removeprefix(inner))
        return next((candidate for candidate in candidates if candidate in self.parameters), None)

    def fresh_transforms(self) -> list[Any]:
        """The rules for one checkpoint: some of them keep a state while they are applied."""
        return deepcopy(list(self.transforms))


def outline_model(config: Mapping[str, Any]) -> ModelOutline | None:
    """The outline of the model that ``config.json`` describes.

    None where transformers is not installed, does not have the model, or cannot build it from this configuration.
    """
    if not isinstance(config.get("model_type"), str) or not _is_plausible(config):
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
    return _outline_model(text)


@lru_cache(maxsize=8)
def _outline_model(text: str) -> ModelOutline | None:
    with _quiet_transformers():
        try:
            model = _build_on_meta(json.loads(text))
            return None if model is None else _describe_model(model)
        except Exception:
            # Whatever a configuration that nobody has checked makes the constructors of any model raise.
            return None


def _is_plausible(value: Any, key: str = "") -> bool:
    """Whether no number of a configuration is beyond that of any model."""
    if isinstance(value, Mapping):
        return all(_is_plausible(part, str(name).lower()) for name, part in value.items())
    if isinstance(value, list):
        return all(_is_plausible(part, key) for part in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return True
    limit = MOST_LAYERS if any(word in key for word in _COUNTS) and "size" not in key else LARGEST_SIZE
    return "token_id" in key or abs(value) <= limit


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the warnings of transformers, which are about using a model."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _build_on_meta(config: dict[str, Any]) -> Any:
    """The model on the meta device; None where transformers has no class for it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    settings = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    model_config = CONFIG_MAPPING[config["model_type"]].from_dict(settings)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None) if name else None
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind(model_config)
        build: Any = transformers.AutoModel.from_config
        return None if name else build(model_config)


def _describe_model(model: Any) -> ModelOutline:
    modules = dict(model.named_modules())
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inputs_first = {
        name
        for name, shape in parameters.items()
        if len(shape) == 3 and getattr(modules.get(name.rpartition(".")[0]), "is_transposed", False)
    }
    return ModelOutline(
        class_name=type(model).__name__,
        parameters=parameters,
        modules={path: type(module).__name__ for path, module in modules.items()},
        tied_weights=_group_tied(getattr(model, "all_tied_weights_keys", None) or {}),
        stacks_inputs_first=frozenset(inputs_first),
        prefix=str(model.base_model_prefix or ""),
        transforms=_find_transforms(model),
    )


def _find_transforms(model: Any) -> tuple[Any, ...]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 renames nothing on loading
        return ()
    return tuple(get_model_conversion_mapping(model))


def _group_tied(pairs: Mapping[str, str]) -> tuple[frozenset[str], ...]:
    """Groups of names from pairs of (name, the name that it shares its weight with)."""
    groups: list[set[str]] = []
    for pair in pairs.items():
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    return tuple(frozenset(group) for group in groups)


class TransformersRules:
    """The rules of transformers for a model of its own."""

    def __init__(self, outline: ModelOutline) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = outline.fresh_transforms()
        self._outline = outline
        self._renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]

    def rename(self, stored: str) -> RenamedKey:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self._renamings, self._converters)
        if self._outline.find_parameter(name) is None:  # the loader then tries the name as it is stored
            return RenamedKey(stored)
        if pattern is None:
            return RenamedKey(name)
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        conversion = Conversion(tuple(rule.source_patterns), tuple(rule.target_patterns), _describe_operations(rule))
        return RenamedKey(name, conversion, rule.source_patterns.index(pattern))


def _describe_operations(rule: Any) -> Step:
    operations = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    if any(getattr(step, "num_shards_attribute", None) for step in rule.operations):
        return "unknown"
    match operations:
        case [("MergeModulelist", 0)]:
            return "stack"
        case [("MergeModulelist", 0), ("Concatenate", 1)]:
            return "stack and concatenate"
        case [("Concatenate", 0)]:
            return "concatenate"
        case [("Chunk", 0)]:
            return "chunk"
        case [("Split", 0)]:
            return "split"
        case [("Transpose", _)] if {rule.operations[0].dim0 % 3, rule.operations[0].dim1 % 3} == {1, 2}:
            return "transpose to fit" if rule.operations[0].check_dims else "transpose"
    return "unknown"
