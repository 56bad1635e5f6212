"""Resizing, combining and extracting adapters: rankscope, PEFT and mergekit on the same files, in one process run.

python benchmarks/surgery.py                                       # a small decoder: does everything work?
python benchmarks/surgery.py --hidden 4096 --layers 4 --rank 64 --to 16 --threads 2
python benchmarks/surgery.py --mergekit other-venv/bin/mergekit-extract-lora

The files: a Llama of random weights, two adapters on all its matrices with decaying spectra, and the weights with the
first adapter and noise added. Every row ends with an adapter of rank ``--to``. ``error`` is the relative Frobenius
error over all layers, found in float64 from the written factors; ``above best`` is what it has beyond the least that
the rank allows (Eckart & Young).

rankscope is timed from file to file. PEFT's calls are timed alone, on a model that is loaded already, without writing.
With ``--processor`` seconds are those of the processor, which other work on the machine does not add to. mergekit is
timed as the command, less its own start (``--help``). Without ``--mergekit`` the row is a reimplementation of its
method in this process: torch.linalg.svd of each dense difference.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankscope.surgery.algebra import merge_adapters
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Rank

PREFIX = "base_model.model."
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECAY = 8.0  # singular values fall by e over so many


class Files:
    """The base, two adapters and tuned weights on disk, and the exact updates of all three tasks."""

    def __init__(self, arguments: argparse.Namespace, home: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.home, self.rank = home, arguments.rank
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 7 // 2,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 32,
            num_key_value_heads=arguments.hidden // 32,
            tie_word_embeddings=False,
        )
        source = torch.Generator().manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(home / "base")
        self.weights = load_file(home / "base" / "model.safetensors")
        self.layers = [name.removesuffix(".weight") for name in self.weights if name.split(".")[-2] in MATRICES]
        for name in ("one", "two"):
            self._adapter(home / name, source)
        merge(home / "base", [home / "one"], home / "tuned")
        tuned = load_file(home / "tuned" / "model.safetensors")
        for name in self.layers:
            weight = tuned[f"{name}.weight"]
            weight += 1e-4 * torch.randn(weight.shape, generator=source)
        save_file(tuned, home / "tuned" / "model.safetensors", metadata={"format": "pt"})
        self.tuned = tuned

    def _adapter(self, folder: Path, source: torch.Generator) -> None:
        tensors = {}
        fall = torch.exp(-torch.arange(self.rank) / DECAY)
        for name in self.layers:
            out, into = self.weights[f"{name}.weight"].shape
            mix = torch.randn(self.rank, self.rank, generator=source)  # so that no column is a singular vector
            B = torch.randn(out, self.rank, generator=source) * fall @ mix
            A = torch.linalg.solve(mix, torch.randn(self.rank, into, generator=source)).contiguous()
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B * (0.05 / math.sqrt(out * into))
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.rank}
        text = json.dumps({**config, "target_modules": list(MATRICES)})
        (folder / "adapter_config.json").write_text(text)

    def exact(self, task: str, name: str) -> Tensor:
        """The update of one layer that a task is to approximate, float64."""
        if task == "extract":
            return self.tuned[f"{name}.weight"].double() - self.weights[f"{name}.weight"].double()
        one, two = (load_file(self.home / folder / "adapter_model.safetensors") for folder in ("one", "two"))
        return product(one, name) + (product(two, name) if task == "combine" else 0)


def product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """B · A of a layer, α = r, in float64."""
    A, B = (tensors[f"{PREFIX}{name}.lora_{half}.weight"].double() for half in "AB")
    return B @ A


def peft_model(files: Files, adapters: list[str]) -> Any:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(files.home / "base")
    model = PeftModel.from_pretrained(base, files.home / adapters[0], adapter_name=adapters[0])
    for name in adapters[1:]:
        model.load_adapter(files.home / name, adapter_name=name)
    return model


def processor_seconds() -> float:
    """Of this process, all its threads, and of the commands that it has run."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


clock: Callable[[], float] = time.perf_counter


def measure_time(act: Callable[[int], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds, and what the last call gave."""
    seconds, found = [], None
    for i in range(repeats):
        began = clock()
        found = act(i)
        seconds.append(clock() - began)
    return statistics.median(seconds), found


Row = tuple[str, str, float, Mapping[str, Tensor]]


def of_rankscope(files: Files, to: int, repeats: int) -> list[Row]:
    acts: dict[str, Callable[[Path], Any]] = {
        "resize": lambda out: resize(files.home / "one", Rank(to), out),
        "combine": lambda out: merge_adapters([files.home / "one", files.home / "two"], out, None, Rank(to)),
        "extract": lambda out: extract(files.home / "tuned", Rank(to), out, files.home / "base"),
    }
    rows = []
    for task, act in acts.items():
        seconds, _ = measure_time(lambda i, act=act, task=task: act(files.home / f"{task}{i}"), repeats)  # type: ignore[misc]
        written = load_file(files.home / f"{task}{repeats - 1}" / "adapter_model.safetensors")
        rows.append((task, "rankscope", seconds, written))
    return rows


def of_peft(files: Files, to: int, repeats: int) -> list[Row]:
    from peft.tuners.lora.conversion import convert_to_lora

    model = peft_model(files, ["one"])
    seconds, (_, tensors) = measure_time(lambda i: convert_to_lora(model, rank=to, adapter_name="one"), repeats)
    rows: list[Row] = [("resize", "PEFT convert_to_lora", seconds, tensors)]
    both = peft_model(files, ["one", "two"])
    for title, full in (("PEFT svd", True), ("PEFT svd, thin", False)):

        def combine(i: int, title: str = title, full: bool = full) -> str:
            name = f"{title}{i}".replace(" ", "-")
            options = {"combination_type": "svd", "svd_rank": to, "svd_full_matrices": full}
            both.add_weighted_adapter(["one", "two"], [1.0, 1.0], name, **options)
            return name

        seconds, name = measure_time(combine, repeats)
        rows.append(("combine", title, seconds, state_of(both, name)))
    return rows


def state_of(model: Any, name: str) -> dict[str, Tensor]:
    """The factors of one of a model's adapters, scale 1, under the names that PEFT saves them by."""
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            found[f"{path}.lora_A.weight"] = module.lora_A[name].weight.detach()
            found[f"{path}.lora_B.weight"] = module.lora_B[name].weight.detach() * module.scaling[name]
    return found


def of_mergekit(files: Files, to: int, command: str | None) -> Row:
    if command is None:
        seconds, tensors = measure_time(lambda i: dense_extraction(files, to), 1)
        return ("extract", "mergekit's method, redone", seconds, tensors)
    out = files.home / "mergekit"
    full = [command, "--model", files.home / "tuned", "--base-model", files.home / "base", "--out-path", out]
    start, _ = measure_time(lambda i: subprocess.run([command, "--help"], capture_output=True, check=True), 1)
    options = ["--max-rank", str(to), "--exclude-regex", "embed|lm_head|norm", "--distribute-scale"]
    seconds, _ = measure_time(lambda i: subprocess.run([*full, *options], capture_output=True, check=True), 1)
    tensors = load_file(out / "adapter_model.safetensors")
    return ("extract", "mergekit-extract-lora", seconds - start, tensors)


def dense_extraction(files: Files, to: int) -> dict[str, Tensor]:
    """What mergekit 0.1.5 does to each matrix: a thin SVD of the float32 difference, √σ on each side."""
    base, tuned = (load_file(files.home / name / "model.safetensors") for name in ("base", "tuned"))
    tensors = {}
    for name in files.layers:
        u, s, vh = torch.linalg.svd(tuned[f"{name}.weight"] - base[f"{name}.weight"], full_matrices=False)
        root = s[:to].sqrt()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (root[:, None] * vh[:to]).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (u[:, :to] * root).contiguous()
    save_file(tensors, files.home / "redone.safetensors")
    return tensors


def errors(files: Files, rows: list[Row], to: int) -> list[tuple[float, float]]:
    """Relative error of each row, and its share above the least that this rank allows."""
    found = []
    best: dict[str, float] = {}
    for task, _, _, tensors in rows:
        off = total = left = 0.0
        for name in files.layers:
            exact = files.exact(task, name)
            off += float((exact - product(tensors, name)).square().sum())
            total += float(exact.square().sum())
            left += 0.0 if task in best else float(torch.linalg.svdvals(exact)[to:].square().sum())
        best.setdefault(task, left)
        found.append((math.sqrt(off / total), math.sqrt(off / best[task]) - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--to", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mergekit", metavar="COMMAND", help="mergekit-extract-lora of another environment")
    parser.add_argument("--processor", action="store_true", help="count the processor's seconds, not the clock's")
    arguments = parser.parse_args()
    if arguments.processor:
        globals()["clock"] = processor_seconds
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = Files(arguments, Path(folder))
        rows = of_rankscope(files, arguments.to, arguments.repeats)
        rows += of_peft(files, arguments.to, arguments.repeats)
        rows.append(of_mergekit(files, arguments.to, arguments.mergekit))
        measured = sorted(zip(rows, errors(files, rows, arguments.to), strict=True), key=lambda row: row[0][0])
    ours = {task: seconds for task, tool, seconds, _ in rows if tool == "rankscope"}
    print(f"{len(files.layers)} matrices, hidden {arguments.hidden}, rank {arguments.rank} to {arguments.to}")
    print(f"{'task':8}  {'tool':26}  {'seconds':>9}  {'ratio':>7}  {'error':>8}  {'above best':>10}")
    for (task, tool, seconds, _), (error, above) in measured:
        ratio = seconds / ours[task]
        print(f"{task:8}  {tool:26}  {seconds:9.3f}  {ratio:7.1f}  {error:8.5f}  {above:10.1e}")


if __name__ == "__main__":
    main()
