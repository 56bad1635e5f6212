"""Every number that the command line gives, recorded, so that two versions of the code can be compared.

    python tools/record.py inputs FOLDER      adapters, checkpoints, studies: made once, by one version, and kept
    python tools/record.py run FOLDER OUT     every command over them: exit code, stdout, stderr, what was written
    python tools/record.py diff OUT1 OUT2     exit code 1 where a number is not the same to the last digit
    python tools/record.py cases FOLDER       the names of the cases, for ``run --only PATTERN``

Another version is run with its own package in front: ``PYTHONPATH=/some/checkout python tools/record.py run …``; only
``rankscope.cli.main`` is asked of it. JSON, CSV, tensors, exit codes and the numbers in pages are to be the same.
Wording (tables on the terminal, stderr, the text of pages, sentences within JSON) and pictures are told separately. A
picture is recorded as the data that was drawn, not as pixels: nothing is rendered, which would take most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import hashlib
import html
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
MASKED = "<masked>"
FIELDS = {
    "seconds": "clock: of a run, and in each line of metrics.jsonl",
    "seconds_per_step": "clock; its ratio to full fine-tuning too",
    "latency": "clock: forward times",
    "peak_memory": "memory of the process, whatever else it did before; its ratio too",
    "machine": "the machine: processor, cores, threads",
    "versions": "versions of the package, torch, numpy and Python",
}
"""Fields of JSON whose value is not compared, each with the reason."""
WORDS = {
    r"\b\d+\.\d+\.\d+(?:\+\w+)?\b": "<version>",
    r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?\b": "<date>",
}
"""The same in text: what is not compared has a fixed word in its place (paths get theirs in ``Place.plain``)."""
SENTENCES = frozenset({"sentence", "claim", "refuted_by", "reason", "notes", "note", "says", "missing", "title"})
"""Fields of JSON that are prose: there the numbers are compared, and the rest is wording."""
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
MOST_SHOWN = 4000
"""Numbers of one part of a picture that are written out; of more there is a hash."""
METHODS = "lora,rslora,lora+,frozen-a,pissa,bias,head,subspace,said"


# Running a command


def command(arguments: Iterable[str]) -> tuple[str, str, str]:
    """Exit code, stdout and stderr of ``rankscope`` with these arguments, in this process."""
    from rankscope.cli import main

    given = list(arguments)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with (
        patch.object(sys, "argv", ["rankscope", *given]),
        patch("matplotlib.figure.Figure.savefig", _saved),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            main(given)
            code = "0"
        except SystemExit as ended:
            code = str(ended.code)
        except Exception:
            code = f"not caught: {traceback.format_exc().splitlines()[-1]}"
    return code, *(_text(stream) for stream in (out, err))  # type: ignore[return-value]


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    content: bytes = stream.buffer.getvalue()  # type: ignore[attr-defined]
    return content.decode("utf-8")


def _saved(figure: Any, target: Any, **_: Any) -> None:
    """In place of ``Figure.savefig``: the data that would be drawn."""
    content = json.dumps([_axes(axes) for axes in figure.axes], indent=0, ensure_ascii=False)
    if hasattr(target, "write"):
        target.write(content.encode())
    else:
        Path(target).write_text(content, encoding="utf-8")


def _axes(axes: Any) -> dict[str, Any]:
    legend = axes.get_legend()
    return {
        "title": axes.get_title(),
        "labels": [axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()],
        "lines": [[line.get_label(), *(_numbers_of(line.get_data()[i]) for i in (0, 1))] for line in axes.lines],
        "patches": [_numbers_of(patch.get_path().vertices) for patch in axes.patches],
        "collections": [
            [_numbers_of(one.get_offsets()), *(_numbers_of(path.vertices) for path in one.get_paths()[:50])]
            for one in axes.collections
        ],
        "images": [_numbers_of(image.get_array()) for image in axes.images],
        "texts": [text.get_text() for text in axes.texts],
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
    }


def _numbers_of(values: Any) -> Any:
    array = np.ma.filled(np.ma.asarray(values).astype(float), np.nan)
    if array.size > MOST_SHOWN:
        return f"{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return repr(array.tolist())


# Recording what it gave


class Place(NamedTuple):
    """Where a command ran: whose paths stand in what it says."""

    inputs: Path
    work: Path

    def plain(self, text: str) -> str:
        """Text without what depends on the place, the day and the versions."""
        for path, word in ((self.work, "<work>"), (self.inputs, "<inputs>")):
            for form in dict.fromkeys((str(path.resolve()), str(path))):
                text = text.replace(form, word)
        for pattern, word in WORDS.items():
            text = re.sub(pattern, word, text)
        return text

    def masked(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.plain(key): MASKED if key in FIELDS else self.masked(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.masked(one) for one in value]
        return self.plain(value) if isinstance(value, str) else value

    def canonical(self, text: str) -> str:
        return json.dumps(self.masked(json.loads(text)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def recorded(path: Path, place: Place) -> tuple[str, str]:
    """A written file as text that can be compared: the ending that tells how, and the text."""
    kind = path.suffix.lower()
    if kind == ".json":
        return "", place.canonical(path.read_text("utf-8"))
    if kind == ".jsonl":
        lines = [place.canonical(line) for line in path.read_text("utf-8").splitlines()]
        return ".json", "[\n" + ",".join(lines) + "]\n"
    if kind in (".safetensors", ".bin", ".pt", ".pth"):
        return ".json", json.dumps(place.masked(_tensors(path)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if kind == ".csv":
        return "", place.plain(path.read_text("utf-8"))
    if kind == ".html":
        return "", place.plain(_page(path.read_text("utf-8")))
    if kind in (".svg", ".png", ".pdf"):
        return ".picture", place.plain(path.read_text("utf-8"))
    content = path.read_bytes()
    try:
        return ".txt", place.plain(content.decode("utf-8"))
    except UnicodeDecodeError:
        return ".json", json.dumps({"sha256": hashlib.sha256(content).hexdigest()}) + "\n"


def _tensors(path: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and bytes of the tensors of a file, and its metadata."""
    told: Mapping[str, str] | None = None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            told = file.metadata()
        stored = load_file(path)
    else:
        stored = torch.load(path, weights_only=True)
    tensors = {
        name: [
            str(value.dtype),
            list(value.shape),
            hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, value in stored.items()
    }
    return {"metadata": told, "tensors": tensors}


def _page(text: str) -> str:
    """A page without its style, script and pictures, a tag a line; only its version depends on the day."""
    text = re.sub(r"<(style|script)\b.*?</\1>", r"<\1/>", text, flags=re.DOTALL)
    text = re.sub(r'"data:[^"]*"', '"data:"', text)
    text = re.sub(r"sha256-[\w+/=]+|sha256-[^;]*", "sha256-", text)
    return re.sub(r"(?<=>)(?=<)", "\n", text)


# The cases


class Case(NamedTuple):
    """A command; ``copies`` are put beside it first, {name: path of inputs}, less what fits ``without``."""

    arguments: tuple[str, ...]
    copies: Mapping[str, str] = {}
    without: tuple[str, ...] = ()


class Cases(dict[str, Case]):
    """Cases by name; a name twice is a mistake."""

    def put(self, name: str, line: str | Iterable[str], without: tuple[str, ...] = (), **copies: str) -> None:
        name = re.sub(r"[^\w.+=-]+", "_", name)
        if name in self:
            raise ValueError(f"two cases are called {name}")
        self[name] = Case(tuple(line.split() if isinstance(line, str) else line), copies, without)


def all_cases(inputs: Path) -> Cases:
    """Every case, by name; ``in`` is the folder of inputs, and each runs in an empty folder of its own."""
    cases = Cases()
    _reading_cases(cases, inputs)
    _spectrum_cases(cases)
    _compare_cases(cases)
    _convert_cases(cases, inputs)
    _adapter_cases(cases, inputs)
    _merge_cases(cases)
    _extract_cases(cases)
    _train_cases(cases)
    _report_cases(cases)
    _error_cases(cases)
    return cases


def _reading_cases(cases: Cases, inputs: Path) -> None:
    """``inspect`` and ``spectrum`` of everything that there is to be read."""
    for folder in sorted(path for kind in ("peft", "odd") for path in (inputs / kind).iterdir()):
        place = f"in/{folder.parent.name}/{folder.name}"
        cases.put(f"inspect {folder.name}", f"inspect {place}/adapter --json")
        cases.put(f"spectrum {folder.name}", f"spectrum {place}/adapter --json")
        if (folder / "model.safetensors").exists():
            both = f"{place}/adapter --base {place}/model.safetensors"
            cases.put(f"inspect {folder.name} base", f"inspect {both} -v")
            cases.put(f"spectrum {folder.name} base", f"spectrum {both} --json")
    for path in sorted((inputs / "lycoris").iterdir()):
        cases.put(f"inspect lycoris {path.stem}", f"inspect in/lycoris/{path.name} --json")
        cases.put(f"spectrum lycoris {path.stem}", f"spectrum in/lycoris/{path.name} --json -v")
    for path in sorted((inputs / "acts").iterdir()):
        name = path.name
        cases.put(f"inspect acts {name}", f"inspect in/acts/{name} --alpha 2 --json")
        cases.put(f"inspect acts {name} text", f"inspect in/acts/{name} --base in/acts/base --alpha 2 -v")
        cases.put(f"spectrum acts {name}", f"spectrum in/acts/{name} --base in/acts/base --alpha 2 --json")
        cases.put(f"spectrum acts {name} alone", f"spectrum in/acts/{name} --alpha 2 --csv -v")
    for path in sorted((inputs / "hf" / "adapters").iterdir()):
        cases.put(f"inspect hf {path.name}", f"inspect in/hf/adapters/{path.name} --json")
        base = "gpt2" if path.name.startswith("gpt2") else "llama"
        cases.put(f"spectrum hf {path.name}", f"spectrum in/hf/adapters/{path.name} --base in/hf/{base} --json")
    for name in ("llama", "gpt2", "tied", "tuned", "half"):
        cases.put(f"inspect model {name}", f"inspect in/hf/{name} --json")
    for name in ("docs", "planted", "classify", "lm", "gpt2", "targets"):
        cases.put(f"inspect study {name}", f"inspect in/studies/{name}")
        cases.put(f"inspect study {name} json", f"inspect in/studies/{name} --json")
        cases.put(f"spectrum study {name}", f"spectrum in/studies/{name} --json --top 3")


def _spectrum_cases(cases: Cases) -> None:
    """The options of ``spectrum``."""
    plain, dora, pissa = (f"in/acts/{name}" for name in ("plain", "dora", "pissa"))
    tuned, half = "in/hf/tuned --base in/hf/llama", "in/hf/half --base in/hf/llama"
    lines = {
        "table": plain,
        "table of full": f"{tuned}",
        "table of half": f"{half} -v",
        "table of several": f"{plain} {dora} {pissa} --base in/acts/base",
        "json of several": f"{plain} {dora} {pissa} --base in/acts/base --json",
        "csv of several": f"{plain} {dora} {pissa} --base in/acts/base --csv --quiet",
        "csv of full": f"{tuned} --csv",
        "csv of half": f"{half} --csv",
        "json of full": f"{tuned} --json",
        "json of half": f"{half} --json",
        "shards": "in/acts/tuned --base in/acts/shards --json",
        "pickled": "in/acts/tuned --base in/acts/pickled --json",
        "pickled tuned": "in/acts/pickled --base in/acts/shards --json",
        "wide": "in/wide/tuned.safetensors --base in/wide/base.safetensors --json --top 8",
        "sketch": "in/wide/tuned.safetensors --base in/wide/base.safetensors --sketch 4 --json",
        "sketch table": "in/wide/tuned.safetensors --base in/wide/base.safetensors --sketch 8",
        "sketch csv": "in/wide/half.safetensors --base in/wide/base.safetensors --sketch 8 --csv",
        "sketch of adapter": f"{plain} --sketch 2 --json",
        "top": f"{tuned} --top 2 --json",
        "layers": f"{tuned} --layers *v_proj --layers layers.0 --json",
        "layers of adapter": f"{plain} --layers q --csv",
        "initial": f"{plain} --initial in/acts/pissa/initial --json",
        "initial of pissa": f"{pissa} --initial in/acts/plain --json",
        "alpha": "in/acts/loralib --alpha 3 --json",
        "workers": f"{plain} --workers 2 --json",
        "page": f"{plain} {dora} --base in/acts/base --report page.html --json",
        "page of full": f"{half} --report page.html --quiet",
        "page of study": "in/studies/lm --report page.html --csv",
        "plot": f"{plain} {dora} --plot plot.svg",
        "plot of full": f"{tuned} --plot plot.png --top 5 --csv",
        "run": "in/studies/classify/runs/pissa-r4-lr0.01-s0 --json",
        "study table": "in/studies/lm",
        "study csv": "in/studies/docs --csv --layers q_proj",
    }
    for name, line in lines.items():
        cases.put(f"spectrum option {name}", f"spectrum {line}")


def _compare_cases(cases: Cases) -> None:
    plain, other, a, b = (f"in/acts/{name}" for name in ("plain", "other", "a", "b"))
    llama = [f"in/hf/adapters/{name}" for name in ("plain", "rslora", "patterns", "embedding", "dora")]
    runs = "in/studies/planted/runs"
    docs = "in/studies/docs/runs"
    pairs = {
        "adapters": f"{a} {b}",
        "tools": f"{plain} in/acts/kohya",
        "loralib": f"{plain} in/acts/loralib --alpha 4",
        "diffusers and kohya": "in/acts/diffusers in/acts/kohya",
        "lycoris": "in/acts/lycoris in/acts/kohya",
        "dora": f"{a} in/acts/dora --base in/acts/base",
        "full": "in/hf/tuned in/hf/half --base in/hf/llama",
        "full and adapter": f"{llama[0]} in/hf/tuned --base in/hf/llama",
        "embedding": f"{llama[3]} in/hf/tuned --base in/hf/llama",
        "updates": f"{plain} in/acts/updates",
        "pissa": f"in/acts/pissa {other} --initial in/acts/plain",
        "rename": f"{plain} {other} --rename model.=base. --rename base.=model.",
        "top": f"{llama[0]} {llama[1]} --top 2",
        "layers": f"{llama[0]} {llama[2]} --layers v_proj",
        "of A": f"{llama[0]} {llama[1]} --of A",
        "of B": f"{llama[0]} {llama[2]} --of B",
        "runs": f"{runs}/lora-r2-lr0.01-s0 {runs}/full-lr0.003-s1",
        "runs of A": f"{runs}/lora-r2-lr0.01-s0 {runs}/lora-r8-lr0.01-s0 --of A",
        "docs": f"{docs}/lora-r4-lr0.01-s0 {docs}/pissa-r4-lr0.01-s0",
        "fused": "in/fused/whole in/fused/parts",
    }
    matrices = {
        "adapters": f"{' '.join(llama)} --base in/hf/llama",
        "of A": f"{' '.join(llama[:4])} --of A",
        "of B": f"{' '.join(llama[:3])} --of B --top 2",
        "formats": f"{plain} in/acts/kohya {a} {b} in/acts/diffusers",
        "with full": f"{llama[0]} {llama[1]} in/hf/tuned in/hf/half --base in/hf/llama --layers self_attn",
        "study": "in/studies/planted",
        "renamed": f"{plain} {other} {a} --rename model.=base.",
    }
    for kind, lines in (("pair", pairs), ("matrix", matrices)):
        for name, line in lines.items():
            cases.put(f"compare {kind} {name} json", f"compare {line} --json -v")
            cases.put(f"compare {kind} {name} csv", f"compare {line} --csv --quiet")
            cases.put(f"compare {kind} {name} table", f"compare {line}")
        for name in ("adapters", "of A", "full", "runs", "study", "with full"):
            if name in lines:
                cases.put(f"compare {kind} {name} page", f"compare {lines[name]} --report page.html --plot plot.svg")
    cases.put("compare pair layer", f"compare {a} {b} --layer model.h.0.q --plot plot.pdf --report page.html --csv")


def _convert_cases(cases: Cases, inputs: Path) -> None:
    for name in ("a", "b", "plain", "dora", "pissa", "old", "kohya", "lycoris", "diffusers", "loralib"):
        for to in ("peft", "kohya", "diffusers"):
            options = f"--to {to} --base in/acts/base --alpha 2 -o out"
            cases.put(f"convert {name} to {to}", f"convert in/acts/{name} {options}")
    for path in sorted((inputs / "hf" / "adapters").iterdir()):
        for to in ("peft", "kohya", "diffusers"):
            options = f"--to {to} -o out --json -v"
            cases.put(f"convert hf {path.name} to {to}", f"convert in/hf/adapters/{path.name} {options}")
    for name in ("LOHA", "LOKR", "linear_with_rank_pattern", "conv2d_kernel_3"):
        cases.put(f"convert method {name}", f"convert in/peft/{name}/adapter --to kohya -o out --json -v")
    cases.put("convert component", "convert in/acts/diffusers --to peft --component transformer -o out --json")
    cases.put("convert as text encoder", "convert in/acts/plain --to kohya --component text_encoder -o one.safetensors")
    cases.put(
        "convert names", "convert in/named.safetensors --to diffusers --names in/names.txt -o one.safetensors --json"
    )
    for name in ("locon", "loha", "lokr", "rescaled"):
        for to in ("peft", "kohya"):
            line = f"convert in/lycoris/{name}.safetensors --to {to} --names in/lycoris-names.txt -o out --json -v"
            cases.put(f"convert lycoris {name} to {to}", line)


def _adapter_cases(cases: Cases, inputs: Path) -> None:
    """``resize`` and what makes one adapter of several."""
    choices = ("--rank 1", "--energy 0.8", "--sigma-ratio 0.5", "--noise", "--budget 60")
    for name in ("a", "b", "plain", "dora", "pissa", "old"):
        for choice in choices:
            cases.put(f"resize acts {name} {choice}", f"resize in/acts/{name} {choice} -o out --json -v")
    for path in sorted((inputs / "hf" / "adapters").iterdir()):
        for choice in ("--rank 2", "--energy 0.9", "--budget 700"):
            cases.put(f"resize hf {path.name} {choice}", f"resize in/hf/adapters/{path.name} {choice} -o out --json")
    run = "in/studies/classify/runs/lora-r4-lr0.01-s0"
    lines = {
        "table": "in/acts/plain --rank 1",
        "half": "in/acts/b --energy 1 --dtype float16",
        "initial": "in/acts/pissa --rank 3 --initial in/acts/plain --json",
        "run": f"{run} --energy 0.7 --json",
        "pissa run": "in/studies/classify/runs/pissa-r4-lr0.01-s0 --rank 3 --json",
        "docs run": "in/studies/docs/runs/lora-r4-lr0.01-s0 --budget 9000 --json",
    }
    for name, line in lines.items():
        cases.put(f"resize option {name}", f"resize {line} -o out")
    for name in ("ADALORA", "VERA", "LOHA", "HRA", "linear", "conv2d_kernel_3", "embedding", "experts"):
        cases.put(f"resize method {name}", f"resize in/peft/{name}/adapter --rank 1 -o out --json")
    one, two, three = (f"in/hf/adapters/{name}" for name in ("plain", "rslora", "patterns"))
    for choice in ("", *choices[:3], "--budget 900"):
        cases.put(f"subtract {choice}", f"subtract {one} {two} {choice} -o out --json")
        cases.put(f"average {choice}", f"average {one} {two} {three} {choice} -o out --json")
        cases.put(f"merge as adapter {choice}", f"merge --as-adapter {one} {three} {choice} -o out --json")
    several = {"acts": "a b", "acts plain": "plain other", "acts same": "a a", "acts old": "old plain"}
    for name, names in several.items():
        paths = " ".join(f"in/acts/{part}" for part in names.split())
        cases.put(f"subtract {name}", f"subtract {paths} --energy 1 -o out")
        cases.put(f"average {name}", f"average {paths} --weights 3,1 -o out -v")
        cases.put(f"merge as adapter {name}", f"merge --as-adapter {paths} --weights 1,-0.5 --dtype bfloat16 -o out")
    for name in ("head", "biases"):
        pair = " ".join([f"in/hf/adapters/{name}"] * 2)
        cases.put(f"average {name}", f"average {pair} --weights 1,3 -o out --json -v")
    cases.put("merge as adapter gpt2", "merge --as-adapter in/hf/adapters/gpt2 in/hf/adapters/gpt2-head -o out --json")


def _merge_cases(cases: Cases) -> None:
    pairs = {
        "base": "in/acts/base in/acts/a",
        "plain": "in/acts/base in/acts/plain",
        "shards": "in/acts/shards in/acts/old",
        "pickled": "in/acts/pickled in/acts/b",
        "dora": "in/acts/base in/acts/dora",
        "several": "in/acts/base in/acts/a in/acts/b --weights 0.5,-2",
        "pissa": "in/acts/base in/acts/pissa",
        "llama": "in/hf/llama in/hf/adapters/plain",
        "half": "in/hf/half in/hf/adapters/plain in/hf/adapters/rslora --weights 1,0.5",
        **{f"llama {name}": f"in/hf/llama in/hf/adapters/{name}" for name in HF_SETTINGS},
        "tied": "in/hf/tied in/hf/adapters/embedding",
        "gpt2": "in/hf/gpt2 in/hf/adapters/gpt2",
        "gpt2 head": "in/hf/gpt2 in/hf/adapters/gpt2-head",
        "experts": "in/peft/experts/model.safetensors in/peft/experts/adapter",
    }
    for name, line in pairs.items():
        cases.put(f"merge {name}", f"merge {line} -o out --json -v")
        cases.put(f"unmerge {name}", f"unmerge {line} -o out --json")
    for name in ("base", "half"):
        cases.put(f"merge {name} table", f"merge {pairs[name]} -o out")
        cases.put(f"unmerge {name} table", f"unmerge {pairs[name]} -o out")


def _extract_cases(cases: Cases) -> None:
    tuned = {
        "acts": "in/acts/tuned --base in/acts/base",
        "shards": "in/acts/tuned --base in/acts/shards",
        "llama": "in/hf/tuned --base in/hf/llama",
        "half": "in/hf/half --base in/hf/llama",
        "tied": "in/hf/tied-tuned --base in/hf/tied",
        "gpt2": "in/hf/gpt2-tuned --base in/hf/gpt2",
    }
    for name, line in tuned.items():
        for choice in ("--rank 2", "--energy 0.9", "--sigma-ratio 0.3", "--budget 4000"):
            cases.put(f"extract {name} {choice}", f"extract {line} {choice} -o out --json -v")
        cases.put(f"extract {name} low-rank", f"extract {line} --rank 3 --embeddings low-rank -o out --json")
    cases.put("extract noise", "extract in/hf/half --base in/hf/llama --noise -o out --json")
    cases.put("extract half", "extract in/hf/tuned --base in/hf/llama --rank 4 --dtype bfloat16 -o out")
    cases.put("extract updates", "extract in/acts/updates --rank 2 -o out --json")
    cases.put("extract updates of base", "extract in/acts/updates --rank 2 --base in/acts/base -o out --json")
    cases.put("extract run", "extract in/studies/classify/runs/full-lr0.003-s0 --rank 2 -o out --json")
    cases.put("extract docs run", "extract in/studies/docs/runs/full-lr0.001-s0 --energy 0.5 -o out --json")
    wide = "in/wide/tuned.safetensors --base in/wide/base.safetensors"
    cases.put("extract wide", f"extract {wide} --rank 3 -o out --json")


def _train_cases(cases: Cases) -> None:
    """New studies are told as JSON, since clocks show in tables; tables are those of studies that have ended."""
    planted = "--task planted --steps 20 --batch 16"
    classify = "--task classify --model in/models/bert --data in/data/classified.jsonl --steps 4 --batch 8"
    table = "--task classify --model in/models/bert --data in/data/classified.tsv"
    lm = "--task lm --data in/data/documents.csv --steps 4 --batch 4 --ranks 2 --lrs 0.01 --full-lrs 0.001"
    lines = {
        "planted": f"{planted} --methods lora,rslora,lora+,frozen-a,pissa,subspace,said --ranks 1,4 --dims 16,64",
        "planted flat": f"{planted} --planted-rank 3 --planted-spectrum flat --ranks 2 --seeds 0,1 --schedule linear",
        "planted decaying": f"{planted} --planted-spectrum decaying --ranks 2 --init gaussian --warmup 0.5 --clip 0.1",
        "planted extended": f"{planted} --ranks 2 --lrs 0.001,0.002 --no-full --extend-lrs --evaluations 2",
        "planted halving": f"{planted} --ranks 2,4 --lrs 0.001,0.01,0.1 --halving --alpha 3 --schedule constant",
        "planted diverging": f"{planted} --ranks 2 --lrs 1e30 --full-lrs 0.001 --clip 1e30",
        "planted settings": f"{planted} --config in/study.toml --dropout 0.2 --accumulate 2 --weight-decay 0.3",
        "classify every method": f"{classify} --methods {METHODS} --ranks 2 --dims 16,64 --lrs 0.01 --full-lrs 0.003",
        "classify biases": f"{classify} --ranks 2 --bias all --lrs 0.01 --full-lrs 0.003 --eval in/data/more.jsonl",
        "classify targets": f"{classify} --targets q --targets q,v --budget 400 --lrs 0.01 --no-full --alpha 2r",
        "classify epochs": f"{table} --ranks 2 --lrs 0.01 --no-full --max-length 6 --epochs 1",
        "lm llama": f"{lm} --model in/models/llama --methods lora,pissa --text body",
        "lm gpt2": f"{lm} --model in/models/gpt2 --targets c_attn,c_proj --text body --max-length 16",
        "lm bfloat16": f"{lm} --model in/models/llama --dtype bfloat16 --text body",
        "lm checkpointing": f"{lm} --model in/models/llama --checkpointing --bias lora_only --text body",
    }
    for name, line in lines.items():
        cases.put(f"train {name}", f"train {line} -o out --json --device cpu")
    for name in ("planted", "classify", "lm", "gpt2", "targets", "docs"):
        options = f"train --config in/{name}.toml -o study --device cpu"
        cases.put(f"train ended {name}", options, study=f"studies/{name}")
        if name in ("classify", "targets", "docs"):
            cases.put(f"train ended {name} runs", f"{options} -v --quiet", study=f"studies/{name}")
            cases.put(f"train ended {name} json", f"{options} --json", study=f"studies/{name}")
    cases.put("train and report", "train --config in/lm.toml -o study --device cpu --report", study="studies/lm")
    left: tuple[str, ...] = ("runs/lora-r4-lr0.01-s1", "runs/pissa-r4-lr0.01-s0")
    options = "train --config in/docs.toml -o study --json --device cpu"
    cases.put("train docs again", options, left, study="studies/docs")
    left = ("coverage/runs/*-s8", "r4-flat-noise0.5/runs/lora-r4-*-s0", "r48-flat-noise0.5/runs/full-*-s1")
    cases.put("calibrate json", "calibrate --quick -o kept --json", left, kept="calibration")


def _report_cases(cases: Cases) -> None:
    for name in ("planted", "classify", "lm"):
        cases.put(f"report {name}", f"report in/studies/{name} -o out --device cpu --json")
    lines = "performance,spectra,overlap,agreement,weight,effective"
    cases.put("report docs", f"report in/studies/docs -o out --device cpu --json --lines {lines}")
    cases.put("report table", "report in/studies/targets -o out --device cpu")
    cases.put("report gpt2 kept", "report in/studies/gpt2 -o out --device cpu --cache cache --json")
    for of in "AB":
        cases.put(f"report of {of}", f"report in/studies/planted -o out --device cpu --json --of {of} --lines overlap")
    for line in ("performance", "truncation", "spectra", "overlap", "agreement", "weight", "effective", "dimension"):
        cases.put(f"report line {line}", f"report in/studies/classify -o out --device cpu --lines {line}")
    left: tuple[str, ...] = ("runs/full-*",)
    cases.put("report without full", "report study --device cpu --json --quiet", left, study="studies/lm")
    left = ("runs/*-s1", "runs/*-s2", "runs/pissa*", "runs/*lr0.02*")
    cases.put("report with one seed", "report study --device cpu --json --quiet", left, study="studies/planted")
    left = ("runs/lora-*",)
    cases.put("report without adapters", "report study --device cpu --json --quiet", left, study="studies/planted")


ERRORS = """
nonsense
--help
spectrum
compare in/acts/a
inspect in/nowhere
spectrum in/acts/tuned
spectrum in/acts/a --json --csv
spectrum in/acts/a --plot x.gif
spectrum in/acts/a --report x.txt
spectrum in/acts/a --sketch 2 --report x.html
spectrum in/acts/a --layers nothing
spectrum in/acts/a --initial in/acts/a --initial in/acts/b
spectrum in/acts/a --device nonsense
spectrum in/broken/cut.safetensors
spectrum in/broken/nan
spectrum in/broken/half
inspect in/broken/json
spectrum in/acts/loralib
spectrum in/acts/a --base in/hf/llama
spectrum in/hf/tuned --base in/hf/gpt2
compare in/acts/a in/hf/adapters/plain
compare in/acts/a in/acts/b --rename x
compare in/acts/a in/acts/b --layer x
compare in/acts/tuned in/acts/a --of A --base in/acts/base
compare in/acts/a in/acts/b in/hf/adapters/plain
resize in/acts/a -o out
resize in/acts/a --rank 1 --noise -o out
resize in/acts/a --energy 1.5 -o out
resize in/acts/plain --budget 3 -o out
resize in/acts/kohya --rank 1 -o out
resize in/acts/a --rank 1 -o in
resize in/acts/tuned --rank 1 -o out
extract in/acts/a --rank 1 -o out
extract in/acts/tuned --rank 1 -o out
merge in/acts/a in/acts/b -o out
merge in/acts/base -o out
merge in/acts/base in/acts/a --rank 2 -o out
merge in/hf/llama in/acts/a -o out
merge --as-adapter in/acts/a in/acts/b --weights 1,x -o out
average in/acts/a in/acts/b --weights 1,-1 -o out
average in/acts/a -o out
subtract in/acts/a in/hf/llama -o out
unmerge in/acts/base in/hf/adapters/plain -o out
convert in/acts/kohya --to peft -o out
convert in/acts/tuned --to kohya -o out
convert in/acts/a --to peft -o out.safetensors
train --model in/models/bert
train --task classify --model in/models/bert --device cpu -o out
train --task classify --model in/nowhere --data in/data/classified.jsonl -o out
train --task classify --model in/models/bert --data in/data/classified.jsonl --label x -o out
train --task planted --ranks 0 -o out
train --task planted --methods bias -o out
train --methods nonsense -o out
train --task planted --ranks 2,x -o out
train --task planted --config in/names.txt -o out
train --task planted --targets nothing -o out
train --task planted --report --json -o out
train --task planted --device nonsense -o out
train --task planted --method subspace --dims 999999 -o out
train --task lm --model in/models/bert --data in/data/documents.csv --text body -o out
report in/acts/a
report in/studies/lm --lines nonsense -o out
report in/studies/lm --of C -o out
"""
"""Command lines that are refused."""


def _error_cases(cases: Cases) -> None:
    """What is refused, in one sentence."""
    cases.put("error nothing", "")
    for number, line in enumerate(ERRORS.split("\n")[1:-1]):
        cases.put(f"error {number:02} {line.replace('in/', '')[:60]}", line)
    options = "train --task planted --planted-rank 9 -o study --device cpu"
    cases.put("error other settings", options, study="studies/planted")
    names = ("train", "spectrum", "compare", "inspect", "report", "resize", "convert", "extract", "merge", "unmerge")
    for name in (*names, "subtract", "average", "bench", "calibrate"):
        cases.put(f"help {name}", f"{name} --help")


# Running them


def run(inputs: Path, out: Path, only: str) -> None:
    """Every case whose name fits ``only``; each is left in a folder of its name."""
    inputs = inputs.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is there already; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    before = fingerprint(inputs)
    slowest: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in all_cases(inputs).items():
            if fnmatch(name, only):
                began = time.monotonic()
                _record(case, inputs, Path(scratch) / "work", out / name)
                slowest.append((time.monotonic() - began, name))
    if fingerprint(inputs) != before:
        raise SystemExit(f"a command changed its inputs: {inputs}")
    made = {"inputs": before, "torch": str(torch.__version__), "numpy": np.__version__}
    (out / "made-by.json").write_text(json.dumps(made, indent=1))
    print(f"of {Path(str(sys.modules['rankscope'].__file__)).parent}:")
    print(f"{len(slowest)} cases, {sum(took for took, _ in slowest):.0f} s")
    for took, name in sorted(slowest, reverse=True)[:8]:
        print(f"{took:7.1f} s  {name}")


def _record(case: Case, inputs: Path, work: Path, out: Path) -> None:
    """Run one case in an empty folder, and keep what it said and wrote."""
    work.mkdir()
    (work / "in").symlink_to(inputs)
    for name, source in case.copies.items():
        shutil.copytree(inputs / source, work / name)
        for pattern in case.without:
            for path in (work / name).glob(pattern):
                shutil.rmtree(path)
    known = _digests(work, work.rglob("*"))
    with contextlib.chdir(work):
        code, said, talk = command(case.arguments)
    place = Place(inputs, work)
    out.mkdir()
    (out / "command.txt").write_text(" ".join(case.arguments) + "\n")
    (out / "exit.json").write_text(json.dumps(place.plain(code)) + "\n")
    (out / "stderr.txt").write_text(place.plain(talk))
    kinds = {"--json": "stdout.json", "--csv": "stdout.csv"}
    kind = next((kinds[part] for part in case.arguments if part in kinds and said), "stdout.txt")
    (out / kind).write_text(place.canonical(said) if kind == "stdout.json" else place.plain(said))
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if path.is_file() and not path.is_symlink() and path.name != ".lock" and known.get(name) != _digest(path):
            ending, text = recorded(path, place)
            target = out / "files" / (name + ending)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    shutil.rmtree(work)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(paths) if path.is_file()}


def fingerprint(folder: Path) -> str:
    """A hash of all files of a folder and of their names."""
    return hashlib.sha256(json.dumps(_digests(folder, folder.rglob("*"))).encode()).hexdigest()


# Comparing two runs


class Found(NamedTuple):
    """What differs: in numbers, in wording (with a mark where the numbers in it differ too), and in pictures."""

    numbers: list[str]
    wording: list[tuple[Path, bool]]
    pictures: list[Path]


def compared(one: Path, other: Path, only: str) -> Found:
    """All that differs between two runs, of the cases whose names fit ``only``."""
    found = Found([], [], [])
    here, there = (_files(root, only) for root in (one, other))
    found.numbers.extend(f"{name}: only in {root}" for names, root in ((here - there, one), (there - here, other))
                         for name in sorted(names))  # fmt: skip
    for name in sorted(here & there):
        before, after = ((root / name).read_text() for root in (one, other))
        if before != after:
            _tell(found, name, before, after)
    return found


def _files(root: Path, only: str) -> set[Path]:
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    return {name for name in files if len(name.parts) == 1 or fnmatch(name.parts[0], only)}


def _tell(found: Found, name: Path, before: str, after: str) -> None:
    kind = name.suffix
    if kind == ".json":
        prose: list[str] = []
        told = list(_json_differences(json.loads(before), json.loads(after), "", False, prose))
        found.numbers.extend(f"{name}{line}" for line in told)
        if prose:
            found.wording.append((name, False))
    elif kind == ".csv":
        found.numbers.extend(f"{name}{line}" for line in _csv_differences(before, after))
    elif kind == ".html":
        numbers = [_numbers(_shown(text)) for text in (before, after)]
        if numbers[0] != numbers[1]:
            found.numbers.append(f"{name}: {_first_difference(*numbers)}")
        found.wording.append((name, numbers[0] != numbers[1]))
    elif kind == ".picture":
        found.pictures.append(name)
    else:
        found.wording.append((name, _numbers(before) != _numbers(after)))


def _json_differences(one: Any, other: Any, where: str, prose: bool, wording: list[str]) -> Iterator[str]:
    """Where two values differ; sentences with the same numbers in other words go to ``wording``."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if key not in one or key not in other:
                yield f" {where}.{key}: only in the {'second' if key in other else 'first'}"
            else:
                yield from _json_differences(one[key], other[key], f"{where}.{key}", prose or key in SENTENCES, wording)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _json_differences(a, b, f"{where}[{i}]", prose, wording)
    elif type(one) is not type(other) or one != other:
        if prose and isinstance(one, str) and isinstance(other, str) and _numbers(one) == _numbers(other):
            wording.append(where)
        else:
            yield f" {where}: {_short(one)} → {_short(other)}"


def _csv_differences(before: str, after: str) -> Iterator[str]:
    one, other = (list(csv.reader(io.StringIO(text))) for text in (before, after))
    if len(one) != len(other):
        yield f": {len(one)} rows → {len(other)}"
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            cells = [f"{x} → {y}" for x, y in zip(a, b, strict=False) if x != y] or [f"{len(a)} cells → {len(b)}"]
            yield f" row {number}: {', '.join(cells[:4])}"


def _shown(page: str) -> str:
    """The text of a page, and the values that stand behind its cells."""
    text = re.sub(r"<[^>]*>", " ", re.sub(r'<[^>]*?data-v="([^"]*)"[^>]*>', r" \1 ", page))
    return html.unescape(text)  # "&#39;" is an apostrophe and no number


def _numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def _first_difference(one: list[str], other: list[str]) -> str:
    counts = "" if len(one) == len(other) else f"{len(one)} numbers → {len(other)}; "
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    several = sum(a != b for a, b in zip(one, other, strict=False))
    shown = " → ".join(" ".join(values[max(0, place - 2) : place + 3]) for values in (one, other))
    return f"{counts}{several} in other places or changed, from number {place}: … {shown} …"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def diff(one: Path, other: Path, wording: bool, most: int, only: str) -> int:
    """Print what differs; 1 where a number does."""
    for root in (one, other):
        if not (root / "made-by.json").exists():
            raise SystemExit(f"{root}: no complete recording; made-by.json is missing")
    found = compared(one, other, only)
    for line in found.numbers[:most]:
        print(line)
    if len(found.numbers) > most:
        print(f"… and {len(found.numbers) - most} more; --most N shows more")
    if wording:
        for name, _ in found.wording:
            before, after = ((root / name).read_text().splitlines() for root in (one, other))
            print("\n".join(difflib.unified_diff(before, after, str(one / name), str(other / name), "", "", 1, "")))
    cases = {name.parts[0] for name, _ in found.wording}
    touched = [name for name, numbers in found.wording if numbers]
    print(f"numbers: {len(found.numbers)} differences")
    print(f"wording: {len(found.wording)} texts of {len(cases)} cases differ, {len(touched)} of them in a number too")
    for name in touched[:most]:
        print(f"  numbers within: {name}")
    print(f"pictures: {len(found.pictures)} differ" + "".join(f"\n  {name}" for name in found.pictures[:most]))
    return 1 if found.numbers else 0


# Making inputs; everything below is used once, by the version that is to be held on to


HF_SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "seed": 1},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 11}, "seed": 2},
    "biases": {"bias": "all"},
    "biases-of-targets": {"bias": "lora_only"},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"], "seed": 3},
    "dora": {"use_dora": True, "seed": 4},
    "bias-of-B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "token-rows": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "half": {"dtype": torch.bfloat16},
    "expression": {"target_modules": r"model\.layers\.\d\.mlp\..*_proj"},
}
"""Adapters of a small Llama besides the plain one."""
STUDIES: dict[str, tuple[str, ...]] = {
    "planted": (
        "task = 'planted'\nmethods = ['lora', 'pissa', 'subspace', 'said']\nranks = [1, 2, 8]\ndims = [16, 256, 4096]\n"
        "seeds = [0, 1, 2]\nlrs = [0.01, 0.02]\nfull_lrs = [0.003]\nsteps = 100\nbatch = 32\nevaluations = 2\n",
    ),
    "classify": (
        "task = 'classify'\nmodel = 'in/models/bert'\ndata = 'in/data/classified.jsonl'\nseeds = [0, 1]\nbatch = 8\n"
        f"methods = {METHODS.split(',')}\ndims = [16, 64]\nlrs = [0.01, 0.03]\nfull_lrs = [0.003]\nsteps = 20\n"
        "ranks = [1, 4]\n",
    ),
    "lm": (
        "task = 'lm'\nmodel = 'in/models/llama'\ndata = 'in/data/documents.csv'\ntext = 'body'\nranks = [1, 4]\n"
        "seeds = [0, 1]\nlrs = [0.01, 0.03]\nfull_lrs = [0.003]\nsteps = 15\nbatch = 4\nbias = 'lora_only'\n",
    ),
    "gpt2": (
        "task = 'lm'\nmodel = 'in/models/gpt2'\ndata = 'in/data/documents.csv'\ntext = 'body'\nranks = [2]\n"
        "targets = ['c_attn,c_proj']\nmethods = ['lora', 'pissa']\nlrs = [0.01]\nfull_lrs = [0.003]\nsteps = 10\n",
    ),
    "targets": (
        "task = 'classify'\nmodel = 'in/models/bert'\ndata = 'in/data/classified.jsonl'\ntargets = ['q', 'v', 'q,v']\n"
        "budget = 400\nseeds = [0, 1]\nlrs = [0.01]\nfull_lrs = [0.003]\nsteps = 12\nbatch = 8\nevaluations = 0\n",
    ),
    "docs": (
        "ranks = [1, 4]\nseeds = [0, 1]\nlrs = [0.01]\nfull_lrs = [0.001]\nsteps = 3\n",
        "methods = ['lora', 'rslora', 'lora+', 'frozen-a', 'pissa']\nranks = [4]\nseeds = [0]\nlrs = [0.01]\n"
        "full_lrs = [0.001]\nsteps = 3\n",
    ),
}
"""Settings of studies, in TOML; those of several are one study that grows."""


def make_inputs(home: Path) -> None:
    """Adapters of every format, bases, tuned checkpoints and studies, from fixed seeds."""
    sys.path.insert(0, str(TESTS))
    from damage import make_sources

    home = home.resolve()
    home.mkdir(parents=True)
    (home / "acts").mkdir()
    make_sources(home / "acts")
    for make in (_make_peft, _make_odd, _make_lycoris, _make_hf, _make_wide, _make_fused, _make_broken, _make_data):
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            make(home)
    _settle(home)
    _make_studies(home)
    for path in home.rglob(".lock"):
        path.unlink()


def _settle(home: Path) -> None:
    """PEFT writes sets, whose order changes from one process to the next: sort them."""
    for path in home.rglob("adapter_config.json"):
        with contextlib.suppress(json.JSONDecodeError):
            config = json.loads(path.read_text())
            for key in ("target_modules", "modules_to_save"):
                if isinstance(config.get(key), list):
                    config[key] = sorted(config[key])
            path.write_text(json.dumps(config, indent=2))


def _make_peft(home: Path) -> None:
    """Adapters that PEFT saves, of every method that is read, each with its base."""
    import test_formats_peft_methods as tests
    from peft_models import LINEAR, Saved, import_peft, two

    peft = import_peft()

    def save(name: str, method: str, model: Any, **config: Any) -> None:
        folder = home / "peft" / re.sub(r"\W+", "_", name)
        folder.mkdir(parents=True)
        torch.manual_seed(len(name))
        Saved(peft, folder, method, model, **config)

    for name, (config, _, _) in LINEAR.items():
        save(name, name.partition(",")[0], two(), target_modules=["q", "k"], **config)
    for name, config in tests.CONVOLUTIONS.items():
        for kind, layer in _convolutions().items():
            if (name, kind) != ("LOKR, core", "one-dimensional"):  # PEFT's own product fails there
                settings = {"r": 1, "alpha": 3, "target_modules": ["conv"], **config}
                save(f"{name} conv {kind}", name.partition(",")[0], tests.Tiny(conv=layer), **settings)
    for method, config in tests.CONV1D.items():
        model = tests.Tiny(c_proj=peft.Conv1D(24, 8))
        save(f"{method} of gpt2", method, model, target_modules=["c_proj"], fan_in_fan_out=True, **config)
    _make_lora(save, peft, tests)
    for init in ("pissa", "olora"):
        for place in ("initial", None):
            torch.manual_seed(5)
            tests.moved(peft, home / "peft" / f"start_{init}_{place}", init, place)


def _convolutions() -> dict[str, Any]:
    from torch import nn

    torch.manual_seed(1)
    return {"3x3": nn.Conv2d(8, 16, 3), "grouped": nn.Conv2d(8, 16, (3, 2), groups=2),
            "one-dimensional": nn.Conv1d(8, 16, 3)}  # fmt: skip


def _make_lora(save: Callable[..., None], peft: Any, tests: Any) -> None:
    """LoRA itself on every kind of layer and with every setting; other methods where they have settings too."""
    from torch import nn

    tiny, linear = tests.Tiny, {"r": 3, "lora_alpha": 12, "target_modules": ["q"]}
    layers: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "linear": (nn.Linear(7, 5), {}),
        "conv1d of gpt2": (peft.Conv1D(9, 4), {"fan_in_fan_out": True}),
        "embedding": (nn.Embedding(11, 6), {}),
        "conv2d kernel 1": (nn.Conv2d(4, 6, 1), {}),
        "conv2d kernel 3": (nn.Conv2d(4, 6, 3), {}),
        "conv1d": (nn.Conv1d(4, 6, 3), {}),
        "conv3d": (nn.Conv3d(4, 6, 3), {}),
        "conv2d grouped": (nn.Conv2d(8, 12, 3, groups=2), {"r": 4}),
    }
    for name, (layer, config) in layers.items():
        save(name, "LORA", tiny(q=layer), **{**linear, **config})
        if name in ("linear", "conv1d of gpt2", "embedding", "conv2d kernel 3"):
            save(f"{name} dora", "LORA", tiny(q=layer), use_dora=True, **{**linear, **config})
    four = {name: nn.Linear(8, 6) for name in "qkvo"}
    patterns = {"rank_pattern": {"(k|q)": 2, "^block.v": 3, "bloc.o": 7, "k": 5},
                "alpha_pattern": {"block.k": 9, "k|q": 11, "v": 2}}  # fmt: skip
    for name, config in (("linear with rank pattern", {}), ("linear with rsLoRA", {"use_rslora": True})):
        save(name, "LORA", tiny(**four), r=4, lora_alpha=6, target_modules=list("qkvo"), **patterns, **config)
    for method in ("LOHA", "LOKR"):
        save(f"{method} with patterns", method, tiny(**four), r=8, alpha=6, target_modules=list("qkvo"), **patterns)
    several = tiny(q=nn.Linear(7, 5), head=nn.Linear(5, 2), norm=nn.LayerNorm(5))
    save("everything", "LORA", several, **linear, lora_bias=True, bias="all", modules_to_save=["head", "norm"])
    whole = {"modules_to_save": ["head", "new", "norm"]}
    save("whole modules", "LORA", tests.Vocabulary(), r=2, target_modules=["q"], **whole)
    rows = {"trainable_token_indices": {"embed": [8, 1, 3]}}
    save("token rows", "LORA", tests.Vocabulary(), r=2, target_modules=["q"], **rows)
    save("token rows alone", "TRAINABLE_TOKENS", tests.Vocabulary(), target_modules=["embed"], token_indices=[8, 1, 3])
    _make_experts(save, tests)
    others: dict[str, dict[str, Any]] = {
        "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10}, "HRA": {"r": 3}, "IA3": {"feedforward_modules": []},
        "OFT": {"r": 0, "oft_block_size": 6, "use_cayley_neumann": False},
    }  # fmt: skip
    for method, config in others.items():
        save(f"{method} conv", method, tiny(conv=nn.Conv2d(4, 6, 3)), target_modules=["conv"], **config)
    save("HIRA embedding", "HIRA", tiny(emb=nn.Embedding(11, 6)), r=2, target_modules=["emb"])


def _make_experts(save: Callable[..., None], tests: Any) -> None:
    from torch import nn

    for transposed in (False, True):
        model = tests.Tiny(q=nn.Linear(7, 5), experts=tests.Experts(transposed, **tests.SHAPES))
        settings = {"target_parameters": ["experts.up", "experts.down"], "rank_pattern": {"experts.up": 4}}
        name = "experts transposed" if transposed else "experts"
        alphas = {"alpha_pattern": {"experts.down": 10}}
        save(name, "LORA", model, r=2, lora_alpha=6, target_modules=["q"], **settings, **alphas)
    model = tests.Tiny(q=nn.Linear(7, 5), experts=tests.Experts(False, **tests.SHAPES))
    save("experts of one stack", "LORA", model, r=2, target_modules=["q"], target_parameters=["experts.down"])
    alike = tests.Tiny(q=nn.Linear(7, 5), experts=tests.Experts(False, up=(3, 6, 4), gate=(3, 6, 4)))
    parameters = ["experts.up", "experts.gate"]
    save("experts alike", "LORA", alike, r=2, target_modules=["q"], target_parameters=parameters)


def _make_odd(home: Path) -> None:
    """Adapters that are refused, with the reason, and some that are odd and read all the same."""
    import test_formats_peft_methods as tests
    from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint

    for method in tests.NOT_READ:
        write_adapter(home / "odd" / f"refused_{method}" / "adapter", peft_type=method)
    write_adapter(home / "odd" / "unknown_method" / "adapter", peft_type="NOT_INVENTED")
    write_adapter(home / "odd" / "no_rank" / "adapter", r=...)
    live = {key.replace(".weight", ".default.weight"): value for key, value in linear("block.q").items()}
    write_adapter(home / "odd" / "live_names" / "adapter", live)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64):
        tensors = {key: value.to(dtype) for key, value in linear("block.q").items()}
        write_adapter(home / "odd" / str(dtype).removeprefix("torch.") / "adapter", tensors)
    grown = {**linear("q"), f"{PREFIX}embed_tokens.weight": normal(9, 4)}
    write_adapter(home / "odd" / "grown_embedding" / "adapter", grown)
    base = {"embed_tokens.weight": normal(7, 4, seed=1), "q.weight": normal(5, 7)}
    write_checkpoint(home / "odd" / "grown_embedding" / "model.safetensors", base)
    write_adapter(home / "odd" / "wrapped_base" / "adapter", linear("model.q"), lora_alpha=3)
    write_checkpoint(home / "odd" / "wrapped_base" / "model.safetensors", {"transformer.model.q.weight": normal(5, 7)})
    for i, init in enumerate(("pissa", "olora", "loftq", "eva", "corda", "gaussian", "orthogonal", True, False)):
        write_adapter(home / "odd" / f"init_{i}_{init}" / "adapter", linear("block.q"), init_lora_weights=init)


def _make_lycoris(home: Path) -> None:
    """Every layout of factors of LyCORIS, a module each, and what of it is damaged."""
    import test_formats_lycoris as tests
    from adapters import normal

    (home / "lycoris").mkdir()
    files: dict[str, dict[str, dict[str, torch.Tensor]]] = {name: {} for name in ("locon", "loha", "lokr", "rescaled")}
    for i, kernel in enumerate(tests.KERNELS.values()):
        sides = ((1, "hada_w1_a", "hada_w1_b"), (3, "hada_w2_a", "hada_w2_b"))
        factors = [tests.pair((a, b), 6, 4, 2, kernel, seed + i, upright=False) for seed, a, b in sides]
        files["loha"][f"m{i}"] = factors[0] | factors[1]
        files["locon"][f"m{i}"] = tests.pair(("lora_up.weight", "lora_down.weight"), 6, 4, 2, kernel, i, upright=True)
        if kernel:
            ones = (1,) * len(kernel)
            files["locon"][f"mid{i}"] = {
                "lora_up.weight": normal(6, 2, *ones), "lora_down.weight": normal(2, 4, *ones, seed=1),
                "lora_mid.weight": normal(2, 2, *kernel, seed=2),
            }  # fmt: skip
    for i, first in enumerate(tests.LOKR_W1.values()):
        files["lokr"] |= {f"m{i}{j}": first | second for j, second in enumerate(tests.LOKR_W2.values())}
    files["rescaled"]["m0"] = {**files["locon"]["m0"], "dora_scale": normal(6, 1, seed=9).abs()}
    files["rescaled"]["m1"] = {**files["locon"]["m0"], "dora_scale": normal(1, 4, seed=9).abs()}
    files["full"] = {"m0": {"diff": normal(5, 4, 3), "diff_b": normal(5)}, "m1": {"diff": normal(5, 4).bfloat16()},
                     "m2": {"w_norm": normal(5), "b_norm": normal(5)}}  # fmt: skip
    for i, (tensors, _) in enumerate(tests.BAD.values()):
        files[f"bad{i:02}"] = {"m0": tensors, "m1": files["locon"]["m0"]}
    modules = [f"block.{i}.to_q" for i in range(99)]
    (home / "lycoris-names.txt").write_text("\n".join(modules))
    for name, found in files.items():
        stored: dict[str, torch.Tensor] = {}
        for i, tensors in enumerate(found.values()):
            raw = f"lora_unet_{modules[i].replace('.', '_')}"
            stored |= {f"{raw}.{leaf}": value.contiguous().clone() for leaf, value in tensors.items()}
            stored[f"{raw}.alpha"] = torch.tensor(3.0)
        save_file(stored, home / "lycoris" / f"{name}.safetensors")


def _make_hf(home: Path) -> None:
    """Models of transformers, adapters that PEFT saved on them, and tuned checkpoints."""
    from surgery_makers import gpt2, llama, save_model, save_peft

    hf = home / "hf"
    models = {"llama": llama(), "tied": llama(tie=True), "gpt2": gpt2()}
    for name, model in models.items():
        save_model(model, hf / name)
    save_peft(models["llama"], hf / "adapters" / "plain")
    for name, settings in HF_SETTINGS.items():
        save_peft(models["llama"], hf / "adapters" / name, **settings)
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    save_peft(models["gpt2"], hf / "adapters" / "gpt2", **targets)
    save_peft(models["gpt2"], hf / "adapters" / "gpt2-head", modules_to_save=["lm_head"], seed=1, **targets)
    save_model(_tuned(llama()), hf / "tuned", max_shard_size="20KB")
    save_model(_tuned(llama(), seed=9).to(torch.bfloat16), hf / "half")
    save_model(_tuned(llama(tie=True)), hf / "tied-tuned")
    save_model(_tuned(gpt2()), hf / "gpt2-tuned")
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]
    (home / "names.txt").write_text("\n".join(names))
    tensors = {}
    for name in names:
        raw = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{raw}.lora_up.weight"], tensors[f"{raw}.lora_down.weight"] = torch.randn(16, 2), torch.randn(2, 16)
        tensors[f"{raw}.alpha"] = torch.tensor(1.0)
    save_file(tensors, home / "named.safetensors")


def _tuned(model: Any, scale: float = 0.05, seed: int = 8) -> Any:
    """The same model with every weight moved, most along few directions."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * scale * torch.randn(parameter.shape, generator=source))
            if parameter.ndim == 2:
                left, right = (torch.randn(side, 2, generator=source) for side in parameter.shape)
                parameter.add_(scale * left @ right.T)
    return model


def _make_wide(home: Path) -> None:
    """Matrices large enough for a sketch to be taken."""
    from adapters import normal, write_checkpoint

    shapes = {"layers.0.q_proj": (400, 300), "layers.0.v_proj": (300, 300), "layers.1.up": (600, 200)}
    base = {f"{name}.weight": normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tuned = {}
    for name, value in base.items():
        low = normal(value.shape[0], 3, seed=8) @ normal(3, value.shape[1], seed=9)
        tuned[name] = value + 0.01 * normal(*value.shape, seed=7) + low
    write_checkpoint(home / "wide" / "base.safetensors", base)
    write_checkpoint(home / "wide" / "tuned.safetensors", tuned)
    write_checkpoint(home / "wide" / "half.safetensors", {name: value.bfloat16() for name, value in tuned.items()})


def _make_fused(home: Path) -> None:
    """A fused projection and its parts."""
    from adapters import linear, write_adapter

    write_adapter(home / "fused" / "whole", linear("h.0.qkv_proj", 18, 6, r=4))
    parts = [linear(f"h.0.{name}_proj", 6, 6, seed=i) for i, name in enumerate("qkv")]
    write_adapter(home / "fused" / "parts", parts[0] | parts[1] | parts[2])


def _make_broken(home: Path) -> None:
    from adapters import linear, write_adapter

    tensors = linear("block.q")
    first = next(iter(tensors))
    broken = write_adapter(home / "broken" / "nan", {**tensors, first: tensors[first] * float("nan")}).parent
    write_adapter(broken / "half", {first: tensors[first]})
    write_adapter(broken / "json")
    (broken / "json" / "adapter_config.json").write_text("[1, 2")
    (broken / "cut.safetensors").write_bytes((broken / "nan" / "adapter_model.safetensors").read_bytes()[:100])


def _make_data(home: Path) -> None:
    """Tiny models with tokenizers, texts with and without labels, settings."""
    import test_train_hf as tests
    import transformers

    (home / "data").mkdir()
    tests.save_bert(home / "models" / "bert")
    tests.write(home / "data" / "classified.jsonl", tests.classified(80))
    tests.write(home / "data" / "more.jsonl", tests.classified(30, seed=1))
    rows = [f"{row['text']}\t{row['label']}" for row in tests.classified(60, seed=2)]
    (home / "data" / "classified.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    with (home / "data" / "documents.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["body"], *([row["text"]] for row in tests.documents(40))])
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "max_position_embeddings": 64,
        "num_key_value_heads": 1,
        "pad_token_id": None,
    }
    llama = transformers.LlamaConfig(**sizes, **tests.SMALL, attention_bias=True)
    places: dict[str, Any] = {
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    models = {
        "llama": transformers.LlamaForCausalLM(llama),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **places)),
    }
    with tests.hf_quiet():
        for name, model in models.items():
            tests.wide(model).save_pretrained(home / "models" / name)
            tests.byte_tokenizer(home / "models" / name, added="<end>" * (name == "llama"), eos_token="<end>")
    (home / "study.toml").write_text("ranks = [2]\nseeds = [3]\nlrs = [0.01]\nplanted_noise = 0.1\n")


def _make_studies(home: Path) -> None:
    """Studies of every task and method, and those of a calibration; seen from a folder where ``in`` is the inputs."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("in").symlink_to(home)
        for name, settings in STUDIES.items():
            for text in settings:
                (home / f"{name}.toml").write_text(text)
                _succeed("train", "--config", f"in/{name}.toml", "-o", f"in/studies/{name}", "--device", "cpu")
        _succeed("calibrate", "--quick", "--json", "-o", "in/calibration")
    for path in (home / "studies").rglob("*.png"):
        path.unlink()


def _succeed(*arguments: str) -> None:
    code, _, said = command(arguments)
    if code != "0":
        raise SystemExit(f"rankscope {' '.join(arguments)}: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calls = parser.add_subparsers(dest="call", required=True)
    places = {"inputs": ["FOLDER"], "run": ["FOLDER", "OUT"], "diff": ["OUT1", "OUT2"], "cases": ["FOLDER"]}
    for name, paths in places.items():
        call = calls.add_parser(name)
        for path in paths:
            call.add_argument(path, type=Path)
        if name in ("run", "diff"):
            call.add_argument("--only", default="*", metavar="PATTERN", help="cases whose names fit")
        if name == "diff":
            call.add_argument("--wording", action="store_true", help="show wording that differs, line by line")
            call.add_argument("--most", type=int, default=40, metavar="N", help="differences that are listed")
    given = vars(parser.parse_args())
    os.environ["HF_HUB_OFFLINE"] = "1"  # ids of models in files are not to be fetched
    torch.set_num_threads(1)
    match given["call"]:
        case "inputs":
            make_inputs(given["FOLDER"])
        case "run":
            run(given["FOLDER"], given["OUT"], given["only"])
        case "diff":
            sys.exit(diff(given["OUT1"], given["OUT2"], given["wording"], given["most"], given["only"]))
        case _:
            print("\n".join(all_cases(given["FOLDER"].resolve())))


if __name__ == "__main__":
    main()
