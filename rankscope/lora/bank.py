"""A bank: N adapters on one frozen model; one adapter is the case N = 1."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from rankscope.errors import ConfigError, located
from rankscope.formats.peft_keys import PREFIX, factor_keys
from rankscope.lora.files import write_adapter
from rankscope.lora.kinds import Conv1DLayer
from rankscope.lora.layer import AdapterLayer, Route, Swap
from rankscope.lora.spec import AdapterSpec, Slot, is_named
from rankscope.lora.targets import find_saved, find_targets, is_within, layer_class
from rankscope.updates import LowRank


class Bank:
    """N adapters attached to one model, whose own weights are frozen and never written to.

    Made by ``Bank.attach`` (fresh adapters) or ``load`` (stored ones). All rows pass adapter 0 until ``select`` says
    otherwise. Weights that the model uses twice (an embedding tied to the output layer) change only where the adapted
    module is called, merged or not.

    Attributes:
        model: the model, with adapter layers in the places of the targets until ``detach``.
        specs: the spec of each adapter.
        layers: the adapter layers by the path of the module that they stand for, in the order of the model. Their
            parameters ``A`` and ``B`` have the adapter as first axis.
        heads: the modules trained whole, by path.
        biases: the trained biases of the base, by the path of their module.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[AdapterSpec],
        plans: Sequence[Mapping[str, Slot]],
        generators: Sequence[Generator],
        dtype: torch.dtype | None,
    ) -> None:
        self.model = model
        self.specs = tuple(specs)
        self.route = Route(tuple(generators))
        self.attached = True
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._swaps: list[Swap] = []
        model.requires_grad_(False)
        self.heads = {name: self._copy_head(name) for name in find_saved(model, specs[0].modules_to_save)}
        self.layers: dict[str, AdapterLayer] = {}
        for name, module in list(model.named_modules()):
            if any(name in plan for plan in plans):
                slots = [plan.get(name, Slot()) for plan in plans]
                self.layers[name] = self._wrap(name, module, slots, dtype)
        self.biases = self._free_biases(specs[0].bias)

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        specs: AdapterSpec | Sequence[AdapterSpec],
        generators: Generator | Sequence[Generator],
        dtype: torch.dtype | None = None,
    ) -> Bank:
        """Put fresh adapters on a model and freeze everything else. The model computes what it did before.

        Args:
            model: changed in place; ``detach`` gives it back.
            specs: one spec per adapter.
            generators: one per adapter, the only source of its initial factors and its dropout, whatever N and the
                other adapters are. On the device of the model, they save copying dropout masks. Adapters of one sweep
                need different seeds: with one seed, the first rows of A agree across ranks up to scale.
            dtype: of the factors; by default float32, or float64 on a float64 base.

        Raises:
            ConfigError: a target that does not exist or cannot be adapted, specs and generators that do not pair up,
                adapters that are there already, or N > 1 with biases or whole modules to train (they belong to the
                base, which the adapters share).
        """
        specs = [specs] if isinstance(specs, AdapterSpec) else list(specs)
        sources = [generators] if isinstance(generators, Generator) else list(generators)
        check_bank(model, specs, sources)
        plans = [find_targets(model, spec) for spec in specs]
        bank = cls(model, specs, plans, sources, dtype)
        for i, (spec, plan) in enumerate(zip(specs, plans, strict=True)):
            for name in plan:
                bank.layers[name].initialise(i, spec.init)
        return bank

    def __len__(self) -> int:
        return len(self.specs)

    # Taking the places of modules

    def _swap(self, path: str, replacement: nn.Module | nn.Parameter) -> None:
        owner, _, name = path.rpartition(".")
        self._swaps.append(Swap(self.model.get_submodule(owner), name, replacement))

    def _copy_head(self, name: str) -> nn.Module:
        head = copy.deepcopy(self.model.get_submodule(name)).requires_grad_(True)
        self._swap(name, head)
        return head

    def _wrap(self, name: str, module: Any, slots: Sequence[Slot], dtype: torch.dtype | None) -> AdapterLayer:
        # Plans name only modules that check_target has let pass.
        kind = cast(type[AdapterLayer], layer_class(module))
        default = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        layer = kind(module, slots, self.route, dtype or default)
        self._swap(name, layer)
        return layer

    def _free_biases(self, which: str) -> dict[str, nn.Parameter]:
        """Replace biases of the base by trainable copies; tied ones stay tied."""
        if which == "none":
            return {}
        owners: dict[str, nn.Module] = {name: layer.base_layer for name, layer in self.layers.items()}
        if which == "all":
            wrapped = {*self.layers.values(), *owners.values()}
            owners |= {name: module for name, module in self.model.named_modules() if module not in wrapped}
        copies: dict[nn.Parameter, nn.Parameter] = {}
        biases = {}
        for name, owner in owners.items():
            bias = owner._parameters.get("bias")
            if bias is not None and not any(is_within(name, head) for head in self.heads):
                biases[name] = copies.setdefault(bias, nn.Parameter(bias.detach().clone()))
                self._swaps.append(Swap(owner, "bias", biases[name]))
        return biases

    def detach(self) -> nn.Module:
        """The original model: unmerged, its own modules and parameters in place, bit for bit, trainable as before.

        Adapters can still be read and saved afterwards. Detaching twice does nothing more.
        """
        if self.attached:
            if self.route.merged is not None:
                self.unmerge()
            for swap in reversed(self._swaps):
                swap.undo()
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            self.attached = False
        return self.model

    # Which adapter rows go through

    @property
    def selected(self) -> int | None:
        return self.route.selected

    def select(self, i: int | None) -> None:
        """Send every row through adapter i; None: the batch is N equal chunks along its first axis, one per adapter.

        With None, every adapted module must be called with the batch as its first axis.
        """
        self._check(i)
        self._require(self.route.merged is None, "an adapter is merged; use switch, or unmerge first")
        self.route.selected = i

    def merge(self, i: int = 0) -> None:
        """Put W + scale · BA of adapter i in the place of W: the forward pass is that of the base alone.

        Raises:
            ConfigError: an adapter is merged already, or a weight cannot be merged into (quantised, grouped).
            NonFiniteError: a factor holds NaN or infinity. After either of these two nothing is merged.
        """
        self._check(i)
        self._require(self.route.merged is None, f"adapter {self.route.merged} is merged already; use switch")
        self._put(i)

    def switch(self, i: int) -> None:
        """Replace the merged adapter by adapter i: W − BA + B'A', computed from the kept W, so that nothing drifts."""
        self._check(i)
        self._require(self.route.merged is not None, "no adapter is merged; use merge, or select")
        self._put(i)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        self._check(None)
        self._require(self.route.merged is not None, "no adapter is merged")
        self._restore()

    def _put(self, i: int) -> None:
        self._restore()
        try:
            for name, layer in self._layers_of(i):
                with located(name):
                    layer.merge_swap = Swap(layer.base_layer, "weight", layer.merged_weight(i))
        except BaseException:
            self._restore()
            raise
        self.route.merged = i

    def _restore(self) -> None:
        for layer in self.layers.values():
            if layer.merge_swap is not None:
                layer.merge_swap.undo()
                layer.merge_swap = None
        self.route.merged = None

    def _check(self, i: int | None) -> None:
        self._require(self.attached, "the adapters have been detached")
        if i is not None:
            self._check_index(i)

    def _check_index(self, i: int) -> None:
        self._require(0 <= i < len(self), f"there is no adapter {i}; there are {len(self)}, from 0")

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise ConfigError(otherwise)

    # Reading adapters

    def _layers_of(self, i: int) -> list[tuple[str, AdapterLayer]]:
        self._check_index(i)
        return [(name, layer) for name, layer in self.layers.items() if layer.slots[i].rank]

    def _whole_parameters(self) -> list[nn.Parameter]:
        heads = (parameter for head in self.heads.values() for parameter in head.parameters())
        return list(dict.fromkeys((*self.biases.values(), *heads)))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: A and B of each layer, first axis the adapter; with N = 1 also biases and heads."""
        factors = [factor for layer in self.layers.values() for factor in (layer.A, layer.B)]
        return factors + self._whole_parameters()

    def parameter_count(self, i: int = 0) -> int:
        """Trainable numbers of adapter i, padding not counted."""
        factors = sum(A.numel() + B.numel() for A, B in self.factors(i).values())
        return factors + sum(parameter.numel() for parameter in self._whole_parameters())

    def factors(self, i: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Copies of (A, B) of adapter i by module path, of its own rank, in the shapes that PEFT stores."""
        return {name: layer.factors(i) for name, layer in self._layers_of(i)}

    def updates(self, i: int = 0) -> dict[str, LowRank]:
        """Updates of adapter i by module path, as matrices (out, in) kept as factors, copied.

        An embedding's is (vocabulary, dim); a convolution's is flattened to (out, in · kh · kw).

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        updates = {}
        for name, layer in self._layers_of(i):
            with located(name):
                updates[name] = layer.update(i)
        return updates

    # Files

    def save(self, i: int, folder: Path | str, base_name: str | None = None, task_type: str | None = None) -> None:
        """Write adapter i in PEFT's layout, with the biases and whole modules trained along.

        Args:
            folder: made if need be; files of the same name are replaced.
            base_name: ``base_model_name_or_path`` of the configuration.
            task_type: PEFT's, such as "CAUSAL_LM".

        Raises:
            FormatError: the folder cannot be written to.
        """
        tensors: dict[str, Tensor] = {}
        for name, (A, B) in self.factors(i).items():
            keys = factor_keys(name, self.layers[name].kind)
            tensors |= {keys.A: A, keys.B: B}
        for name, bias in self.biases.items():
            tensors[f"{PREFIX}{name}{'.base_layer' if name in self.layers else ''}.bias"] = bias
        for name, head in self.heads.items():
            tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in head.state_dict().items()}
        adapted = dict(self._layers_of(i))
        transposed = any(isinstance(layer, Conv1DLayer) for layer in adapted.values())
        write_adapter(
            Path(folder), self.specs[i], tensors, self._exact(list(adapted)), transposed, base_name, task_type
        )

    def _exact(self, targets: list[str]) -> str | list[str]:
        """The paths; or a regular expression of them where PEFT, which compares ends, would find more."""
        paths = {re.sub(r"\.base_layer$", "", name) for name, _ in self.model.named_modules()}
        more = any(is_named(target, path) for path in paths.difference(targets) for target in targets)
        return "|".join(re.escape(target) for target in targets) if more else targets


def check_bank(model: nn.Module, specs: Sequence[AdapterSpec], generators: Sequence[Generator]) -> None:
    """Raise ConfigError where these adapters cannot share this model."""
    if not specs:
        raise ConfigError("a bank needs at least one adapter")
    if len(specs) != len(generators) or len({id(source) for source in generators}) < len(generators):
        raise ConfigError(f"{len(specs)} adapters need as many generators of their own, not {len(generators)}")
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ConfigError("the model has adapters already; detach them first, or attach all of them at once")
    if len(specs) > 1 and any(spec.bias != "none" or spec.modules_to_save for spec in specs):
        raise ConfigError("biases and modules_to_save can only be trained with one adapter on the model, not several")
