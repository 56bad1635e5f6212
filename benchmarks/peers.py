"""rankscope beside the tools of the package index that look at fine-tuned weights, on the same files in one run.

python benchmarks/peers.py --python other-venv/bin/python       gradience, modeldelta and weightwatcher live there
python benchmarks/peers.py                                      rankscope alone
python benchmarks/peers.py --python … --answers                 only whether the numbers are right, on small files

``adapter``: rank 64 on all linear layers of Llama 3 8B's shapes, bfloat16. gradience: ``audit_lora_peft_dir`` without
the base's norms. weightwatcher: ``analyze(peft=True)``, which forms each product, on one layer of a smaller model.
``pair``: a checkpoint and its base, bfloat16, of shapes with ``--hidden`` for Llama's 4096. modeldelta:
``compare_models``. weightwatcher: ``analyze`` with a base model.

Each side runs in a process of its own with one thread, by turns. Seconds are of the processor, the least of
``--rounds`` times ``--repeats``, of the analysis call alone: from the files to the numbers, without imports.
``decomposing``: the part of weightwatcher's that finds singular values; the rest fits power laws, which rankscope does
not. Memory: the resident set before the first call, and what its peak is beyond that (mapped files are in it).

Errors are the largest over layers, from numpy's float64 answer for the matrix that the method's formula gives: of every
singular value that the tool tells, relative to the layer's largest; of its stable rank Σσ²/σ₁² and its effective rank
exp(−Σ p ln p), p = σ/Σσ, relative to themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Nothing of rankscope here: where the peers are installed it need not be.

Layers = dict[str, dict[str, Any]]
"""By the name of the module: singular values from the largest on, or the two at the ends, and the ranks they make."""

PREFIX = "base_model.model."
MEASURES = {"values": "σ", "ends": "largest and smallest σ", "stable": "stable rank", "entropy": "effective rank"}
LARGE = "pair, 8200 x 8200"
WRONG = 1e-3  # an error above this is shown with both numbers


def module(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".lora_BA")


# One side each: the call that is timed, from the folder's files to its numbers.


def of_rankscope(folder: Path) -> Callable[[], Layers]:
    from rankscope.analysis.layer_spectra import spectrum

    base = folder / "base"

    def act() -> Layers:
        sketch = 20 if folder.name == LARGE else None  # all σ of that one take minutes
        found = spectrum(source(folder), base if base.exists() else None, sketch=sketch).layers
        result: Layers = {}
        for layer in found:
            row: dict[str, Any] = {"values": list(layer.singular_values), "stable": layer.measures["stable_rank"]}
            if "entropy_rank" in layer.measures:
                row["entropy"] = layer.measures["entropy_rank"]
            if layer.rounding_floor and not sketch:
                row["floor"] = layer.rounding_floor.measures["entropy_rank"]
            result[layer.name.removesuffix(":whole")] = row  # DoRA's whole update comes after its product
        return result

    return act


def of_gradience(folder: Path) -> Callable[[], Layers]:
    from gradience.vnext.audit.lora_audit import audit_lora_peft_dir

    def act() -> Layers:
        found = audit_lora_peft_dir(source(folder), compute_udr=False, include_top_singular_values=10**6)
        return {
            module(layer.name): {
                "values": [layer.scale * value for value in layer.top_singular_values],
                "stable": layer.stable_rank,
                "entropy": layer.effective_rank,
            }
            for layer in found.layers
        }

    return act


def of_modeldelta(folder: Path) -> Callable[[], Layers]:
    from modeldelta.core.weight_diff import compare_models
    from modeldelta.utils.model_loader import get_tensor_map

    def act() -> Layers:
        found, _ = compare_models(get_tensor_map(str(folder / "base")), get_tensor_map(str(source(folder))))
        return {
            module(layer["name"]): {
                "values": layer["top_singular_values"],
                "entropy": layer["effective_rank"],
            }
            for layer in found
        }

    return act


def of_weightwatcher(folder: Path) -> Callable[[], Layers]:
    from weightwatcher import WeightWatcher

    logging.disable(logging.CRITICAL)
    base = folder / "base"
    peft = (folder / "adapter").exists()

    def act() -> Layers:
        watcher = WeightWatcher(model=str(source(folder)), base_model=str(base) if not peft else None)
        decompose = watcher.combined_eigenvalues

        def measure_call(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            found = decompose(*arguments, **options)
            decomposing.append(time.process_time() - began)
            return found

        watcher.combined_eigenvalues = measure_call
        table = watcher.analyze(peft=peft)
        return {
            module(row["longname"]): {"ends": [row["sv_max"], row["sv_min"]], "stable": row["stable_rank"]}
            for row in table.to_dict("records")
        }

    return act


decomposing: list[float] = []
"""Seconds of weightwatcher's in this call, a matrix each."""

SIDES = {
    "rankscope": of_rankscope,
    "gradience": of_gradience,
    "modeldelta": of_modeldelta,
    "weightwatcher": of_weightwatcher,
}
READS = {"adapter": ("rankscope", "gradience", "weightwatcher"), "tuned": ("rankscope", "modeldelta", "weightwatcher")}


def source(folder: Path) -> Path:
    """What a folder of this benchmark is about: ``adapter``, or ``tuned`` with ``base`` beside it."""
    return folder / ("adapter" if (folder / "adapter").exists() else "tuned")


def memory(peak: bool) -> int:
    """Resident bytes now, or at the peak since they were last asked for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = int(next(line for line in lines if line.startswith("VmHWM" if peak else "VmRSS")).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return found


def alone(side: str, folder: Path, repeats: int) -> dict[str, Any]:
    """What one tool finds in one folder, in how long, with how much memory; or the error that it stops with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            act = SIDES[side](folder)
            calls, start, peak = [], memory(peak=False), 0
            for _ in range(repeats):
                decomposing.clear()
                began = time.process_time()
                layers = act()
                calls.append((time.process_time() - began, sum(decomposing)))
                peak = peak or memory(peak=True)
        seconds, part = min(calls)
        found: dict[str, Any] = {"layers": layers, "seconds": seconds, "start": start, "peak": peak}
        found |= {"decomposing": part} if decomposing else {}
    except Exception as error:  # whatever a tool does with a file that it cannot read is its answer
        found = {"error": f"{type(error).__name__}: {error}"}
    return found | {"version": version(side)}


def run(side: str, folders: list[Path], python: str | None, repeats: int = 1) -> list[dict[str, Any]]:
    """In a process of its own with one thread, all folders one after another."""
    command = [sys.executable if side == "rankscope" else str(python), __file__, "--side", side]
    command += ["--repeats", str(repeats), *map(str, folders)]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, env=os.environ | one, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


# The right answers.


def exact(folder: Path) -> Layers:
    """numpy's singular values in float64 of what each layer's update is, and the ranks that they make."""
    matrices = product_values if (folder / "adapter").exists() else difference_values
    found = {}
    for name, s in matrices(folder).items():
        p = s[s > 0] / s.sum()
        ranks = {"stable": float(((s / s[0]) ** 2).sum()), "entropy": float(np.exp(-(p @ np.log(p))))}
        found[name] = {"values": s, "ends": s[[0, -1]], **ranks}
    return found


def difference_values(folder: Path) -> dict[str, np.ndarray]:
    base, tuned = weights(folder / "base"), weights(folder / "tuned")
    changes = {module(name): tuned[name].double() - base[name].double() for name in tuned if name in base}
    if folder.name == LARGE:  # diagonal, so that its singular values can be read off
        return {name: change.diagonal().numpy() for name, change in changes.items()}
    return {name: np.linalg.svd(change.numpy(), compute_uv=False) for name, change in changes.items()}


def product_values(folder: Path) -> dict[str, np.ndarray]:
    """Of scale·BA by two QR decompositions; with DoRA, of the dense m·(W + scale·BA)/‖W + scale·BA‖ − W."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = weights(folder / "base") if (folder / "base").exists() else {}
    found = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        name = module(key.removesuffix(".lora_A.weight"))
        A, B = (tensors[key.replace("lora_A", f"lora_{half}")].double().numpy() for half in "AB")
        r = len(A)
        scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
        if config.get("use_dora"):
            m = tensors[key.replace("lora_A.weight", "lora_magnitude_vector")].double().numpy()
            before = base[f"{name}.weight"].double().numpy()
            moved = before + scale * B @ A
            change = m[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - before
            found[name] = np.linalg.svd(change, compute_uv=False)
            continue
        core = np.linalg.qr(B, mode="r") @ np.linalg.qr(A.T, mode="r").T
        found[name] = np.linalg.svd(scale * core, compute_uv=False)
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def measure_errors(result: Layers, right: Layers) -> dict[str, tuple[float, float, float]]:
    """The largest relative error of each measure that a tool gives, with its value and the right one there."""
    found: dict[str, tuple[float, float, float]] = {}
    for name in result.keys() & right.keys():
        for measure in result[name].keys() & MEASURES.keys():
            size = np.max(right[name][measure])
            for mine, true in pair_values(result[name][measure], right[name][measure]):
                off = abs(mine - true) / size
                if measure not in found or off > found[measure][0]:
                    found[measure] = (off, mine, true)
    return found


def pair_values(result: Any, right: Any) -> list[tuple[float, float]]:
    """Lists from their beginning, as far as both go."""
    if not isinstance(result, list):
        return [(result, right)]
    return list(zip(result, right, strict=False))


def verdict(outcome: dict[str, Any], right: Layers) -> str:
    """One line: how many layers of how many, how wrong each number is."""
    if "error" in outcome:
        return outcome["error"][:90]
    result = outcome["layers"]
    missing, extra = len(right.keys() - result.keys()), len(result.keys() - right.keys())
    parts = [f"{missing} of {len(right)} layers missing"] if missing else []
    parts += [f"{extra} not of the update"] if extra else []
    errors = measure_errors(result, right)
    for measure in [measure for measure in MEASURES if measure in errors]:
        off, mine, true = errors[measure]
        both = f" ({mine:.4g}, right {true:.4g})" if off > WRONG else ""
        parts.append(f"{MEASURES[measure]} {off:.0e}{both}")
    return ", ".join(parts)


# What is measured.


def speed(arguments: argparse.Namespace, home: Path) -> None:
    from shapes import MODELS, Model, write_adapter, write_checkpoints

    hidden = arguments.hidden
    small = Model(1, hidden, hidden // 4, hidden * 7 // 2)
    for name, model, layers in (("adapter", MODELS["8b"], arguments.layers), ("small adapter", small, 1)):
        write_adapter(home / name / "adapter", model, arguments.rank, layers)
    write_checkpoints(home / "pair", small)
    tasks = {
        "adapter": (f"8B's shapes, {arguments.layers} layers", ["gradience"]),
        "small adapter": (f"hidden {hidden}, 1 layer", ["gradience", "weightwatcher"]),
        "pair": (f"hidden {hidden}, 1 layer", ["modeldelta", "weightwatcher"]),
    }
    for task, (title, peers) in tasks.items():
        folder, right = home / task, exact(home / task)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        print(f"\n{task}: {title}, {len(right)} matrices, {size / 1e6:.0f} MB")
        sides, best = ["rankscope", *(peers if arguments.python else [])], dict[str, dict[str, Any]]()
        for side in sides * arguments.rounds:  # by turns, so that a busy moment does not meet one side alone
            found = run(side, [folder], arguments.python, arguments.repeats)[0]
            best[side] = min(best.get(side, found), found, key=lambda one: one["seconds"])
        ours = best["rankscope"]["seconds"]
        for side, found in best.items():
            row = f"  {side:13} {found['version']:7} {found['seconds']:8.3f} s {found['seconds'] / ours:7.1f} x"
            row += f"   start {found['start'] / 1e6:4.0f} MB, beyond {(found['peak'] - found['start']) / 1e6:5.0f} MB"
            row += f"   {verdict(found, right)}"
            print(row + (f"; decomposing {found['decomposing']:.3f} s" if "decomposing" in found else ""), flush=True)


def answers(arguments: argparse.Namespace, home: Path) -> None:
    """Small files of what people have, one difficulty each."""
    cases = write_planted_cases(home)
    print("\nanswers: largest relative errors")
    found: dict[str, dict[str, dict[str, Any]]] = {case: {} for case in cases}
    for side in SIDES if arguments.python else ("rankscope",):
        mine = [case for case in cases if side in READS[source(home / case).name]]
        mine = [case for case in mine if (side, case) != ("weightwatcher", LARGE)]  # an SVD of many minutes
        for case, one in zip(mine, run(side, [home / case for case in mine], arguments.python), strict=True):
            found[case][side] = one
    for case in cases:
        print(f"  {case}")
        right = exact(home / case)
        for side, one in found[case].items():
            print(f"    {side:13} {verdict(one, right)}")
            for name, layer in one.get("layers", {}).items():
                if layer.get("floor"):
                    both = f"{layer['entropy']:.4g}, {layer['floor']:.4g} without the rounding of storage"
                    print(f"      {name}: effective rank {both}")


def write_planted_cases(home: Path, large: bool = True) -> list[str]:
    """Writes small files of which the answers are known; names of the folders."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def adapter(case: str, r: int = 16, strength: float = 1.0, **config: Any) -> None:
        folder = home / case / "adapter"
        folder.mkdir(parents=True)
        tensors, base = {}, {}
        for name in ("q_proj", "v_proj"):
            path = f"model.layers.0.self_attn.{name}"
            tensors[f"{PREFIX}{path}.lora_A.weight"] = normal(r, 48)
            tensors[f"{PREFIX}{path}.lora_B.weight"] = normal(64, r) * torch.arange(1, r + 1) ** -0.7 * strength
            if config.get("use_dora"):
                base[f"{path}.weight"] = normal(64, 48)
                tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = 1 + base[f"{path}.weight"].norm(dim=1)
        save_file(tensors, folder / "adapter_model.safetensors")
        full = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(full))
        if base:
            checkpoint(home / case / "base", base)

    def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    adapter("adapter, alpha = 2r")
    adapter("adapter, rsLoRA", use_rslora=True)
    adapter("adapter, DoRA", use_dora=True)
    adapter("adapter, rank 4", r=4)
    adapter("adapter, norm 1e-7", strength=1e-9)

    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    base = {name: normal(96, 96) for name in names}
    tuned = {name: w + 1e-2 * normal(96, 16) @ normal(16, 96) + 1e-3 * normal(96, 96) for name, w in base.items()}
    checkpoint(home / "pair" / "base", base)
    checkpoint(home / "pair" / "tuned", tuned)
    checkpoint(home / "pair, a head added" / "base", base)
    checkpoint(home / "pair, a head added" / "tuned", {"classifier.weight": normal(96, 96), **tuned})
    rounded = {name: (normal(512, 512) / math.sqrt(512)).bfloat16() for name in names[:1]}
    moved = {name: w.float() + 1e-2 * normal(512, 16) @ normal(16, 512) / 512 for name, w in rounded.items()}
    case = "pair, bfloat16, update of rank 16 and relative size 2e-3"
    checkpoint(home / case / "base", rounded)
    checkpoint(home / case / "tuned", {name: weight.bfloat16() for name, weight in moved.items()})
    if large:
        falling = torch.diag(torch.arange(1, 8201) ** -0.5).bfloat16()
        checkpoint(home / LARGE / "base", {names[0]: torch.zeros_like(falling)})
        checkpoint(home / LARGE / "tuned", {names[0]: falling})
    return sorted(folder.name for folder in home.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of an environment with the peers")
    parser.add_argument("--layers", type=int, default=4, help="of the adapter of 8B's shapes")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024, help="of the small adapter and the pair")
    parser.add_argument("--repeats", type=int, default=2, help="of the call in a process")
    parser.add_argument("--rounds", type=int, default=2, help="of processes")
    parser.add_argument("--answers", action="store_true", help="no times")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.side:
        print(json.dumps([alone(arguments.side, folder, arguments.repeats) for folder in arguments.folders]))
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        if not arguments.answers:
            speed(arguments, Path(one))
        answers(arguments, Path(two))


if __name__ == "__main__":
    main()
