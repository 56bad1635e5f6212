"""Tiny transformers models, adapters that PEFT saved on them, and what a model with changed weights answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TOKENS = torch.tensor([[1, 5, 7, 2, 9, 30, 11, 3]])
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


@contextmanager
def quietly() -> Iterator[None]:
    """Third parties' warnings are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_peft() -> ModuleType:
    with quietly():
        import peft
        import transformers.pytorch_utils  # noqa: F401 (layers look for its Conv1D)
    return peft


def llama(tie: bool = False) -> Any:
    """A decoder of two layers with random weights; norms are not left at one."""
    with quietly():
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = LlamaConfig(
                vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tie, initializer_range=0.3,
            )  # fmt: skip
            return _jolted(LlamaForCausalLM(config))


def gpt2() -> Any:
    """GPT-2 of two layers: Conv1D projections, tied output layer."""
    with quietly():
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3)
            return _jolted(GPT2LMHeadModel(config))


def _jolted(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_model(model: Any, folder: Path, **options: Any) -> Path:
    with quietly():
        model.save_pretrained(folder, **options)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quietly():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_peft(model: Any, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter with random factors, as PEFT saves it; the model stays as it is."""
    peft = import_peft()
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **config}
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.add_((0.5 if ".lora_" in name else 0.1) * torch.randn_like(parameter))
        adapted.to(dtype).save_pretrained(folder)
    return folder


def with_peft(model: Any, folder: Path) -> Tensor:
    """Logits of the model with the adapter attached by PEFT; a factor that is missing or not used is an error."""
    peft = import_peft()
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        used = peft.get_peft_model_state_dict(adapted)
    assert not [warning for warning in messages if "missing adapter keys" in str(warning.message)]
    stored = load_file(folder / "adapter_model.safetensors")
    assert {key for key in stored if ".lora_" in key} == {key for key in used if ".lora_" in key}
    return logits(adapted)


def logits(model: Any) -> Tensor:
    with torch.no_grad(), quietly():
        result: Tensor = model(TOKENS).logits
        return result


def with_updates(model: Any, updates: Mapping[str, Tensor]) -> Tensor:
    """Logits after each update (out, in) was added to the weight of its module, which no other module shares."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, update in updates.items():
            module = changed.get_submodule(name)
            turned = type(module).__name__ == "Conv1D"
            module.weight = nn.Parameter(module.weight + (update.T if turned else update))
    return logits(changed)
