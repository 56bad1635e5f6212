"""Small models that PEFT adapts and saves, for every method that is read; PEFT is imported when asked for."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankscope.formats import store as formats
from rankscope.formats.abstract_store import Store
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank

# PEFT multiplies and merges in float32, which is the coarser side.
REL = 1e-5


def import_peft() -> Any:
    """PEFT, and transformers' Conv1D under its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft as module
        from transformers.pytorch_utils import Conv1D

        module.Conv1D = Conv1D
        return module


class Tiny(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict(layers)


class Saved:
    """A model adapted by PEFT, all its trained parameters random; its base and the folder that PEFT saved."""

    def __init__(self, peft: Any, folder: Path, method: str, model: nn.Module, **config: Any) -> None:
        self.base = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.base_file = folder / "model.safetensors"
        self.folder = folder / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = next(c for t, c in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value == method)
            self.model = peft.get_peft_model(copy.deepcopy(model), make(**config))
            for _, value in self.model.named_parameters():
                if value.requires_grad:
                    value.data = torch.randn_like(value) * 0.5
            self.save()
            save_file({name: value.contiguous() for name, value in self.base.items()}, self.base_file)

    def save(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(self.folder)

    def merged(self) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = copy.deepcopy(self.model).merge_and_unload().state_dict()
        return {name: tuned[name] - value for name, value in self.base.items()}

    def check(self, *modules: str, turned: bool = False, rel: float = REL, base: bool = True) -> Store:
        store = formats.open(self.folder, base=self.base_file if base else None)
        merged = self.merged()
        for module in modules:
            truth = merged[f"{module}.weight"].flatten(1)
            check_equal(store, module, truth.T if turned else truth, rel)
        return store


def check_equal(store: Store, module: str, truth: Tensor, rel: float = REL) -> None:
    update, info = store[module], store.info(module)
    assert update.shape == info.shape == tuple(truth.shape)
    assert update.nominal_rank == info.nominal_rank
    scale = float(truth.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(update.dense(), truth, rtol=0, atol=rel * scale)
    sigma = np.linalg.svd(truth.double().numpy(), compute_uv=False)
    ours = update.singular_values().double().numpy()
    np.testing.assert_allclose(ours, sigma[: len(ours)], rtol=0, atol=2 * rel * sigma[0])


def two() -> Tiny:
    """Two layers of different shapes, both sides."""
    return Tiny(q=nn.Linear(12, 8), k=nn.Linear(8, 24))


NEEDS_BASE = True
# method → (configuration, class of the update, whether the base is needed)
LINEAR = {
    "ADALORA": ({"init_r": 3, "target_r": 2, "total_step": 10, "lora_alpha": 7}, LowRank, False),
    "LOHA": ({"r": 2, "alpha": 5}, Hadamard, False),
    "LOKR": ({"r": 1, "alpha": 5}, Kronecker, False),
    "LOKR, both whole": ({"r": 8, "alpha": 5}, Kronecker, False),
    "LOKR, both factored": ({"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}, Kronecker, False),
    "VERA": ({"r": 5}, LowRank, NEEDS_BASE),
    "PVERA": ({"r": 5}, LowRank, NEEDS_BASE),
    "DELORA": ({"r": 3}, LowRank, False),
    "GRALORA": ({"r": 4, "gralora_k": 2, "alpha": 6}, LowRank, False),
    "GRALORA, hybrid": ({"r": 4, "gralora_k": 4, "alpha": 6, "hybrid_r": 2}, LowRank, False),
    "RANDLORA": ({"r": 3, "randlora_alpha": 9}, LowRank, NEEDS_BASE),
    "VBLORA": ({"r": 2, "num_vectors": 9, "vector_length": 4, "topk": 3}, LowRank, False),
    "VBLORA, top k": (
        {"r": 2, "num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
        LowRank,
        False,
    ),
    "MISS": ({"r": 5}, LowRank, NEEDS_BASE),
    "MISS, mini": ({"r": 4, "mini_r": 4, "init_weights": "mini"}, LowRank, NEEDS_BASE),
    "MISS, bat": ({"r": 4, "init_weights": "bat"}, Dense, NEEDS_BASE),
    "C3A": ({"block_size": 4}, Dense, False),
    "FOURIERFT": ({"n_frequency": 7, "scaling": 90.0, "random_loc_seed": 11}, Dense, NEEDS_BASE),
    "SHIRA": ({"r": 2}, Dense, NEEDS_BASE),
    "HIRA": ({"r": 3}, Dense, NEEDS_BASE),
    "IA3": ({"feedforward_modules": ["k"]}, Dense, NEEDS_BASE),
    "HRA": ({"r": 3}, LowRank, NEEDS_BASE),
    "HRA, orthogonal": ({"r": 3, "apply_GS": True}, LowRank, NEEDS_BASE),
    "DEFT": ({"r": 3, "alpha": 5}, LowRank, NEEDS_BASE),
    "DEFT, qr": ({"r": 3, "decomposition_method": "qr"}, LowRank, NEEDS_BASE),
    "DEFT, para": ({"r": 3, "para": True}, LowRank, NEEDS_BASE),
    "GLORA": ({"r": 3}, Dense, NEEDS_BASE),
    "GLORA, vectors": ({"r": 3, "config_A_B": "vector"}, Dense, NEEDS_BASE),
    "GLORA, constants": ({"r": 3, "config_A_B": "constant"}, Dense, NEEDS_BASE),
    "OFT": ({"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, Dense, NEEDS_BASE),
    "OFT, shared": ({"r": 0, "oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}, Dense, NEEDS_BASE),
    **{
        f"OFT, {n} terms": ({"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": n}, Dense, NEEDS_BASE)
        for n in (2, 3, 5, 6)
    },
}
