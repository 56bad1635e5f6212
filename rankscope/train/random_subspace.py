"""Training in a random subspace: θ = θ₀ + P·z, of which z with d numbers is trained (Li et al. 2018).

With a factor λ for each layer, paid out of d, it is the structure-aware form of Aghajanyan et al. 2020 (SAID):
θ_i = θ₀_i + λ_i·(P·z)_i with z of d − m numbers and m layers; λ starts at 1, z at 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from rankscope.train.fastfood import Fastfood

MODULE_NAME = "subspace"
"""What the module is called that a model gets along with its subspace."""


def count_parameters_and_modules(model: nn.Module, chosen: Collection[str]) -> tuple[int, int]:
    """Of the chosen parameters, each counted once: D, how many numbers they have, and m, how many modules own them."""
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if name in chosen}
    return sum(sizes.values()), len({_owner(name) for name in sizes})


class RandomSubspace(nn.Module):
    """z, and λ where it is layered, of a model whose chosen parameters are frozen at θ₀.

    Before each pass the model's weights become θ₀ + P·z: an attribute of each module that stands before its parameter,
    which stays in place and keeps θ₀. So the model moves, names its parameters and recomputes activations as ever; and
    a weight that is tied is moved once and seen everywhere.

    Attributes:
        z: (d,), or (d − m,) where it is layered.
        scales: λ (m,), in the order of the modules; None where it is not layered.
    """

    scales: nn.Parameter | None

    def __init__(
        self, model: nn.Module, chosen: Collection[str], dim: int, generator: torch.Generator, layered: bool = False
    ) -> None:
        """Make a subspace of ``dim`` numbers of the model's parameters called ``chosen``, and put the model into it.

        Raises:
            ValueError: ``dim`` leaves nothing for z, or exceeds the number of chosen numbers.
        """
        super().__init__()
        count, layers = count_parameters_and_modules(model, chosen)
        own = dim - layers if layered else dim
        if not 1 <= own <= count:
            raise ValueError(f"a subspace of {dim} numbers in a model of {count} with {layers} layers")
        shapes = {name: weight.shape for name, weight in model.named_parameters() if name in chosen}
        owners = list(dict.fromkeys(map(_owner, shapes)))
        self.shapes = shapes
        self.layer_of = [owners.index(_owner(name)) for name in shapes]
        self.places = _places(model, shapes)
        self.z = nn.Parameter(torch.zeros(own))
        self.scales = nn.Parameter(torch.ones(layers)) if layered else None
        self.product = Fastfood(count, own, generator)
        for name in shapes:
            model.get_parameter(name).requires_grad_(False)
        model.add_module(MODULE_NAME, self)
        model.register_forward_pre_hook(lambda model, _: self.set_weights(model))

    @property
    def learning_rate_factor(self) -> float:
        """√(D/d): at this multiple of a rate a step of Adam in z moves the weights as far as one at that rate in θ.

        A step moves each number by about the rate; ‖P·Δz‖ = ‖Δz‖, over d numbers here and D there.
        """
        return math.sqrt(self.product.rows / self.product.columns)

    def changes(self) -> dict[str, Tensor]:
        """P·z, times λ, in the shape of each parameter by its name."""
        parts = self.product(self.z).split([shape.numel() for shape in self.shapes.values()])
        if self.scales is not None:
            scales = self.scales.unbind()
            parts = tuple(scales[layer] * part for layer, part in zip(self.layer_of, parts, strict=True))
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def set_weights(self, model: nn.Module) -> None:
        """Give the model the weights θ₀ + P·z."""
        base = dict(model.named_parameters())
        for name, change in self.changes().items():
            weight = base[name] + change
            for module, last in self.places[name]:
                # Past nn.Module, which takes only a parameter where there is one.
                object.__setattr__(module, last, weight)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _places(model: nn.Module, chosen: Collection[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter stands, by its first name: a tied one in several modules."""
    named = {id(weight): name for name, weight in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in chosen}
    for module, last, weight in _slots(model):
        if (name := named[id(weight)]) in places:
            places[name].append((module, last))
    return places


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for last, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            yield module, last, weight
