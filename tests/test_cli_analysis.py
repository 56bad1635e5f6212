"""``rankscope spectrum`` and ``compare``: exact tables, JSON, CSV, plots, exit codes; and what imports load."""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
from adapters import PREFIX, linear, write_adapter, write_checkpoint
from command_line import run
from makers import normal
from torch import Tensor

import rankscope
from rankscope.analysis import worker_threads as workers
from rankscope.cli import COMMANDS, main, output
from rankscope.table import format_p_value
from rankscope.train.config import StudyConfig
from rankscope.train.study import run_study

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def factors(module: str, columns: list[list[float]], rows: list[list[float]]) -> dict[str, Tensor]:
    """B from its columns and A from its rows."""
    return {
        f"{PREFIX}{module}.lora_B.weight": torch.tensor(columns).T.contiguous(),
        f"{PREFIX}{module}.lora_A.weight": torch.tensor(rows),
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """σ = (3, 1) in block.q, (1) and a zero in block.v; scale 1."""
    q = factors("block.q", [[3.0, 0, 0, 0], [0, 1.0, 0, 0]], [[1.0, 0, 0], [0, 1.0, 0]])
    v = factors("block.v", [[1.0, 0, 0, 0], [0, 0, 0, 0]], [[1.0, 0, 0], [0, 1.0, 0]])
    return write_adapter(tmp_path / "one", {**q, **v}, r=2, lora_alpha=2)


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """block.q alone: one direction, at 45° to the first of the other on the left, the same on the right; σ = 3."""
    half = 3 / math.sqrt(2)
    return write_adapter(tmp_path / "two", factors("block.q", [[half, half, 0, 0]], [[1.0, 0, 0]]), r=1, lora_alpha=1)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    base = {"fc.weight": normal(48, 40).float(), "norm.weight": normal(40).float()}
    tuned = {name: weight + 0.01 * normal(*weight.shape, seed=5).float() for name, weight in base.items()}
    return (
        write_checkpoint(tmp_path / "base" / "model.safetensors", base).parent,
        write_checkpoint(tmp_path / "tuned" / "model.safetensors", tuned).parent,
    )


def test_spectrum_table(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand for (3, 1): stable 10/9, participation 100/82, entropy exp(H(¾, ¼)) = 1.755, k90 1, norm √10."""
    code, out, err = run(capsys, "spectrum", adapter)
    assert (code, err) == (0, "")
    assert out == (
        "layer        out × in  r  numerical  stable  participation  entropy  k90   norm\n"
        "block.q         4 × 3  2          2   1.111           1.22    1.755    1  3.162\n"
        "block.v         4 × 3  2          1       1              1        1    1      1\n"
        "median; all                     1.5   1.056           1.11    1.377    1  3.317\n"
    )


def test_compare_table(adapter: Path, turned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: φ = ½ of chance ¼ in four dimensions, sd ¼, p = 1 − (2/π)(π/4 + ½) = .18; φ = 1 of ⅓ in three.

    Norms √10 and 3, inner product 9/√2: cosine .671, ‖a − b‖² = 19 − 18/√2, its root over √10 .792.
    """
    code, out, err = run(capsys, "compare", adapter, turned, "--top", 1)
    assert code == 0
    assert out.splitlines()[:2] == [
        "layer        k  φ left (chance)    z     p  φ right (chance)    z       p  cosine  rel. diff.  ‖a‖/‖b‖",
        "block.q      1    0.500 (0.250)  1.0  0.18     1.000 (0.333)  2.2  <1e-12   0.671       0.792    1.054",
    ]
    assert "1 layer only in a: block.v" in err


def test_full_updates_have_noise_columns(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = checkpoints
    code, out, err = run(capsys, "spectrum", tuned, "--base", base)
    assert code == 0
    header = out.splitlines()[0]
    for column in ("noise k90", "MP", "GD"):
        assert column in header
    assert "skipped 1 tensor (norm.weight: one-dimensional" in err
    assert run(capsys, "spectrum", tuned, "--base", base, "--quiet")[2] == ""
    assert "skipped norm.weight: one-dimensional" in run(capsys, "spectrum", tuned, "--base", base, "-v")[2]


def test_spectrum_json(adapter: Path, turned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "spectrum", adapter, "--json", "--top", 1)
    assert code == 0
    value = json.loads(out)
    assert value == rankscope.spectrum(adapter, top=1).to_json()
    assert value["schema"] == "rankscope.spectrum/1"
    assert value["layers"][0]["singular_values"] == pytest.approx([3.0])
    several = json.loads(run(capsys, "spectrum", adapter, turned, "--json")[1])
    assert several["schema"] == "rankscope.spectrum-list/1"
    assert [result["path"] for result in several["results"]] == [str(adapter), str(turned)]


def test_compare_json(adapter: Path, turned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compare", adapter, turned, "--json")
    assert code == 0
    assert json.loads(out) == rankscope.compare(adapter, turned).to_json()
    factors_only = json.loads(run(capsys, "compare", adapter, turned, "--of", "A", "--json")[1])
    assert factors_only["of"] == "A"
    assert factors_only["layers"][0]["left"] is None


def test_the_number_of_workers_changes_nothing(
    adapter: Path, turned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int | None] = []
    count = workers.worker_count
    monkeypatch.setattr(workers, "worker_count", lambda n, device: counts.append(n) or count(n, device))
    for command in (["spectrum", adapter], ["compare", adapter, turned]):
        one = run(capsys, *command, "--json", "--workers", 1)
        assert run(capsys, *command, "--json", "--workers", 3) == run(capsys, *command, "--json") == one
    assert counts == [1, 3, None] * 2


def test_csv(adapter: Path, turned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(run(capsys, "spectrum", adapter, turned, "--csv")[1])))
    assert [(row["path"], row["layer"]) for row in rows] == [
        (str(adapter), "block.q"),
        (str(adapter), "block.v"),
        (str(turned), "block.q"),
    ]
    assert float(rows[0]["stable_rank"]) == pytest.approx(10 / 9)
    assert rows[0]["noise_k90"] == rows[0]["rounding_edge"] == ""
    (row,) = csv.DictReader(io.StringIO(run(capsys, "compare", adapter, turned, "--csv", "--top", 1)[1]))
    assert float(row["left_overlap"]) == pytest.approx(0.5)
    assert float(row["left_expected"]) == pytest.approx(0.25)
    assert float(row["right_overlap"]) == pytest.approx(1)
    (row,) = csv.DictReader(io.StringIO(run(capsys, "compare", adapter, turned, "--csv", "--of", "B")[1]))
    assert row["right_overlap"] == row["cosine"] == ""
    assert float(row["left_overlap"]) == pytest.approx(0.5)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots(suffix: str, adapter: Path, turned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("spectrum", adapter, turned), ("compare", adapter, turned), ("compare", adapter, adapter)):
        path = tmp_path / f"plot.{suffix}"
        code, out, err = run(capsys, *arguments, "--plot", path)
        assert code == 0
        assert out
        assert f"wrote {path}" in err
        assert path.read_bytes().startswith(MAGIC[suffix])
        path.unlink()


def test_layer_of_a_plot(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.png"
    assert run(capsys, "compare", adapter, adapter, "--plot", path, "--layer", "block.v")[0] == 0
    assert path.exists()
    code, out, err = run(capsys, "compare", adapter, adapter, "--plot", path, "--layer", "block.x")
    assert (code, out, "no layer 'block.x'" in err) == (1, "", True)


def test_layers_option(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "spectrum", adapter, "--layers", "v")[1]
    assert "block.v" in out
    assert "block.q" not in out
    both = run(capsys, "spectrum", adapter, "--layers", "*.q", "--layers", "*.v")[1]
    assert "block.q" in both
    assert "block.v" in both


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "study"
    run_study(StudyConfig(task="planted", ranks=(1, 4), steps=5, evaluations=0), folder)
    return folder


def test_a_study_stands_for_its_runs(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = json.loads(run(capsys, "spectrum", study, "--json", "--plot", tmp_path / "p.png")[1])
    names = [Path(result["path"]).name for result in value["results"]]
    assert [name.split("-lr")[0] for name in names] == ["lora-r1", "lora-r4", "full"]
    out = run(capsys, "spectrum", study)[1]
    assert sum(line.startswith(str(study)) for line in out.splitlines()) == 3
    lora, full = study / "runs" / names[1], study / "runs" / names[2]
    assert run(capsys, "compare", lora, full)[0] == 0


def test_a_study_without_runs(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "study.json").write_text((study / "study.json").read_text())
    code, _, err = run(capsys, "spectrum", tmp_path / "new")
    assert code == 1
    assert "no run of this study has ended" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["spectrum"],
        ["spectrum", "ADAPTER", "--json", "--csv"],
        ["spectrum", "ADAPTER", "--top", "0"],
        ["spectrum", "ADAPTER", "--plot", "x.jpg"],
        ["spectrum", "ADAPTER", "--nonsense"],
        ["spectrum", "ADAPTER", "--workers", "0"],
        ["compare", "ADAPTER"],
        ["compare", "ADAPTER", "ADAPTER", "--json", "--csv"],
        ["compare", "ADAPTER", "ADAPTER", "--of", "C"],
        ["compare", "ADAPTER", "ADAPTER", "--layer", "block.q"],
        ["compare", "ADAPTER", "ADAPTER", "--plot", "x"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *(adapter if word == "ADAPTER" else word for word in arguments))
    assert code == 2
    assert out == ""
    assert "Error:" in err


def broken(folder: Path, kind: str) -> Path:
    """An adapter with one thing wrong."""
    tensors = linear("block.q")
    key = f"{PREFIX}block.q.lora_B.weight"
    if kind == "nan":
        tensors[key][0, 0] = math.nan
    elif kind == "half":
        del tensors[key]
    elif kind == "shapes":
        tensors[key] = tensors[key][:, :1].contiguous()
    write_adapter(folder, tensors)
    weights = folder / "adapter_model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "noise":
        weights.write_bytes(bytes(range(256)) * 4)
    elif kind == "config":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "missing":
        weights.unlink()
    return folder


@pytest.mark.parametrize("command", ["spectrum", "compare"])
@pytest.mark.parametrize("kind", ["nan", "half", "shapes", "cut", "noise", "config", "missing"])
def test_broken_files_are_one_line(
    command: str, kind: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = broken(tmp_path / "bad", kind)
    code, out, err = run(capsys, command, bad, *([adapter] if command == "compare" else []))
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("rankscope: ")
    assert str(bad) in err
    if kind == "nan":
        assert "block.q" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectrum", "nowhere"], "nowhere: no such file"),
        (["spectrum", "ADAPTER", "--layers", "x"], "no layer fits 'x'"),
        (["spectrum", "ADAPTER", "--device", "cuda:77"], "cuda:77"),
        (["spectrum", "ADAPTER", "--plot", "FILE/plot.png"], "cannot be written"),
        (["compare", "ADAPTER", "nowhere"], "nowhere: no such file"),
        (["compare", "ADAPTER", "OTHER"], "no layer in common"),
        (["compare", "ADAPTER", "ADAPTER", "--plot", "FILE/plot.png"], "cannot be written"),
    ],
)
def test_failures_are_1(
    arguments: list[str], message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    other = write_adapter(tmp_path / "other", linear("elsewhere"))
    words = {"ADAPTER": str(adapter), "OTHER": str(other), "FILE/plot.png": str(tmp_path / "file" / "plot.png")}
    code, _, err = run(capsys, *(words.get(word, word) for word in arguments))
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(rankscope.RankscopeError):
        main(["spectrum", str(tmp_path / "nowhere"), "--debug"])


@pytest.mark.parametrize("command", ["spectrum", "compare"])
def test_help_has_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert out.split("Examples:")[1].count(f"rankscope {command}") >= 2
    for option in ("--json", "--csv", "--plot", "--layers", "--top", "--base", "--device", "--debug", "--quiet"):
        assert option in out


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = write_adapter(tmp_path / "adapter", linear("block\x1b[2J.q"))
    code, out, _ = run(capsys, "spectrum", hostile)
    assert code == 0
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(("p", "shown"), [(0.0, "<1e-12"), (9e-13, "<1e-12"), (3.21e-5, "3.2e-05"), (0.25, "0.25")])
def test_probabilities(p: float, shown: str) -> None:
    assert format_p_value(p) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_loses_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["model.layers.0.self_attn.q_proj", "12.345", "0.001 (0.002)"], ["median", "3", ""]]
    output.print_rows(["layer", "k90", "overlap (chance)"], rows, totals=1)
    header, first, rule, last = screen.getvalue().splitlines()
    assert "layer" in header
    assert first == "…elf_attn.q_proj  12.345     0.001 (0.002)"
    assert set(rule) == {"─"}
    assert last.split() == ["median", "3"]


def test_progress_shows_on_a_slow_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(output.progress_tracker(quiet=False, what="fast")([1, 2])) == [1, 2]
    assert "fast" not in screen.getvalue()
    monkeypatch.setattr(output, "PROGRESS_DELAY", -1.0)
    assert list(output.progress_tracker(quiet=True, what="quiet")([1, 2])) == [1, 2]
    assert "quiet" not in screen.getvalue()
    assert list(output.progress_tracker(quiet=False, what="layers")([1, 2])) == [1, 2]
    assert "layers" in screen.getvalue()
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    assert list(output.progress_tracker(quiet=False, what="layers")([1, 2])) == [1, 2]
    assert pipe.getvalue() == ""


HEAVY = {"torch", "scipy", "matplotlib", "transformers", "numpy", "rich", "safetensors"}


@pytest.mark.parametrize(
    "code",
    [
        "import rankscope",
        "import rankscope; dir(rankscope)",
        "from rankscope.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from rankscope.cli import main\ntry: main(['spectrum', '--help'])\nexcept SystemExit: pass",
        "from rankscope.cli import main\ntry: main(['compare', '--help'])\nexcept SystemExit: pass",
        "from rankscope.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_what_is_not_used_is_not_loaded(code: str) -> None:
    report = f"\nimport sys, json\nprint(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    root = Path(rankscope.__file__).parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=root, timeout=120
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == []


def test_drawing_needs_no_pyplot_and_no_display(adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rankscope.cli import main\n"
        f"try: main(['spectrum', {str(adapter)!r}, '--plot', {str(tmp_path / 'p.png')!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(rankscope.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root, timeout=120)


def test_every_name_of_the_package_is_there() -> None:
    for name in rankscope.__all__:
        if name != "__version__":
            assert getattr(rankscope, name) is not None
    assert {"open", "spectrum", "compare", "LowRank", "Dense", "Spectrum", "Subspace", "Study", "Bank"} <= set(
        dir(rankscope)
    )
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rankscope.nonsense  # type: ignore[attr-defined]


def test_every_command_has_its_public_function() -> None:
    """train and report are subpackages, so that their functions have other names."""
    functions = {name: {"train": "run_study", "report": "hypothesis"}.get(name, name) for name in COMMANDS}
    missing = {name for name, function in functions.items() if function not in rankscope.__all__}
    assert not missing
    assert all(callable(getattr(rankscope, function)) for function in functions.values())


def test_every_command_names_its_module() -> None:
    for name, entry in COMMANDS.items():
        assert isinstance(import_module(entry.module).command, click.Command), name


def test_functions_of_surgery_name_the_arguments_they_share() -> None:
    for name in ("resize", "extract", "merge", "unmerge", "convert", "average", "subtract", "merge_adapters"):
        parameters = inspect.signature(getattr(rankscope, name)).parameters
        assert {"out", "device", "track", "command"} <= parameters.keys()
        assert "Raises:" in inspect.getdoc(getattr(rankscope, name))


def test_verbs_stay_verbs_whatever_is_imported() -> None:
    """No submodule has the name of a function: importing one would put it in the function's place."""
    root = Path(rankscope.__file__).parent
    modules = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not modules & set(rankscope.__all__)
    assert callable(rankscope.spectrum)
    assert callable(rankscope.compare)
    assert callable(rankscope.run_study)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_sentence(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", linear("q", out=4, n=5, r=2, seed=1))
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rankscope", "spectrum", str(tmp_path / "a"), "--csv"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert "cannot be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


@pytest.mark.parametrize("path", ["", "x" * 300])
def test_a_path_that_cannot_be_is_one_sentence(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["spectrum", path])
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_meta_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "a", linear("q", out=4, n=5, r=2, seed=1))
    with pytest.raises(SystemExit) as ended:
        main(["spectrum", str(tmp_path / "a"), "--device", "meta"])
    assert ended.value.code == 1
    assert "meta" in capsys.readouterr().err


def test_a_sketch_prints_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = normal(700, 660).float()
    change = normal(700, 660, seed=1).float() * 1e-3 + normal(700, 1, seed=2).float() @ normal(1, 660, seed=3).float()
    origin = write_checkpoint(tmp_path / "base.safetensors", {"fc.weight": base})
    tuned = write_checkpoint(tmp_path / "tuned.safetensors", {"fc.weight": base + change})
    ask = ("spectrum", tuned, "--base", origin, "--sketch", 4)
    code, out, err = run(capsys, *ask, "--plot", tmp_path / "a.png")
    assert code == 0
    header, row, last = (line.split() for line in out.splitlines())
    assert "1 of 1 layers were sketched" in err
    assert (tmp_path / "a.png").read_bytes().startswith(MAGIC["png"])
    low, high = map(float, row[header.index("entropy") - 1].split("–"))  # the cell of r is empty
    code, out, _ = run(capsys, "spectrum", tuned, "--base", origin, "--json")
    measures = json.loads(out)["layers"][0]["measures"]
    assert low <= measures["entropy_rank"] <= high
    assert float(row[header.index("stable") - 1]) == pytest.approx(measures["stable_rank"], rel=1e-3)
    assert "–" in " ".join(last)
    code, out, _ = run(capsys, *ask, "--csv")
    (cells,) = csv.DictReader(io.StringIO(out))
    assert cells["entropy_rank"] == ""  # its bounds are in columns of their own
    assert (float(cells["entropy_rank_low"]), float(cells["entropy_rank_high"])) == pytest.approx((low, high), rel=1e-3)
    assert float(cells["stable_rank_low"]) <= measures["stable_rank"] <= float(cells["stable_rank_high"])
    assert "k90_low" not in run(capsys, "spectrum", tuned, "--base", origin, "--csv")[1]
    assert float(cells["stable_rank"]) == pytest.approx(measures["stable_rank"], rel=1e-3)
    code, _, err = run(capsys, *ask, "--report", tmp_path / "a.html")
    assert code == 2
    assert "--sketch leaves some open" in err
