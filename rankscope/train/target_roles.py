"""What an entry of ``--targets`` means on a model: names of modules, or what they do in it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from torch import nn

from rankscope.errors import ConfigError
from rankscope.formats.names import matches_path_end
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.layer_types import LinearLayer
from rankscope.lora.spec import ALL_LINEAR, AdapterSpec
from rankscope.lora.targets import find_targets, layer_class

# What the models of transformers call the four matrices of attention.
ROLE_NAMES = {
    "q": ("q_proj", "query", "q_lin", "wq", "q", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "wk", "k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "wv", "v", "value_proj"),
    "o": (
        *("o_proj", "out_proj", "out_lin", "wo", "o", "attn.c_proj", "attn.Wo"),
        *("attention.output.dense", "crossattention.output.dense"),
        *("attention.dense", "self_attention.dense", "self_attn.dense"),
    ),
}
FUSED_NAMES = ("c_attn", "query_key_value", "Wqkv", "qkv_proj", "qkv")
"""Names of matrices that are q, k and v at once."""
QKV = {"q", "k", "v"}
ROLE_ENTRIES = {*ROLE_NAMES, "attention", "mlp"}
DOTTED_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def expand_targets(model: nn.Module, entry: str) -> str | tuple[str, ...]:
    """What ``AdapterSpec.targets`` takes for one entry.

    "all" is every linear layer but the output. Names, separated by commas, are those of modules; among them q, k, v,
    o, attention (the four) and mlp (all else that is linear in the blocks) stand for what has that role, where the
    model has no linear layer of that very name. Anything else is a regular expression for whole paths.

    Raises:
        ConfigError: the model has no matrix of a role, or none that is of this role alone.
    """
    names = [part.strip() for part in entry.split(",")]
    if entry.strip() in ("all", ALL_LINEAR):
        return ALL_LINEAR
    if not all(DOTTED_NAME.fullmatch(name) for name in names):
        return entry
    linear = linear_layers(model)
    asked = {
        name for name in names if name in ROLE_ENTRIES and not any(matches_path_end(name, path) for path in linear)
    }
    layers = layers_with_roles(model, linear, asked)
    plain = [name for name in names if name not in asked]
    return tuple(dict.fromkeys([*plain, *shortest_names(model, layers)]))


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of all linear layers that adapters go to."""
    kinds = ((path, layer_class(module)) for path, module in model.named_modules())
    return [path for path, kind in kinds if kind and issubclass(kind, LinearLayer)]


def layers_with_roles(model: nn.Module, linear: Sequence[str], asked: Collection[str]) -> list[str]:
    """Paths of the layers, in the blocks of the model, that have the roles asked for."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    roles = {path: layer_role(path, linear) for path in linear if any(path.startswith(f"{name}.") for name in lists)}
    present = set(roles.values())
    wanted: set[str] = set()
    for name in sorted(asked):
        meant = present - {"mlp"} if name == "attention" else {name} & present
        if not meant and name in QKV and set(asked) >= QKV:
            meant = {"fused"} & present
        if not meant:
            raise ConfigError(f"target {name!r}: {explain_missing_role(name, roles, linear)}")
        wanted |= meant
    return [path for path, role in roles.items() if role in wanted]


def layer_role(path: str, linear: Sequence[str]) -> str:
    """q, k, v, o, "fused" (q, k and v at once), or "mlp" for any other layer of a block."""
    parent, _, last = path.rpartition(".")
    if last == "wo" and f"{parent}.wq" not in linear:
        return "mlp"  # T5 calls one so
    for role, names in (*ROLE_NAMES.items(), ("fused", FUSED_NAMES)):
        if any(matches_path_end(name, path) for name in names):
            return role
    return "mlp"


def explain_missing_role(name: str, roles: dict[str, str], linear: Sequence[str]) -> str:
    """Why no layer has this role alone."""
    fused = next((path for path, role in roles.items() if role == "fused"), None)
    if name in QKV and fused:
        own = fused.rpartition(".")[2]
        return f"{own} is q, k and v at once in this model; ask for q,k,v, or for {own}"
    known = list(dict.fromkeys(path.rpartition(".")[2] for path in linear))
    some = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f"no layer of this model is known to have that role; it has {some or 'none'}"


def shortest_names(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The shortest ends of paths that name these modules and no other: an adapter's configuration lists them."""
    paths = [path for path, _ in model.named_modules() if path]
    chosen = set(wanted)
    exact: dict[str, bool] = {}

    def names_others(name: str) -> bool:
        if name not in exact:
            exact[name] = all(path in chosen for path in paths if matches_path_end(name, path))
        return not exact[name]

    names = []
    for path in wanted:
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1)]
        names.append(next((end for end in ends if not names_others(end)), path))
    return list(dict.fromkeys(names))


def parameters_per_rank(model: nn.Module, targets: str | Sequence[str], heads: Sequence[str] = ()) -> int:
    """How many numbers an adapter on these targets has for each unit of rank: Σ (in + out) over linear layers.

    Args:
        targets: as ``AdapterSpec`` takes them.
        heads: modules that are trained in full, where no adapter goes and whose weights do not count.

    Raises:
        ConfigError: a target that matches nothing, or that adapters cannot go to.
    """
    # With groups, a convolution's second factor is of a whole number of numbers only at multiples of them.
    rank = math.lcm(*(module.groups for module in model.modules() if isinstance(module, nn.Conv2d)))
    paths = find_targets(model, AdapterSpec(rank=rank, alpha=1.0, targets=targets, modules_to_save=tuple(heads)))
    count = 0
    for path in paths:
        module = model.get_submodule(path)
        kind: type[AdapterLayer] | None = layer_class(module)
        if kind is not None:
            count += sum(math.prod(shape) for shape in kind.shapes(module, rank))
    return count // rank
