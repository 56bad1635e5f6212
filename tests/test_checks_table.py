"""The tables of checks and thresholds: a row from outside works everywhere, and each row says why."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from adapters import linear, write_adapter, write_checkpoint
from command_line import run
from torch import ones

import rankscope
from rankscope.checks.adapter_facts import AdapterFacts
from rankscope.checks.check import CheckResult, check, finding_table
from rankscope.checks.check_table import CHECKS, MERGE_CHECKS, Check
from rankscope.checks.finding import Finding, report_error, report_warning
from rankscope.checks.sarif import to_sarif
from rankscope.checks.thresholds import THRESHOLDS, parse_settings, resolve_thresholds
from rankscope.errors import ConfigError, FormatError


def find_many_updates(facts: AdapterFacts, limits: object) -> Finding:
    return report_error(f"it has {len(facts.layers)} updates", "do nothing", len(facts.layers), 0, ["block.q"])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_a_check_from_outside_is_one_row(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the result, the terminal, JSON, SARIF, the table and the exit code."""
    monkeypatch.chdir(adapter.parent)
    row: Check[AdapterFacts] = Check("outside", "is it from outside?", find_many_updates, "rankscope inspect {path}")
    CHECKS.append(row)
    try:
        code, out, _ = run(capsys, "check", "adapter")
        assert code == 3
        assert out.splitlines()[0] == "adapter: 1 error: it has 1 updates"
        assert out.splitlines()[1] == "next: rankscope inspect adapter"
        assert "ERROR   outside" in out
        result = CheckResult.from_json(json.loads(run(capsys, "check", "adapter", "--json")[1]))
        assert result["outside"].value == 1
        assert result == check("adapter")
        sarif = json.loads(run(capsys, "check", "adapter", "--sarif")[1])
        assert sarif["runs"][0]["tool"]["driver"]["rules"][0]["shortDescription"]["text"] == "is it from outside?"
        assert finding_table(result).rows[0][:3] == ["error", "outside", 1]
    finally:
        CHECKS.remove(row)
    assert run(capsys, "check", "adapter")[0] == 0


def test_rows_have_distinct_names_and_questions() -> None:
    rows = [(row.name, row.asks, row.command) for row in CHECKS] + [(r.name, r.asks, r.command) for r in MERGE_CHECKS]
    assert len({name for name, _, _ in rows}) == len(rows)
    assert all(asks.endswith("?") for _, asks, _ in rows)
    assert all(command.startswith("rankscope ") for *_, command in rows)
    for *_, command in rows:
        command.format(path="p", base="b", adapter="a")


def test_thresholds() -> None:
    assert len({row.name for row in THRESHOLDS}) == len(THRESHOLDS)
    assert all(row.reason and row.value > 0 for row in THRESHOLDS)
    assert resolve_thresholds({"scale_high": 40})["scale_high"] == 40
    assert resolve_thresholds(parse_settings(["scale_high = 40", "size_low=1e-6"]))["size_low"] == 1e-6
    for settings in ({"scale_hihg": 3.0}, {"scale_high": math.nan}, {"scale_high": -1.0}):
        with pytest.raises(ConfigError, match="scale_high"):
            resolve_thresholds(settings)
    with pytest.raises(ConfigError, match="no threshold is called 'x'; there are scale_low"):
        resolve_thresholds({"x": 1.0})
    for text in ("scale_high", "scale_high=much"):
        with pytest.raises(ConfigError, match="is no NAME=VALUE"):
            parse_settings([text])


@pytest.mark.parametrize("name", ["scale_high", "scale_low"])
def test_a_threshold_moves_its_finding(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpha = 40 if name == "scale_high" else 0.01
    folder = write_adapter(tmp_path / "adapter", lora_alpha=alpha)
    assert check(folder)["scale"].level == "warning"
    moved = 1000 if name == "scale_high" else 0.001
    assert check(folder, thresholds={name: moved})["scale"].level == "ok"
    result = json.loads(run(capsys, "check", folder, "--json", "--set", f"{name}={moved}")[1])
    assert result["thresholds"][name] == moved


def test_the_command_lists_its_thresholds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "--thresholds")
    assert code == 0
    assert all(row.name in out for row in THRESHOLDS)
    assert max(map(len, out.splitlines())) <= 80


def test_no_line_is_longer_than_80_columns(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapter.parent)
    out = run(capsys, "check", "adapter", "--for", "vllm")[1]
    assert max(map(len, out.splitlines())) <= 80
    levels = [line.split()[0] for line in out.split("\n\n")[1].splitlines() if not line.startswith(" ")]
    assert levels == sorted(levels, key=["ERROR", "warning", "unknown", "ok"].index)


def test_sarif_has_what_the_standard_requires(adapter: Path) -> None:
    """sarif-schema-2.1.0.json: version, runs; tool.driver.name; message of each result; a level only with "fail"."""
    result = check(adapter)
    log = to_sarif(result, "1.0")
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    driver = only["tool"]["driver"]
    assert driver["name"] == "rankscope"
    assert len({rule["id"] for rule in driver["rules"]}) == len(driver["rules"])
    assert len(only["results"]) == len(result.findings)
    for found, finding in zip(only["results"], result.findings, strict=True):
        assert found["message"]["text"].startswith(finding.says)
        assert driver["rules"][found["ruleIndex"]]["id"] == found["ruleId"] == finding.check
        assert found["kind"] in {"pass", "open", "fail"}
        assert found["level"] in {"none", "warning", "error"}
        assert (found["level"] == "none") == (found["kind"] != "fail")
        assert found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")
    json.dumps(log, allow_nan=False)


def test_what_cannot_be_read_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Usage and input faults have the exit codes that they have everywhere."""
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", {"block.q.weight": ones(5, 7)})
    adapter = write_adapter(tmp_path / "adapter")
    broken = write_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 30)
    for arguments, code, message in (
        ((tmp_path / "nothing",), 1, "no such file"),
        ((broken,), 1, "not a whole safetensors file"),
        ((adapter, "--base", tmp_path / "nothing"), 1, "no such file"),
        ((base,), 1, "holds full weights, no adapter"),
        ((base, "--base", base), 1, "holds full weights, no adapter"),
        ((base, "--adapter", adapter), 1, "give it with --base"),
        ((adapter, "--for", "nobody"), 1, "no server is called 'nobody'; there are vllm"),
        ((base, "--adapter", adapter, "--base", base, "--for", "vllm"), 1, "asked of an adapter"),
        ((adapter, "--set", "x=1"), 1, "no threshold is called 'x'"),
        ((adapter, "--json", "--sarif"), 2, "choose one"),
    ):
        ended, out, err = run(capsys, "check", *arguments)
        assert (ended, out) == (code, ""), arguments
        assert message in " ".join(err.split())
    with pytest.raises(FormatError):
        rankscope.check(tmp_path / "nothing")


def test_a_missing_configuration_is_a_finding(tmp_path: Path) -> None:
    """The tensors can be read; that they mean nothing without their configuration is what is wrong."""
    folder = write_adapter(tmp_path / "adapter", linear("block.q"))
    (folder / "adapter_config.json").unlink()
    result = check(folder)
    assert result["readable"].level == "error"
    assert "no adapter_config.json" in result["readable"].says
    (folder / "adapter_config.json").write_text("{")
    assert "not valid JSON" in check(folder)["readable"].says


def test_levels_are_worst_first() -> None:
    levels = [report_warning("w", "").level, report_error("e", "").level]
    assert levels == ["warning", "error"]
