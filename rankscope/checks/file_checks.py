"""Checks of what is in the file: whether it can be read, is whole, is finite, and is spelled as its readers expect."""

from __future__ import annotations

import re

from rankscope.checks.adapter_facts import DORA_PRODUCT, AdapterFacts
from rankscope.checks.finding import (
    Finding,
    format_names,
    format_share,
    report_error,
    report_ok,
    report_unchecked,
    report_warning,
)
from rankscope.checks.thresholds import Limits
from rankscope.formats.file_formats import format_title
from rankscope.formats.names import matches_path_end
from rankscope.formats.peft_config import resolve_pattern
from rankscope.formats.peft_folder import UNKNOWN_REASON
from rankscope.formats.peft_keys import PEFT_PREFIX, parse_key

# The halves of a pair, as the tools spell them.
HALVES = (
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("down", "up"),
)
_HALF = {half: (other, first) for first, second in HALVES for half, other in ((first, second), (second, first))}
_HALF_KEY = re.compile(rf"(?<=[._])(?:{'|'.join(_HALF)})(?=\.|$)")
OWN_LIMITS = ("(--base)", "with --base", "target_parameters:", "is not read")
"""In a refusal: that rankscope lacks the base, or does not know this kind; the adapter may be whole."""
UNREAD_REASONS = (UNKNOWN_REASON, "a DoRA magnitude without factors", "no factors are beside it")
DEFAULT_ADAPTER = "default"  # the name that PEFT gives an adapter
# Heads that PEFT lists for every classifier, of which a model has one.
ALTERNATIVE_HEADS = {"classifier", "score"}


def check_reading(facts: AdapterFacts, _: Limits) -> Finding:
    """Whether rankscope's reader takes it; what it refuses, others refuse or misread."""
    if facts.store is None and any(reason in facts.refusal for reason in OWN_LIMITS):
        return report_unchecked(facts.refusal, "give the base with --base, or look at the sentence")
    if facts.store is None:
        return report_error(
            f"it cannot be opened: {facts.refusal}",
            "save it again from the training, or correct what the sentence names",
        )
    unread = [layer for layer in facts.layers if layer.problem and "NaN" not in layer.problem]
    if unread:
        return report_error(
            f"{format_share(len(unread), len(facts.layers), 'layer')} cannot be read: {unread[0].problem}",
            "save the adapter again from the training",
            layers=[layer.name for layer in unread],
        )
    methods = ", ".join(dict.fromkeys(layer.method for layer in facts.layers))
    count = len(facts.layers)
    return report_ok(f"{format_title(facts.store.kind)} of {count} update{'s' * (count != 1)} ({methods})", count)


def check_pairs(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether each A has its B."""
    pairs = [(key, partner) for key in facts.ranges if (partner := _partner(key)) is not None]
    if not pairs:
        return None
    alone = [key for key, partner in pairs if partner not in facts.ranges]
    if alone:
        return report_error(
            f"{len(alone)} of {len(pairs)} factors have lost their other half, first {alone[0]}",
            "the file is not whole: copy or save it again",
            layers=alone,
        )
    return report_ok(f"all {len(pairs) // 2} pairs of factors are whole", len(pairs) // 2)


def _partner(key: str) -> str | None:
    """The key of the other half of a pair; None for a key that is no half, or a bias."""
    match = None if key.endswith(".bias") else _HALF_KEY.search(key)
    return None if match is None else key[: match.start()] + _HALF[match[0]][0] + key[match.end() :]


def check_factor_shapes(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether the factors of a linear layer multiply, and DoRA's magnitude has a number for each output."""
    wrong, seen = [], 0
    for key, stored in facts.ranges.items():
        partner = _partner(key)
        match = _HALF_KEY.search(key)
        if match is None or partner is None or partner not in facts.ranges or _HALF[match[0]][1] != match[0]:
            continue
        A, B = stored.info.shape, facts.ranges[partner].info.shape
        seen += 1
        is_packed = len(A) == len(B) == 2 and not key.endswith("weight") and B[1] and A[0] % B[1] == 0  # loralib
        if len(A) < 2 or len(B) < 2 or (A[0] != B[1] and not is_packed and len(A) == 2) or 0 in (*A, *B):
            wrong.append((key, A, B))
        elif (magnitude := _magnitude_size(facts, key)) not in (None, B[0], A[1]):
            wrong.append((key, (magnitude,), B))
    if not seen:
        return None
    if wrong:
        key, A, B = wrong[0]
        return report_error(
            f"{format_share(len(wrong), seen, 'pair')} of factors do not fit each other, first {key}: {A} and {B}",
            "A is (r, in), B (out, r), a magnitude (out,): save the adapter again from the training",
            layers=[key for key, *_ in wrong],
        )
    return report_ok(f"the factors of all {seen} pairs multiply", seen)


def _magnitude_size(facts: AdapterFacts, key: str) -> int | None:
    parsed = parse_key(key)
    if facts.peft is None or parsed is None or parsed.module not in facts.peft.magnitudes:
        return None
    size = 1
    for length in facts.ranges[facts.peft.magnitudes[parsed.module]].info.shape:
        size *= length
    return size


def check_finite(facts: AdapterFacts, _: Limits) -> Finding:
    """NaN and infinity."""
    bad = {key: stored.nonfinite for key, stored in facts.ranges.items() if stored.nonfinite}
    overflowing = [layer.name for layer in facts.layers if "NaN" in layer.problem]
    if bad or overflowing:
        first = next(iter(bad or overflowing))
        return report_error(
            f"{sum(bad.values())} numbers in {format_share(len(bad), len(facts.ranges), 'tensor')} are NaN or infinite"
            f", first in {first}"
            if bad
            else f"the product of the factors overflows in {format_names(overflowing)}",
            "the training diverged: take an earlier checkpoint, or train with a lower rate or gradient clipping",
            sum(bad.values()) or len(overflowing),
            0,
            bad or overflowing,
        )
    return report_ok(f"all numbers of {len(facts.ranges)} tensors are finite", 0)


def check_unread(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Tensors whose meaning nobody knows."""
    if facts.store is None:
        return None
    unread = [item for item in facts.store.skipped if item.reason in UNREAD_REASONS]
    factors = facts.peft.factors if facts.peft is not None else {}
    skipped = [item for item in facts.store.skipped if item.name in factors and item not in unread]
    if skipped and not unread:
        return report_unchecked(
            f"{len(skipped)} of {len(factors)} adapted modules could not be examined, first {skipped[0].name}: "
            f"{skipped[0].reason}",
            "nothing here is said about these",
        )
    if not unread:
        return report_ok("every tensor in the file has a known meaning", 0)
    return report_warning(
        f"{len(unread)} tensors have no known meaning and are used by no reader, first {unread[0].name} "
        f"({unread[0].reason})",
        "see `rankscope inspect -v`; what they change is lost",
        layers=[item.name for item in unread],
    )


def check_keys(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Keys that PEFT's loader does not look for: it takes no notice of them, and the model stays as it was."""
    if facts.peft is None:
        return None
    factors = [key for keys in facts.peft.factors.values() for key in keys.values()]
    adapters = {key: part.adapter for key in factors if (part := parse_key(key)) is not None and part.adapter}
    bare = [key for key in factors if not key.startswith(PEFT_PREFIX)]
    odd = list(dict.fromkeys([*bare, *adapters]))
    if not odd:
        return report_ok("the keys are spelled as PEFT saves them", 0)
    says = f"{len(odd)} of {len(factors)} keys {{}} (first {odd[0]}): {{}} without an error"
    advice = "rankscope convert --to peft rewrites them"
    if not bare and set(adapters.values()) == {DEFAULT_ADAPTER}:
        says = says.format(
            "carry the name of the adapter",
            f"older versions of PEFT, or PEFT under another name than {DEFAULT_ADAPTER!r}, ignore them",
        )
        return report_warning(says, advice, layers=odd)
    reason = f"do not begin with {PEFT_PREFIX}" if bare else f"carry the adapter's name {adapters[odd[0]]!r}"
    return report_error(says.format(reason, "PEFT ignores them"), advice, layers=odd)


def check_claimed_ranks(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether the configuration gives the ranks of the tensors: PEFT makes its layers by the configuration."""
    if facts.peft is None or facts.config.get("target_parameters"):
        return None
    patterns, wrong = facts.config.get("rank_pattern") or {}, []
    factors = facts.peft.factors
    for module, keys in factors.items():
        key = keys.get("lora_A") or keys.get("lora_embedding_A")
        shape = facts.ranges[key].info.shape if key else ()
        claimed = resolve_pattern(patterns, module, facts.config.get("r"))
        if shape and claimed is not None and claimed != shape[0]:
            wrong.append((module, claimed, shape[0]))
    if not wrong:
        return report_ok("the configuration gives the ranks that the tensors have", 0)
    module, claimed, rank = wrong[0]
    return report_error(
        f"the configuration says r = {claimed} and the tensors have {rank} in "
        f"{format_share(len(wrong), len(factors), 'layer')} (first {module}): PEFT cannot load it, and α/r is wrong",
        f"write r (or rank_pattern) = {rank} into adapter_config.json, and the α that it was trained with",
        float(claimed),
        float(rank),
        [module for module, *_ in wrong],
    )


def check_targets(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether the configuration's target_modules reach every layer in the file: PEFT adapts these, and no other."""
    targets = facts.config.get("target_modules")
    if facts.peft is None or not targets or targets == "all-linear" or facts.config.get("target_parameters"):
        return None
    modules = [module.replace(".base_layer", "") for module in facts.peft.factors]
    excluded = facts.config.get("exclude_modules") or []
    out_of_reach = [
        module for module in modules if not _reaches(targets, module) or (excluded and _reaches(excluded, module))
    ]
    if out_of_reach:
        return report_error(
            f"target_modules reaches {len(modules) - len(out_of_reach)} of {len(modules)} layers in the file; PEFT "
            f"ignores the others without an error, first {out_of_reach[0]}",
            "add the names of these layers to target_modules in adapter_config.json",
            layers=out_of_reach,
        )
    listed = [] if isinstance(targets, str) else [str(name) for name in targets]
    absent = [name for name in listed if not any(matches_path_end(name, module) for module in modules)]
    if absent:
        return report_warning(
            f"target_modules names {format_names(absent)}, of which the file has no layer; PEFT makes new ones, which "
            "change nothing",
            "if they were trained, the file is not whole; if not, take them out of target_modules",
            layers=absent,
        )
    return report_ok(f"target_modules reaches all {len(modules)} layers in the file", 0)


def _reaches(targets: object, module: str) -> bool:
    """As PEFT's check_target_module_exists: a text is a regular expression for the whole path, a list has endings."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return False
    return isinstance(targets, list) and any(matches_path_end(str(name), module) for name in targets)


def check_saved_modules(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether the modules that the configuration says were trained whole are in the file."""
    saved = facts.config.get("modules_to_save")
    if facts.peft is None or not isinstance(saved, list) or not saved:
        return None
    names = {tensor.name for tensor in facts.peft.others}
    absent = [name for name in saved if not any(re.search(rf"(?:^|\.){re.escape(name)}\.", held) for held in names)]
    if len(absent) == len(saved) or set(absent) - ALTERNATIVE_HEADS:
        return report_error(
            f"modules_to_save names {format_names(absent)}, and the file holds nothing of it: a new head is random",
            "save the adapter again with these modules, or take them out of modules_to_save",
            layers=absent,
        )
    return report_ok(f"{len(saved) - len(absent)} module trained whole (modules_to_save) is in the file", 0)


def check_magnitudes(facts: AdapterFacts, _: Limits) -> Finding | None:
    """DoRA: whether configuration and tensors agree, and what a reader that drops the magnitude would lose."""
    layers = [layer for layer in facts.layers if layer.method == DORA_PRODUCT]
    magnitudes = len(facts.peft.magnitudes) if facts.peft is not None else len(layers)
    is_claimed = bool(facts.config.get("use_dora")) if facts.is_peft else bool(layers)
    if not magnitudes and not is_claimed:
        return None
    if bool(magnitudes) != is_claimed:
        says = (
            f"{magnitudes} DoRA magnitudes are in the file, and use_dora is false: PEFT ignores them"
            if magnitudes
            else "use_dora is true, and the file has no magnitude: PEFT takes new ones from the base, untrained"
        )
        return report_error(
            says, "set use_dora as it was in training, or save the adapter again", magnitudes, 0, facts.modules
        )
    keys = facts.peft.magnitudes.values() if facts.peft is not None else ()
    zero = [key for key in keys if facts.ranges[key].largest == 0]
    if zero:
        return report_error(
            f"the DoRA magnitude is all zero in {format_share(len(zero), magnitudes, 'layer')} (first {zero[0]}): "
            "it makes the weight zero",
            "save the adapter again from the training",
            layers=zero,
        )
    return report_ok(
        f"DoRA in {magnitudes} layers: W becomes m·(W + s·B·A)/‖W + s·B·A‖; a reader that drops m (as PEFT's own "
        "convert_to_lora does) applies another update",
        magnitudes,
    )
