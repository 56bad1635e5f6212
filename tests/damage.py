"""Real files and everything that reads them or acts on them; and ways to damage the files, or to make them lie.

Shared by the hostile tests, which try a few cases, and by ``tools/fuzz.py``, which tries thousands.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint, write_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankscope.analysis.comparison import compare
from rankscope.analysis.inspection import inspect
from rankscope.analysis.layer_spectra import spectrum
from rankscope.errors import RankscopeError
from rankscope.formats.store import write_updates
from rankscope.surgery.algebra import average, merge_adapters, subtract
from rankscope.surgery.convert import convert
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge, unmerge
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Budget, Energy, Rank

# 4 300 digits are the most that Python reads.
ODD = (None, "x", -1, 0, 10**30, 10**400, 1.5, [[1]], {"(": 1}, float("nan"))
MORE_ODD = (*ODD, True, [], {}, "", "\ud800", "../x", ["q", 3], {"q": "x"}, {"^h": 10**400}, float("inf"), "pissa")
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)
NAMES = (
    "lora_A.bias", "lora_B.bias", "lora_B.default.weight", "lora_A", "lora_magnitude_vector", "lora_embedding_A",
    "modules_to_save.mine.weight", "weight", "bias", "base_layer.weight", "token_adapter.trainable_tokens_delta", "",
)  # fmt: skip


class Act(NamedTuple):
    """Something that reads files: called with the folder that holds ``sources``, and a place for its output."""

    sources: tuple[str, ...]
    run: Callable[[Path, Path], Any]
    writes: bool = True


def make_sources(home: Path) -> None:
    """Small real inputs: adapters, bases (one file, shards, pickled), full weights, updates."""
    shapes = {"model.embed_tokens": (11, 6), "model.h.0.q": (6, 6), "model.h.0.c_proj": (9, 6), "score": (3, 6)}
    base = {f"{name}.weight": normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    base |= {"model.h.0.q.bias": normal(6, seed=9), "model.norm.weight": normal(6, seed=8)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 11}
    write_checkpoint(home / "base" / "model.safetensors", base, {**config, "tie_word_embeddings": True})
    (home / "base" / "tokenizer.json").write_text("{}")
    names = sorted(base)
    parts = {f"model-{i}.safetensors": {name: base[name] for name in names[i::2]} for i in range(2)}
    write_shards(home / "shards", parts)
    (home / "pickled").mkdir()
    torch.save({name: value.half() for name, value in base.items()}, home / "pickled" / "pytorch_model.bin")
    tuned = {name: value + 0.1 * normal(*value.shape, seed=5) for name, value in base.items()}
    write_checkpoint(home / "tuned" / "model.safetensors", {**tuned, "new.weight": normal(2, 2)}, config)
    changes = {name.removesuffix(".weight"): tuned[name] - base[name] for name in names}
    (home / "updates").mkdir()
    write_updates(home / "updates" / "update.safetensors", changes)
    _make_adapters(home)


def _make_adapters(home: Path) -> None:
    factors = {**linear("model.h.0.q", 6, 6), **linear("model.h.0.c_proj", 9, 6, r=3, seed=1)}
    embedding = f"{PREFIX}model.embed_tokens.lora_embedding_"
    whole = {
        f"{embedding}A": normal(2, 11, seed=1),
        f"{embedding}B": normal(6, 2, seed=2),
        f"{PREFIX}model.h.0.q.lora_B.bias": normal(6),
        f"{PREFIX}score.weight": normal(3, 6, seed=3),
        f"{PREFIX}model.norm.weight": normal(6, seed=4),
    }
    patterns = {"rank_pattern": {"h.0.c_proj": 3}, "alpha_pattern": {"h.0.c_proj": 6, "(q|k)": 2}}
    settings = {"modules_to_save": ["score", "norm"], "lora_bias": True, "bias": "all"}
    write_adapter(home / "a", {**factors, **whole}, **settings, **patterns)
    write_adapter(
        home / "b", {key: value.bfloat16() for key, value in {**factors, **whole}.items()}, **settings, use_rslora=True
    )
    write_adapter(home / "plain", factors, **patterns)
    write_adapter(home / "other", linear("model.h.0.q", 6, 6, r=5, seed=7))
    write_adapter(
        home / "dora", {**factors, f"{PREFIX}model.h.0.q.lora_magnitude_vector": normal(6).abs()}, use_dora=True
    )
    write_adapter(home / "pissa", factors, init_lora_weights="pissa")
    write_adapter(
        home / "pissa" / "initial", linear("model.h.0.q", 6, 6, seed=3) | linear("model.h.0.c_proj", 9, 6, r=3)
    )
    old = write_adapter(home / "old", factors)
    (old / "adapter_model.safetensors").unlink()
    torch.save(factors, old / "adapter_model.bin")
    _make_files(home)


def _make_files(home: Path) -> None:
    """Adapters as other tools write them: one file each."""
    A, B, q = normal(2, 6), normal(6, 2, seed=1), "lora_unet_model_h_0_q"
    plain = {f"{q}.lora_down.weight": A, f"{q}.lora_up.weight": B, f"{q}.alpha": torch.tensor(3.0)}
    scale = {f"{q}.dora_scale": normal(6, 1, seed=2).abs()}
    conv = {"lora_unet_conv.lora_down.weight": normal(2, 3, 3, 3), "lora_unet_conv.lora_up.weight": normal(5, 2, 1, 1)}
    _make_file(home, "kohya", {**plain, **scale, **conv}, ss_network_dim="2", ss_network_alpha="3")
    k = "lora_unet_model_h_0_k"
    shapes = {"w1_a": (6, 2), "w1_b": (2, 6), "w2_a": (6, 2), "w2_b": (2, 6)}
    lycoris = {f"{q}.hada_{name}": normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    lycoris |= {f"{k}.lokr_w1": normal(2, 2), f"{k}.lokr_w2_a": normal(3, 2), f"{k}.lokr_w2_b": normal(2, 3)}
    lycoris |= {f"{name}.alpha": torch.tensor(3.0) for name in (q, k)}
    _make_file(home, "lycoris", {**lycoris, "lora_unet_norm.w_norm": normal(6)})
    settings = {"transformer.lora_alpha": 4, "transformer.r": 2, "transformer.alpha_pattern": {"model.h.0.q": 2}}
    named = {"transformer.model.h.0.q.lora_A.weight": A, "transformer.model.h.0.q.lora_B.weight": B}
    _make_file(home, "diffusers", named, lora_adapter_metadata=json.dumps(settings))
    merged = {"c_attn.lora_A": normal(6, 4), "c_attn.lora_B": normal(6, 2)}
    _make_file(home, "loralib", {**merged, "model.h.0.q.lora_A": A, "model.h.0.q.lora_B": B})


def _make_file(home: Path, name: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    (home / name).mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, home / name / "lora.safetensors", metadata)


def read(*sources: str) -> Act:
    """Spectra of a source, with a base where one is named."""
    return Act(sources, lambda home, out: spectrum(*(home / name for name in sources)).to_json(), writes=False)


def read_file(name: str) -> Act:
    """Spectra of a file of another tool, with its base."""
    return Act(
        (name, "base"),
        lambda home, out: spectrum(home / name / "lora.safetensors", home / "base", alpha=2).to_json(),
        writes=False,
    )


def look(name: str) -> Act:
    """What a path holds."""
    return Act((name,), lambda home, out: inspect(home / name, alpha=2).to_json(), writes=False)


def turn(name: str, to: str) -> Act:
    """A file of another tool, or a PEFT folder, in another format."""
    return Act((name, "base"), lambda home, out: convert(home / name, to, out, alpha=2, base=home / "base"))


OTHERS = ("kohya", "lycoris", "diffusers", "loralib")
WRITTEN = ("a", "dora", "old", "tuned", "shards", "pickled", "updates")

ACTS: dict[str, Act] = {
    **{f"read {name}": read_file(name) for name in OTHERS},
    **{
        f"inspect {name}": look(name) for name in (*OTHERS, "a", "dora", "old", "tuned", "shards", "pickled", "updates")
    },
    **{f"convert {name} to peft": turn(name, "peft") for name in OTHERS},
    **{f"convert {name} to kohya": turn(name, "kohya") for name in ("plain", "dora", "diffusers")},
    **{f"convert {name} to diffusers": turn(name, "diffusers") for name in ("plain", "kohya")},
    "compare tools": Act(
        ("plain", "kohya"),
        lambda home, out: compare(home / "plain", home / "kohya" / "lora.safetensors").to_json(),
        writes=False,
    ),
    **{f"read {name}": read(name, "base") for name in ("a", "b", "dora", "pissa", "old", "tuned", "updates")},
    "read without base": read("a"),
    "read shards": read("tuned", "shards"),
    "compare": Act(("a", "b"), lambda home, out: compare(home / "a", home / "b").to_json(), writes=False),
    "resize": Act(("a",), lambda home, out: resize(home / "a", Rank(1), out)),
    "resize dora": Act(("dora",), lambda home, out: resize(home / "dora", Energy(0.9), out)),
    "resize pissa": Act(("pissa",), lambda home, out: resize(home / "pissa", Budget(60), out)),
    "resize old": Act(("old",), lambda home, out: resize(home / "old", Rank(2), out / "deep")),
    "extract": Act(("tuned", "base"), lambda home, out: extract(home / "tuned", Rank(2), out, home / "base")),
    "extract low-rank": Act(
        ("tuned", "shards"),
        lambda home, out: extract(home / "tuned", Energy(0.5), out, home / "shards", embeddings="low-rank"),
    ),
    "extract updates": Act(
        ("updates", "base"), lambda home, out: extract(home / "updates", Rank(2), out, home / "base")
    ),
    "extract without base": Act(("updates",), lambda home, out: extract(home / "updates", Rank(2), out)),
    "merge": Act(("base", "a"), lambda home, out: merge(home / "base", [home / "a"], out)),
    "merge shards": Act(("shards", "old"), lambda home, out: merge(home / "shards", [home / "old"], out / "deep")),
    "merge pickled": Act(("pickled", "b"), lambda home, out: merge(home / "pickled", [home / "b"], out)),
    "merge dora": Act(("base", "dora"), lambda home, out: merge(home / "base", [home / "dora"], out)),
    "merge several": Act(
        ("base", "a", "b"), lambda home, out: merge(home / "base", [home / "a", home / "b"], out, [0.5, -2])
    ),
    "unmerge": Act(("base", "plain"), lambda home, out: unmerge(home / "base", [home / "plain"], out)),
    "merge adapters": Act(
        ("plain", "other"), lambda home, out: merge_adapters([home / "plain", home / "other"], out, [1, 0.5])
    ),
    "subtract": Act(("plain", "other"), lambda home, out: subtract(home / "plain", home / "other", out, Rank(3))),
    "subtract alike": Act(("a",), lambda home, out: subtract(home / "a", home / "a", out)),
    "average": Act(("a", "b"), lambda home, out: average([home / "a", home / "b"], out, [3, 1])),
}


def tried(act: Act, sources: Path, home: Path, rng: random.Random) -> tuple[str, str]:
    """Try an act on sources of which a file or two were damaged: what was done to which, and what came of it.

    "done", "refused: " and the one sentence that says why, or "FAILED: " and what is wrong. Only ``RankscopeError`` is
    caught; ``home`` is to be an empty folder.
    """
    given, out = home / "given", home / "out"
    for name in act.sources:
        shutil.copytree(sources / name, given / name)
    files = sorted(path for path in given.rglob("*") if path.is_file())
    chosen = rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2))))
    damage = "; ".join(damaged(path, rng) for path in chosen)
    before = sorted(given.rglob("*"))
    try:
        act.run(given, out)
    except RankscopeError as error:
        wrong = _refused_badly(str(error), home, given, before)
        return damage, f"FAILED: {wrong}: {error}" if wrong else f"refused: {error}"
    wrong = _done_badly(act, home, given, before)
    return damage, f"FAILED: {wrong}" if wrong else "done"


def _refused_badly(message: str, home: Path, given: Path, before: list[Path]) -> str | None:
    if "\n" in message or not message:
        return "more or less than one sentence"
    if ".tmp" in message:
        return "names a temporary file"
    if [path for path in home.iterdir() if path != given]:
        return f"leaves {sorted(home.iterdir())}"
    return None if sorted(given.rglob("*")) == before else "changes the folders of its inputs"


def _done_badly(act: Act, home: Path, given: Path, before: list[Path]) -> str | None:
    if sorted(given.rglob("*")) != before or list(home.rglob(".*")):
        return "leaves something behind"
    records = list((home / "out").rglob("rankscope.json"))
    if len(records) != int(act.writes):
        return f"{len(records)} records are written"
    for path in records:
        json.loads(path.read_text())
    return None


def damaged(path: Path, rng: random.Random) -> str:
    """Damage a file in one way that fits its kind; what was done."""
    ways: list[Callable[[Path, random.Random], str]] = [_flip]
    if path.suffix == ".json":
        ways = [_flip, _odd_value, _odd_value, _odd_value, _odd_value]
    elif path.suffix in (".safetensors", ".bin"):
        ways = [_flip, _spoil, _spoil, _cast, _rename, _add]
    if rng.random() < 0.03:
        ways = [_replace]
    return f"{path.parent.name}/{path.name}: {rng.choice(ways)(path, rng)}"


def _flip(path: Path, rng: random.Random) -> str:
    content = mutated(path.read_bytes(), rng)
    path.unlink()  # files that are mapped already stay as they are
    path.write_bytes(content)
    return "flipped"


def _replace(path: Path, rng: random.Random) -> str:
    path.unlink()
    match rng.randrange(3):
        case 0:
            return "removed"
        case 1:
            path.mkdir()
            return "a folder"
        case _:
            path.symlink_to(path)
            return "a link to itself"


def _odd_value(path: Path, rng: random.Random) -> str:
    """Replace, remove or add a value anywhere in a JSON file."""
    whole = json.loads(path.read_text())
    places = list(_places(whole))
    where, key = rng.choice(places) if places else (whole, "x")
    value = rng.choice(MORE_ODD)
    if isinstance(where, dict) and rng.random() < 0.1:
        where.pop(key, None)
        value = "removed"
    else:
        where[key] = value
    path.write_text(json.dumps(whole))
    return f"{key} = {value!r:.60}"


def _places(value: Any) -> Any:
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, off its mapping."""
    stored = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    return {name: value.clone() for name, value in stored.items()}


def write_tensors_of(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same file with other tensors."""
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    metadata = None
    if path.suffix != ".bin":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    path.unlink()
    if path.suffix == ".bin":
        torch.save(plain, path)
    else:
        save_file(plain, path, metadata)


def _spoil(path: Path, rng: random.Random) -> str:
    tensors = tensors_of(path)
    name = rng.choice(sorted(tensors))
    way, changed = rng.choice(list(spoiled(tensors[name]).items()))
    write_tensors_of(path, {key: value for key, value in {**tensors, name: changed}.items() if value is not None})
    return f"{name} {way}"


def _cast(path: Path, rng: random.Random) -> str:
    """Another dtype, with numbers of any size."""
    tensors = tensors_of(path)
    name, dtype, size = rng.choice(sorted(tensors)), rng.choice(DTYPES), rng.choice((1.0, 1.0, 1e5, 1e38, 0.0, 1e-40))
    write_tensors_of(path, {**tensors, name: (tensors[name].float() * size).to(dtype)})
    return f"{name} × {size} as {dtype}"


def _rename(path: Path, rng: random.Random) -> str:
    tensors = tensors_of(path)
    name = rng.choice(sorted(tensors))
    other = _odd_name(name, rng)
    write_tensors_of(path, {other if key == name else key: value for key, value in tensors.items()})
    return f"{name} → {other!r}"


def _add(path: Path, rng: random.Random) -> str:
    tensors = tensors_of(path)
    name = _odd_name(rng.choice(sorted(tensors)), rng)
    shape = [rng.choice((0, 1, 2, 3, 6, 9, 11)) for _ in range(rng.randrange(5))]
    write_tensors_of(path, {**tensors, name: torch.ones(shape)})
    return f"{name!r} added, {shape}"


def _odd_name(name: str, rng: random.Random) -> str:
    """Another ending, an ending cut off, or a module that is not there."""
    stem = name.rsplit(".", rng.choice((1, 2)))[0]
    return rng.choice((f"{stem}.{rng.choice(NAMES)}", stem, f"{PREFIX}lm_head.{rng.choice(NAMES)}", name + ".x", "é\n"))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One small damage: flipped, dropped, inserted, repeated or cut bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, length = rng.randrange(len(data) + 1), rng.randint(1, 8)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = rng.randbytes(length)
            case 3:
                data[at:at] = data[max(0, at - 4 * length) : at]
            case _ if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def spoiled(tensor: Tensor) -> dict[str, Tensor | None]:
    """Ways to spoil one tensor."""
    return {
        "missing": None,
        "longer": torch.cat((tensor, tensor[-1:])) if tensor.ndim else tensor[None],
        "another dimension": tensor[None],
        "a number": torch.tensor(1.0),
        "empty": tensor.reshape(-1)[:0],
        "complex": torch.ones(tensor.shape, dtype=torch.complex64),
        "integers": torch.ones(tensor.shape, dtype=torch.int64),
        "NaN": torch.full(tensor.shape, float("nan")),
    }
