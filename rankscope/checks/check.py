"""``check``: findings about an adapter, or about a checkpoint that should contain one, worst first."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import msgspec
import torch

from rankscope.checks.adapter_facts import read_adapter_facts
from rankscope.checks.check_table import CHECKS, MERGE_CHECKS, Check, Facts, servers
from rankscope.checks.finding import LEVELS, Finding, Level
from rankscope.checks.merge_facts import read_merge_facts
from rankscope.checks.thresholds import Limits, resolve_thresholds
from rankscope.errors import ConfigError, prefix_errors
from rankscope.formats.opening import Opening
from rankscope.result import Result
from rankscope.table import Column, Table
from rankscope.track import Track

SCHEMA = "rankscope.check/1"


class CheckResult(Result, frozen=True, kw_only=True):
    """Findings, worst first.

    ``answer``: one sentence. ``next``: the command to run next. ``adapter``: that which the checkpoint at ``path``
    should contain, None where ``path`` is the adapter. ``thresholds``: as they were used.
    """

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    path: str
    base: str | None
    adapter: str | None
    server: str | None
    answer: str
    next: str
    findings: tuple[Finding, ...]
    thresholds: dict[str, float]

    def __getitem__(self, name: str) -> Finding:
        """The finding of that check; KeyError where it was not made."""
        for finding in self.findings:
            if finding.check == name:
                return finding
        raise KeyError(name)

    def of_level(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def has_errors(self) -> bool:
        """Whether anything is wrong, not only doubtful."""
        return bool(self.of_level("error"))

    def __repr__(self) -> str:
        return f"CheckResult({self.answer!r})"

    def _repr_html_(self) -> str:
        from rankscope.analysis.display import html_table

        return html_table(self.answer, finding_table(self), [f"next: {self.next}"])


def check(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    server: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    alpha: float | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
) -> CheckResult:
    """What is wrong with an adapter; or, with ``adapter``, whether the checkpoint at ``path`` contains it.

    Args:
        path: an adapter in any format that is read, or a checkpoint where ``adapter`` is given.
        base: the model that was tuned; with it names, shapes and ‖ΔW‖/‖W‖ are checked.
        adapter: the adapter that a merged checkpoint should contain.
        server: also check what this server takes ("vllm").
        thresholds: values in place of those in ``checks.thresholds.THRESHOLDS``, by name.
        alpha: α where the file has none.
        device: where updates are computed.
        track: wraps the list of layers and may show progress.

    Raises:
        ConfigError: an unknown threshold or server, full weights without ``adapter``, ``adapter`` without ``base``.
        FormatError: a file that is not there or cannot be read as tensors. What is wrong *in* a file is a finding.
    """
    return examine(path, Opening(base, alpha, None, device), adapter, server, thresholds, track)


def examine(
    path: str | os.PathLike[str],
    opening: Opening,
    adapter: str | os.PathLike[str] | None = None,
    server: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    track: Track = iter,
) -> CheckResult:
    """``check`` with its opening.

    Raises:
        ConfigError, FormatError: as for ``check``.
    """
    limits = resolve_thresholds(thresholds)
    if server is not None and server not in servers():
        raise ConfigError(f"no server is called {server!r}; there are {', '.join(servers())}")
    if adapter is not None and server is not None:
        raise ConfigError("what a server takes is asked of an adapter, not of a merged checkpoint")
    rows: Mapping[str, Check]  # type: ignore[type-arg]
    if adapter is None:
        facts = read_adapter_facts(path, opening, track)
        chosen = [row for row in CHECKS if row.server in ("", server)]
        findings, rows = _run(chosen, facts, limits), {row.name: row for row in chosen}
        base = opening.base if facts.base is None else facts.base.path
    else:
        merge = read_merge_facts(path, adapter, opening, track)
        findings, rows = _run(MERGE_CHECKS, merge, limits), {row.name: row for row in MERGE_CHECKS}
        base = opening.base
    worst = next((finding for finding in findings if finding.level != "ok"), None)
    names = {"path": path, "base": base or "BASE", "adapter": adapter or "ADAPTER"}
    return CheckResult(
        path=str(path),
        base=None if base is None else str(base),
        adapter=None if adapter is None else str(adapter),
        server=server,
        answer=_answer(str(path), adapter, findings),
        next=_next_command(worst, rows, {name: shlex.quote(str(value)) for name, value in names.items()}, adapter),
        findings=tuple(findings),
        thresholds=limits,
    )


def _run(checks: Sequence[Check[Facts]], facts: Facts, limits: Limits) -> list[Finding]:
    """The findings, worst first and within a level in the order of the table."""
    findings = []
    for row in checks:
        with prefix_errors(f"check {row.name}"):
            finding = row.examine(facts, limits)
        if finding is not None:
            findings.append(msgspec.structs.replace(finding, check=row.name))
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _answer(path: str, adapter: str | os.PathLike[str] | None, findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    worst = findings[0] if findings else None
    if adapter is not None:
        return _merge_answer(path, str(adapter), {finding.check: finding for finding in findings})
    if worst is not None and worst.level in ("error", "warning"):
        first = ", first" if counts["error"] + counts["warning"] > 1 else ""
        return f"{path}: {_count(counts)}{first}: {worst.says}"
    known = {finding.check: finding for finding in findings}
    if known["readable"].level == "unchecked":
        return f"{path}: nothing can be said about its updates: {known['readable'].says}"
    parts = [known[name].says for name in ("readable", "size") if name in known and known[name].level == "ok"]
    unknown = [finding.check for finding in findings if finding.level == "unchecked"]
    open_questions = f"; not known: {', '.join(unknown)}" if unknown else ""
    return f"{path}: nothing is wrong in {_plural(counts['ok'], 'check')} ({'; '.join(parts)}){open_questions}"


def _merge_answer(path: str, adapter: str, findings: Mapping[str, Finding]) -> str:
    scale, residual = findings.get("merge-scale"), findings.get("merge-residual")
    if scale is None or residual is None or scale.value is None or residual.value is None:
        reason = next(iter(findings.values())) if scale is None else scale
        return f"{path}: whether it contains {adapter} cannot be said: {reason.says}"
    precision = f"to {_percent(residual.value)} of the update (rounding alone leaves {_percent(residual.limit or 0)})"
    if scale.level != "error" and residual.level != "ok":
        return f"{path} contains {scale.value:.3f} times {adapter} and more: {residual.says}"
    if scale.level == "ok":
        return f"{path} contains {adapter}: {scale.value:.3f} times, {precision}"
    if scale.level == "error":
        return f"{path} does not contain {adapter} whole: {scale.says}"
    return f"{path} contains {scale.value:.3f} times {adapter}, {precision}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _count(counts: Mapping[Level, int]) -> str:
    return ", ".join(_plural(counts[level], level) for level in LEVELS[:2] if counts[level])


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _next_command(
    worst: Finding | None,
    rows: Mapping[str, Check],  # type: ignore[type-arg]
    names: Mapping[str, str],
    adapter: object,
) -> str:
    if worst is None:
        return ("rankscope inspect {path}" if adapter else "rankscope spectrum {path}").format(**names)
    if worst.level == "unchecked" and adapter is None:
        return "rankscope check {path} --base BASE".format(**names)
    return rows[worst.check].command.format(**names)


def finding_table(result: CheckResult) -> Table:
    """A row for each finding."""
    columns: Iterable[Column[Finding]] = [
        Column.of(lambda finding: finding.level, csv="level"),
        Column.of(lambda finding: finding.check, csv="check"),
        Column.of(lambda finding: finding.value, csv="value"),
        Column.of(lambda finding: finding.limit, csv="limit"),
        Column.of(lambda finding: finding.says, csv="says"),
        Column.of(lambda finding: finding.advice, csv="advice"),
        Column.of(lambda finding: len(finding.layers), csv="layers"),
    ]
    return Table.of(columns, result.findings, "csv", result.answer, name="findings")
