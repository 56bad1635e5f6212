"""A bank: N adapters on one frozen model; one adapter is the case N = 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from rankscope.errors import ConfigError, prefix_errors
from rankscope.formats.peft_write import exact_targets
from rankscope.lora.adapter_views import AdapterViews
from rankscope.lora.heads import HeadCopies, make_biases_trainable
from rankscope.lora.layer import AdapterLayer, FactorName, FactorPair
from rankscope.lora.layer_types import Conv1DLayer
from rankscope.lora.merging import merge_adapter, restore_base_weights
from rankscope.lora.routing import NO_ADAPTER, BatchRows, Route
from rankscope.lora.saving import peft_tensors, write_adapter
from rankscope.lora.spec import AdapterSpec, Slot
from rankscope.lora.swap import Swap
from rankscope.lora.targets import check_bank, find_modules_to_save, find_targets, layer_class
from rankscope.updates import LowRank


class Bank:
    """N adapters on one model, whose own weights are frozen and never written to.

    Made by ``Bank.attach`` (fresh adapters) or ``load`` (stored ones). All rows pass adapter 0 until ``select`` says
    otherwise. Weights that the model uses twice (an embedding tied to the output layer) change only where the adapted
    module is called, merged or not.

    Attributes:
        model: the model, with adapter layers in the places of the targets until ``detach``.
        specs: the spec of each adapter.
        route: which adapters the rows pass; ``route.seeds`` makes dropout a function of (seed, layer).
        layers: the adapter layers by the path of the module that they replace, in the order of the model. Their
            parameters ``A`` (N, R, ·) and ``B`` (N, ·, R / groups) have the adapter as first axis.
        heads: the copies of the modules trained whole, by path; ``head`` gives one adapter's copy.
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
        self._paths = [name for name, _ in model.named_modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._swaps: list[Swap] = []
        model.requires_grad_(False)
        self.heads = {name: self._copy_head(name) for name in find_modules_to_save(model, specs[0].modules_to_save)}
        self.layers: dict[str, AdapterLayer] = {}
        for name, module in list(model.named_modules()):
            if any(name in plan for plan in plans):
                slots = [plan.get(name, Slot()) for plan in plans]
                self.layers[name] = self._wrap(name, module, slots, dtype)
        self.biases = make_biases_trainable(specs[0].bias, model, self.layers, self.heads, self._swap)
        self._views = AdapterViews(self.layers)

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
                other adapters are. With generators on the device of the model, dropout masks need not be copied.
                Adapters of one sweep need different seeds: with one seed, the first rows of A agree across ranks up to
                scale.
            dtype: of the factors; by default float32, or float64 on a float64 base.

        Raises:
            ConfigError: a target that does not exist or cannot be adapted, specs and generators that do not pair up,
                adapters that are there already, adapters with different modules to train whole, or N > 1 with biases
                to train (they belong to the base, which the adapters share).
            NonFiniteError: a weight to start from (init "pissa") holds NaN or infinity.
        """
        specs = [specs] if isinstance(specs, AdapterSpec) else list(specs)
        sources = [generators] if isinstance(generators, Generator) else list(generators)
        check_bank(model, specs, sources)
        plans = [find_targets(model, spec) for spec in specs]
        bank = cls(model, specs, plans, sources, dtype)
        try:
            bank._initialise(plans)
        except BaseException:
            bank.detach()
            raise
        return bank

    def _initialise(self, plans: Sequence[Mapping[str, Slot]]) -> None:
        for i, (spec, plan) in enumerate(zip(self.specs, plans, strict=True)):
            for name in plan if spec.init != "pissa" else ():
                self.layers[name].initialise(i, spec.init)
        for name, layer in self.layers.items():
            members = [i for i, spec in enumerate(self.specs) if spec.init == "pissa" and name in plans[i]]
            if members:
                layer.start_from_weight(members)

    def __len__(self) -> int:
        return len(self.specs)

    # Replacing modules

    def _swap(self, owner: nn.Module, name: str, replacement: nn.Module | nn.Parameter) -> None:
        self._swaps.append(Swap(owner, name, replacement))

    def _place(self, path: str, replacement: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        self._swap(self.model.get_submodule(owner), name, replacement)

    def _copy_head(self, path: str) -> HeadCopies:
        head = HeadCopies(self.model.get_submodule(path), len(self.specs), self.route)
        self._place(path, head)
        return head

    def _wrap(self, path: str, module: Any, slots: Sequence[Slot], dtype: torch.dtype | None) -> AdapterLayer:
        # Plans only name modules that passed check_target.
        kind = cast(type[AdapterLayer], layer_class(module))
        default = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        layer = kind(module, slots, self.route, dtype or default, path)
        self._place(path, layer)
        return layer

    def detach(self) -> nn.Module:
        """The original model: unmerged, its own modules and parameters in place, bit for bit, trainable as before.

        Adapters can still be read and saved afterwards. Detaching twice does nothing more.
        """
        if self.attached:
            restore_base_weights(self.route, self.layers)
            for swap in reversed(self._swaps):
                swap.undo()
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            self.attached = False
        return self.model

    # Which adapter rows go through

    @property
    def selection(self) -> int | tuple[int, ...] | None:
        """The argument of the last ``select``."""
        selection = self.route.selection
        return selection.rows if isinstance(selection, BatchRows) else selection

    def select(self, which: int | Sequence[int] | None) -> None:
        """Send every row through one adapter, or each row of a batch through its own.

        Args:
            which: an adapter for all rows; or a sequence with the adapter of each row, −1 for the base alone, which
                holds for batches of that many rows; or None: the batch is N equal chunks, one per adapter, in order.
                Except with one adapter for all, every adapted module must be called with the batch as its first axis.

        Raises:
            ConfigError: there is no such adapter, or one is merged. (Batches that do not fit are a ShapeError in the
                forward pass.)
        """
        self._require(self.attached, "the adapters have been detached")
        self._require(self.route.merged is None, "an adapter is merged; use switch, or unmerge first")
        if which is None or isinstance(which, int):
            self._check_index(which or 0)
            self.route.selection = which
            return
        self._require(len(which) > 0, "the rows of a batch were selected, but there are none")
        rows = BatchRows([int(i) for i in which])
        for i in rows.adapters:
            self._check_index(0 if i == NO_ADAPTER else i)
        rows.row_order(next(iter(self.layers.values())).A.device)
        self.route.selection = rows

    def merge(self, i: int = 0) -> None:
        """Replace W by W + update of adapter i, so that the forward pass costs what the base and the heads alone cost.

        Raises:
            ConfigError: an adapter is merged already, or a weight cannot be merged into (quantised, grouped).
            NonFiniteError: a factor holds NaN or infinity. After a weight or a factor that fails nothing is merged.
        """
        self._check(i)
        self._require(self.route.merged is None, f"adapter {self.route.merged} is merged already; use switch")
        merge_adapter(self.route, self.layers, i)

    def switch(self, i: int) -> None:
        """Replace the merged adapter by adapter i, computed from the original W, so that no rounding errors add up."""
        self._check(i)
        self._require(self.route.merged is not None, "no adapter is merged; use merge, or select")
        merge_adapter(self.route, self.layers, i)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        self._check(0)
        self._require(self.route.merged is not None, "no adapter is merged")
        restore_base_weights(self.route, self.layers)

    def _check(self, i: int) -> None:
        self._require(self.attached, "the adapters have been detached")
        self._check_index(i)

    def _check_index(self, i: int) -> None:
        self._require(0 <= i < len(self), f"there is no adapter {i}; there are {len(self)}, from 0")

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise ConfigError(otherwise)

    # Training

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for one optimizer of all adapters: A (N, R, ·) and B (N, ·, R / groups); biases; heads."""
        factors = [factor for layer in self.layers.values() for factor in (layer.A, layer.B)]
        whole = [weight for i in range(len(self)) for weight in self._heads_and_biases(i).values()]
        return factors + list(dict.fromkeys(cast(list[nn.Parameter], whole)))

    def parameters(self, i: int) -> dict[str, Tensor]:
        """The parameters for an optimizer of adapter i alone, by name, in a fixed order. Move the model first.

        Returns:
            For each layer of the adapter f"{path}.A" (R, columns of A) and f"{path}.B" (rows of B, R / groups): leaf
            tensors that share memory with the bank's, padded with zeros to the largest rank R of the layer; the same
            objects at each call. Then the parameters of its heads, f"{path}.{key}", and the biases, f"{path}.bias",
            unchanged. Tied parameters occur once. Call ``share_gradients`` after the backward pass.
        """
        self._check_index(i)
        return {**self._views.views(i), **self._heads_and_biases(i)}

    def share_gradients(self) -> None:
        """After a backward pass, set the gradients of what ``parameters`` returned, without copying.

        Raises:
            ConfigError: the model has been moved since ``parameters`` was called.
        """
        self._views.share_gradients()

    def zero_grad(self) -> None:
        """Drop all gradients, stacked and shared."""
        self._views.zero_grad()
        for parameter in self.trainable_parameters():
            parameter.grad = None

    def trim(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies without padding of tensors named and shaped as in ``parameters(i)``: weights or AdamW's moments.

        Factors get the rank of adapter i, in the shapes of ``factors``; other tensors are returned unchanged. A bank of
        another R can ``pad`` them.

        Raises:
            ShapeError: a factor that does not have the padded shape.
        """
        return self._reshape_factors(i, tensors, AdapterLayer.trim)

    def pad(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``trim``: factors padded with zeros to the shapes of ``parameters(i)``.

        Raises:
            ShapeError: a factor that does not have adapter i's own shape.
        """
        return self._reshape_factors(i, tensors, AdapterLayer.pad)

    def _reshape_factors(self, i: int, tensors: Mapping[str, Tensor], change: Any) -> dict[str, Tensor]:
        changed = dict(tensors)
        for name, layer in self._layers_of(i):
            halves: tuple[FactorName, FactorName] = ("A", "B")
            for half in halves:
                if (key := f"{name}.{half}") in tensors:
                    with prefix_errors(name):
                        changed[key] = change(layer, i, half, tensors[key])
        return changed

    # Reading adapters

    def head(self, i: int, path: str) -> nn.Module:
        """Adapter i's own copy of a module trained whole."""
        self._check_index(i)
        self._require(path in self.heads, f"{path!r} is not trained whole; {', '.join(self.heads) or 'nothing'} is")
        return self.heads[path].copies[i]

    def _layers_of(self, i: int) -> list[tuple[str, AdapterLayer]]:
        self._check_index(i)
        return [(name, layer) for name, layer in self.layers.items() if layer.slots[i].rank]

    def _heads_and_biases(self, i: int) -> dict[str, Tensor]:
        """The parameters of adapter i that are trained whole, each once."""
        named = {
            f"{path}.{key}": weight for path in self.heads for key, weight in self.head(i, path).named_parameters()
        } | {f"{path}.bias": bias for path, bias in self.biases.items()}
        first = {id(weight): name for name, weight in reversed(named.items())}
        return {name: weight for name, weight in named.items() if first[id(weight)] == name}

    def parameter_count(self, i: int = 0) -> int:
        """How many numbers adapter i trains, without padding."""
        factors = sum(A.numel() + B.numel() for A, B in self.factors(i).values())
        return factors + sum(weight.numel() for weight in self._heads_and_biases(i).values())

    def factors(self, i: int = 0) -> dict[str, FactorPair]:
        """Copies of (A, B) of adapter i by module path: (r, in) and (out, r), or the other shapes that PEFT stores."""
        return {name: layer.factors(i) for name, layer in self._layers_of(i)}

    def updates(self, i: int = 0) -> dict[str, LowRank]:
        """Updates of adapter i by module path, as matrices (out, in) kept as factors, copied.

        An embedding's is (vocabulary, dim); a convolution's is flattened to (out, in · kh · kw). With init "pissa" it
        is scale · (B A − B0 A0), of nominal rank 2r.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        updates = {}
        for name, layer in self._layers_of(i):
            with prefix_errors(name):
                updates[name] = layer.update(i)
        return updates

    # Files

    def save(self, i: int, folder: Path | str, base_name: str | None = None, task_type: str | None = None) -> None:
        """Write adapter i in PEFT's layout, with the biases and modules that are trained whole.

        It fits the unchanged base: with init "pissa" the factors of B A − B0 A0 are written, of rank 2r, at the same
        scale.

        Args:
            folder: made if need be; files of the same name are replaced.
            base_name: ``base_model_name_or_path`` of the configuration.
            task_type: PEFT's, such as "CAUSAL_LM".

        Raises:
            FormatError: the folder cannot be written to.
        """
        factors = {name: layer.update_factors(i) for name, layer in self._layers_of(i)}
        self._write(i, folder, self.specs[i].as_plain(), factors, base_name, task_type)

    def save_initial(
        self, i: int, folder: Path | str, base_name: str | None = None, task_type: str | None = None
    ) -> None:
        """Write the initial factors of adapter i, as ``save`` does; to be called before training.

        With init "pissa" these are (B0, A0), of rank r, also after training: s · B0 A0 is a part of the base weight.
        """
        factors = {name: layer.initial_factors(i) or layer.factors(i) for name, layer in self._layers_of(i)}
        self._write(i, folder, self.specs[i], factors, base_name, task_type)

    def _write(
        self,
        i: int,
        folder: Path | str,
        spec: AdapterSpec,
        factors: Mapping[str, FactorPair],
        base_name: str | None,
        task_type: str | None,
    ) -> None:
        heads = {name: self.head(i, name) for name in self.heads}
        tensors = peft_tensors(factors, self.layers, self.biases, heads)
        targets = exact_targets(list(factors), self._paths)
        transposed = any(isinstance(self.layers[name], Conv1DLayer) for name in factors)
        write_adapter(Path(folder), spec, tensors, targets, transposed, base_name, task_type)
