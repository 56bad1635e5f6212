"""Tiny models of transformers whose names or layouts on disk are not those in memory, and their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MOE = {**TEXT, "num_hidden_layers": 1, "head_dim": 8, "num_experts_per_tok": 2}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}


def _llava() -> Any:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)


def _qwen_vl() -> Any:
    vision = {**QWEN_VISION, "patch_size": 14}
    return transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_scaling": MROPE}, vision_config=vision)


def _gemma() -> Any:
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2).to_dict()
    vision = transformers.SiglipVisionConfig(**VISION).to_dict()
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def _qwen_vl_moe() -> Any:
    text = {**MOE, "moe_intermediate_size": 24, "num_experts": 4}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {**QWEN_VISION, "patch_size": 14, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)


def _vit() -> Any:
    return transformers.ViTConfig(**{**VISION, "image_size": 16, "patch_size": 8}, num_labels=3)


CONFIGS: dict[str, Callable[[], Any]] = {
    "LlavaForConditionalGeneration": _llava,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Gemma3ForConditionalGeneration": _gemma,
    "ViTForImageClassification": _vit,
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**MOE, num_local_experts=4),
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(**MOE, moe_intermediate_size=24, num_experts=4),
    "GptOssForCausalLM": lambda: transformers.GptOssConfig(**MOE, num_local_experts=4, eos_token_id=1),
    "GraniteMoeForCausalLM": lambda: transformers.GraniteMoeConfig(**TEXT, num_local_experts=4),
    "Qwen3VLMoeForConditionalGeneration": _qwen_vl_moe,
    "NomicBertForSequenceClassification": lambda: transformers.NomicBertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ),
    "Dinov2Model": lambda: transformers.Dinov2Config(**VISION, use_swiglu_ffn=True),
}
"""Configurations by the class of the model."""


def save_model(name: str, folder: Path, seed: int = 0) -> Any:
    """Make a model of a class of ``CONFIGS`` and save it as transformers does."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(CONFIGS[name]()).eval()
    model.save_pretrained(folder)
    return model


def load_model(name: str, folder: Path) -> Any:
    return getattr(transformers, name).from_pretrained(folder).eval()


def model_logits(model: Any) -> Tensor:
    """The output for fixed tokens, or for fixed pixels where the model takes an image."""
    inputs: dict[str, Tensor] = {"input_ids": torch.arange(3, 13)[None]}
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        inputs = {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        output = model.eval()(**inputs)
    logits: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return logits.double()
