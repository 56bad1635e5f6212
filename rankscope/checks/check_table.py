"""The tables of checks: one row for each finding that ``rankscope check`` can report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rankscope.checks import base_checks, file_checks, merge_checks, server_checks, update_checks
from rankscope.checks.adapter_facts import AdapterFacts
from rankscope.checks.finding import Finding
from rankscope.checks.merge_facts import MergeFacts
from rankscope.checks.thresholds import Limits

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Check(Generic[Facts]):
    """One check.

    ``name``: of its finding, also in JSON and SARIF. ``asks``: the question, in a few words. ``examine``: its finding
    from the facts and the thresholds; None where it does not apply. ``command``: the next command after an error or a
    warning, with ``{path}``, ``{base}`` and ``{adapter}``. ``server``: it is made for this server only (``--for``).
    """

    name: str
    asks: str
    examine: Callable[[Facts, Limits], Finding | None]
    command: str = "rankscope inspect {path} -v"
    server: str = ""


SPECTRUM = "rankscope spectrum {path}"
MERGE = "rankscope merge {base} {adapter} -o merged"
MERGE_FIRST = "rankscope merge {base} {path} -o merged"
TO_PEFT = "rankscope convert {path} --to peft -o adapter-fixed"
ONE_SCALE = "rankscope resize {path} --sigma-ratio 1e-7 -o one-scale"
CHECKS: list[Check[AdapterFacts]] = [
    Check("readable", "can it be read?", file_checks.check_reading),
    Check("pairs", "has each factor its other half?", file_checks.check_pairs),
    Check("shapes", "do the factors multiply?", file_checks.check_factor_shapes),
    Check("finite", "is there NaN or infinity?", file_checks.check_finite),
    Check("keys", "does PEFT's loader find the keys?", file_checks.check_keys, TO_PEFT),
    Check("names", "are the layers in the base?", base_checks.check_names),
    Check("base-shapes", "do the updates fit their weights?", base_checks.check_base_shapes),
    Check("targets", "does target_modules reach the layers?", file_checks.check_targets),
    Check("claimed-rank", "does the configuration give the right rank?", file_checks.check_claimed_ranks),
    Check("saved-modules", "are the modules trained whole in the file?", file_checks.check_saved_modules),
    Check("unread", "are there tensors nobody reads?", file_checks.check_unread),
    Check("trained", "did it learn anything?", update_checks.check_trained),
    Check("size", "is it too weak or too strong?", update_checks.check_size, SPECTRUM),
    Check("layer-size", "is a layer too strong?", update_checks.check_layer_sizes, SPECTRUM),
    Check("spike", "is one direction far above the others?", update_checks.check_spike, SPECTRUM),
    Check("scale", "is α/r ordinary?", update_checks.check_scale),
    Check("alpha", "is α known everywhere?", update_checks.check_alpha),
    Check("rslora", "is the scale α/√r?", update_checks.check_rslora),
    Check("dora", "is it DoRA, and whole?", file_checks.check_magnitudes),
    Check("initialisation", "did the initialisation move the base?", update_checks.check_initialisation),
    Check("fp16", "can float16 hold it?", update_checks.check_half_precision),
    Check(
        "rank-use",
        "is the rank used?",
        update_checks.check_rank_use,
        "rankscope resize {path} --sigma-ratio 0.001 -o small",
    ),
    Check("vllm-layout", "is it in a layout that vLLM reads?", server_checks.check_vllm_layout, TO_PEFT, "vllm"),
    Check("vllm-rank", "does max_lora_rank hold it?", server_checks.check_vllm_rank, server="vllm"),
    Check("vllm-parts", "does it have parts vLLM refuses?", server_checks.check_vllm_parts, MERGE_FIRST, "vllm"),
    Check("vllm-scale", "does vLLM take the right scale?", server_checks.check_vllm_scales, ONE_SCALE, "vllm"),
    Check("vllm-targets", "are all layers linear?", server_checks.check_vllm_targets, MERGE_FIRST, "vllm"),
]
"""The checks of an adapter. Whoever goes through the list reads it when called, so an appended row works too."""

MERGE_CHECKS: list[Check[MergeFacts]] = [
    Check("merge-names", "are the adapter's layers in the checkpoint?", merge_checks.check_merged_names),
    Check("merge-scale", "how many times is the adapter in it?", merge_checks.check_merged_scale, MERGE),
    Check("merge-residual", "what else is in these layers?", merge_checks.check_merged_residual, MERGE),
    Check("merge-rounding", "does its dtype hold the update?", merge_checks.check_merged_rounding, MERGE),
    Check("merge-others", "do other weights differ from the base?", merge_checks.check_merged_others, MERGE),
]
"""The checks of a checkpoint that should contain an adapter."""


def servers() -> list[str]:
    """The servers whose contracts are known."""
    return list(dict.fromkeys(check.server for check in CHECKS if check.server))
