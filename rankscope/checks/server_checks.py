"""What a server takes: vLLM's contract, as its ``PEFTHelper`` and ``LoRAConfig`` check it when an adapter is loaded."""

from __future__ import annotations

from rankscope.checks.adapter_facts import DORA_PRODUCT, AdapterFacts
from rankscope.checks.finding import Finding, format_names, format_share, report_error, report_ok, report_warning
from rankscope.checks.thresholds import Limits
from rankscope.formats.peft_config import resolve_pattern

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank can have."""
VLLM_DEFAULT_RANK = 16


def check_vllm_layout(facts: AdapterFacts, _: Limits) -> Finding:
    """vLLM reads LoRA in PEFT's layout only."""
    method = facts.config.get("peft_type")
    if facts.is_peft and method == "LORA":
        return report_ok("LoRA in PEFT's layout, which vLLM reads")
    what = f"the method {method}" if facts.is_peft else "this format"
    return report_error(
        f"vLLM reads LoRA in PEFT's layout, not {what}",
        "merge it into the base with rankscope merge, and serve the merged model"
        if facts.is_peft
        else "rankscope convert --to peft writes that layout",
    )


def check_vllm_rank(facts: AdapterFacts, _: Limits) -> Finding | None:
    """max_lora_rank, which the server is started with."""
    ranks = [layer.rank for layer in facts.layers if layer.is_product and layer.rank]
    if not ranks:
        return None
    claimed = facts.config.get("r")
    rank = max([*ranks, claimed if isinstance(claimed, int) else 0])
    if isinstance(claimed, int) and claimed < rank:
        return report_error(
            f"the configuration says r = {claimed}, which is all that vLLM compares with max_lora_rank, and the "
            f"tensors have a rank of up to {rank}",
            f"rankscope resize --rank {rank} writes it with the largest rank as r",
            claimed,
            rank,
        )
    needed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if needed is None:
        return report_error(
            f"rank {rank} is above vLLM's largest max_lora_rank, {VLLM_RANKS[-1]}",
            f"rankscope resize --rank {VLLM_RANKS[-1]} makes it smaller",
            rank,
            VLLM_RANKS[-1],
        )
    if needed > VLLM_DEFAULT_RANK:
        return report_warning(
            f"rank {rank} is above vLLM's default max_lora_rank, {VLLM_DEFAULT_RANK}",
            f"start vLLM with --max-lora-rank {needed}",
            rank,
            VLLM_DEFAULT_RANK,
        )
    return report_ok(f"rank {rank} fits vLLM's default max_lora_rank, {VLLM_DEFAULT_RANK}", rank)


def check_vllm_parts(facts: AdapterFacts, _: Limits) -> Finding | None:
    """What vLLM refuses beside factors: whole modules, DoRA, biases."""
    config, peft = facts.config, facts.peft
    parts = []
    if config.get("modules_to_save") or (peft is not None and peft.whole):
        parts.append("modules_to_save")
    if config.get("use_dora") or any(layer.method == DORA_PRODUCT for layer in facts.layers):
        parts.append("DoRA")
    if config.get("bias") not in (None, "none"):
        parts.append(f"bias = {config['bias']!r}")
    if config.get("lora_bias") or (peft is not None and peft.factor_biases):
        parts.append("lora_bias")
    if config.get("trainable_token_indices") or (peft is not None and peft.token_rows):
        parts.append("trained token rows")
    if not parts:
        return report_ok("no modules_to_save, no DoRA and no bias, which vLLM does not take")
    return report_error(
        f"vLLM does not take {', '.join(parts)}",
        "merge it into the base with rankscope merge, and serve the merged model",
        len(parts),
        0,
    )


def check_vllm_scales(facts: AdapterFacts, _: Limits) -> Finding | None:
    """vLLM takes one r and one α of the configuration for every layer."""
    if facts.peft is None or not (facts.config.get("alpha_pattern") or facts.config.get("rank_pattern")):
        return None
    alpha, rank, rslora = facts.config.get("lora_alpha"), facts.config.get("r"), facts.config.get("use_rslora")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        return None
    scale = alpha / (rank**0.5 if rslora else rank)
    wrong = [layer for layer in facts.products if layer.rank and abs(layer.scale - scale) > 1e-6 * abs(scale)]
    if not wrong:
        return report_ok(f"all layers have the scale {scale:.4g} of lora_alpha and r, which vLLM takes", scale)
    return report_error(
        f"{format_share(len(wrong), len(facts.products), 'layer')} have another scale than lora_alpha and r give "
        f"({wrong[0].scale:.4g} in {wrong[0].name}, vLLM takes {scale:.4g}): patterns are not read",
        "rankscope resize writes it with the scale 1 in every layer",
        wrong[0].scale,
        scale,
        [layer.name for layer in wrong],
    )


def check_vllm_targets(facts: AdapterFacts, _: Limits) -> Finding | None:
    """vLLM puts LoRA on linear layers."""
    if facts.peft is None:
        return None
    if "target_modules" not in facts.config:
        return report_error("adapter_config.json has no target_modules, which vLLM requires", "add them to it")
    odd = {}
    for module, keys in facts.peft.factors.items():
        if "lora_embedding_A" in keys:
            odd[module] = "an embedding"
        elif "lora_A" in keys and len(facts.ranges[keys["lora_A"]].info.shape) > 2:
            odd[module] = "a convolution"
        elif resolve_pattern({"lm_head": True}, module, False):
            odd[module] = "the output layer"
    stacked = facts.config.get("target_parameters")
    if stacked:
        return report_warning(
            f"it adapts bare parameters ({format_names(map(str, stacked))}), which vLLM takes for few models",
            "try it; or merge it into the base with rankscope merge, and serve the merged model",
        )
    if not odd:
        return report_ok(f"all {len(facts.peft.factors)} layers are linear layers within the model")
    first, share = next(iter(odd)), format_share(len(odd), len(facts.peft.factors), "layer")
    report = report_error if "a convolution" in odd.values() else report_warning  # embeddings depend on the model
    return report(
        f"vLLM puts LoRA on linear layers within the model, and on vocabularies of few models; {share} are others "
        f"({first} is {odd[first]})",
        "merge it into the base with rankscope merge, and serve the merged model",
        layers=odd,
    )
