"""Findings in SARIF 2.1.0, the format in which code hosts take them (OASIS, sarif-v2.1.0-os)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rankscope.checks.check import CheckResult
from rankscope.checks.check_table import CHECKS, MERGE_CHECKS
from rankscope.checks.finding import Finding, Level

VERSION = "2.1.0"
SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
# SARIF's kind and level of a result; a level other than "none" is allowed with the kind "fail" alone.
KINDS: Mapping[Level, tuple[str, str]] = {
    "error": ("fail", "error"),
    "warning": ("fail", "warning"),
    "unchecked": ("open", "none"),
    "ok": ("pass", "none"),
}
SHOWN_LAYERS = 100  # of a finding; a code host cuts longer lists


def to_sarif(result: CheckResult, version: str) -> dict[str, Any]:
    """One run with a rule for each finding; ``version`` is rankscope's."""
    asks = {row.name: row.asks for row in CHECKS} | {row.name: row.asks for row in MERGE_CHECKS}
    rules = [
        {"id": finding.check, "shortDescription": {"text": asks.get(finding.check, finding.check)}}
        for finding in result.findings
    ]
    return {
        "$schema": SCHEMA_URI,
        "version": VERSION,
        "runs": [
            {
                "tool": {"driver": {"name": "rankscope", "version": version, "rules": rules}},
                "results": [_result(finding, i, result.path) for i, finding in enumerate(result.findings)],
                "properties": {"answer": result.answer, "next": result.next},
            }
        ],
    }


def _result(finding: Finding, rule: int, path: str) -> dict[str, Any]:
    kind, level = KINDS[finding.level]
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(path)}}}
    if finding.layers:
        location["logicalLocations"] = [
            {"fullyQualifiedName": name, "kind": "member"} for name in finding.layers[:SHOWN_LAYERS]
        ]
    return {
        "ruleId": finding.check,
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": f"{finding.says}. {finding.advice}".strip().removesuffix(".") + "."},
        "locations": [location],
    }


def _uri(path: str) -> str:
    """A relative path as a relative reference, an absolute one as a file URI."""
    return Path(path).as_uri() if Path(path).is_absolute() else quote(Path(path).as_posix())
