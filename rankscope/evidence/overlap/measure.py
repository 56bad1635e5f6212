"""Do runs of another rank, or of another seed, learn the same directions (Hu et al. 2021, §7.2)? Beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import msgspec
import torch

from rankscope.analysis.layer_comparison import MatrixKind
from rankscope.evidence.material import Material, group_by_rank
from rankscope.evidence.overlap.pairs import ALIKE_Z, RunComparison, RunUpdates, SideOverlap, compare_runs
from rankscope.formats.abstract_store import Store
from rankscope.formats.store import open as open_store
from rankscope.formats.study_layout import INITIAL_FOLDER
from rankscope.train.config import make_generator
from rankscope.train.results import RunResult
from rankscope.updates import LowRank, Update
from rankscope.verdict import MAX_CORRECTED_P, Answer, MissingEvidenceError, Verdict, answer_above, format_interval

TYPICAL_LOW_RANK = 8
"""The smaller of the two ranks that the paper compares; the nearest one below the highest stands for it."""
SHARED_OVERLAP = 0.5
"""Overlap above which Hu et al. (2021, §7.2) call a direction shared."""
MATRIX_SYMBOLS = {"update": "ΔW", "A": "A", "B": "B"}


class Overlap(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """``ranks``: a low against the highest rank, the same seed in both, every seed that both have; None with one rank.
    ``seeds``: at each rank with several seeds, every two of them. ``random``: beside each of these, one pair of
    Gaussian factors of the same shapes. ``of``: which matrices were compared."""

    of: MatrixKind
    ranks: RunComparison | None
    seeds: tuple[RunComparison, ...]
    random: tuple[RunComparison, ...]


def measure_overlap(material: Material) -> Overlap:
    """Compare the adapters of a study, at the best rate of each rank, across ranks and across seeds.

    ``material.of`` says what is compared: "update" is ΔW on both sides; "A" the right singular vectors of A, the
    paper's literal form; "B" the left ones of B.

    Raises:
        MissingEvidenceError: there is nothing to compare: one rank of one seed.
        RankscopeError: no layer can be compared.
    """
    ranks = group_by_rank(material.lora_rows())
    across = _same_seed(ranks)
    repeated = [rank for rank, rows in ranks.items() if len(rows) > 1]
    if not across and not repeated:
        raise MissingEvidenceError("one LoRA run has no other to compare with; train more with --ranks or --seeds")
    seeds, random = [], []
    for rank in material.track(repeated):
        runs = [read_run_updates(material, row) for row in ranks[rank]]
        seeds.append(compare_runs(list(combinations(runs, 2)), material.of))
        random.append(compare_runs([random_pair(runs[0].updates, rank)], material.of))
    pairs = [(read_run_updates(material, a), read_run_updates(material, b)) for a, b in across]
    across_ranks = compare_runs(pairs, material.of) if pairs else None
    return Overlap(of=material.of, ranks=across_ranks, seeds=tuple(seeds), random=tuple(random))


def _same_seed(ranks: Mapping[int, Sequence[RunResult]]) -> list[tuple[RunResult, RunResult]]:
    """The rank nearest ``TYPICAL_LOW_RANK`` below the highest against the highest, for every seed that both have."""
    if len(ranks) < 2:
        return []
    high = max(ranks)
    low = min((rank for rank in ranks if rank != high), key=lambda rank: (abs(rank - TYPICAL_LOW_RANK), rank))
    others = {row.record.run.seed: row for row in ranks[high]}
    return [(row, others[row.record.run.seed]) for row in ranks[low] if row.record.run.seed in others]


def read_run_updates(material: Material, row: RunResult) -> RunUpdates:
    """What a run learned, on the layers that are compared, with the factors it began with where they were kept."""
    folder = material.study.path(row.record.run) / INITIAL_FOLDER
    return RunUpdates(
        row.record.run.name,
        row.record.run.rank or 0,
        _updates(material, material.store(row)),
        _updates(material, open_store(folder)) if folder.is_dir() else {},
        row.choice is not None and row.choice.edge is not None,
    )


def _updates(material: Material, store: Store) -> dict[str, Update]:
    return {name: store[name].to(material.device) for name in material.layers if name in store}


def random_pair(like: Mapping[str, Update], rank: int) -> tuple[RunUpdates, RunUpdates]:
    """Two runs that learned nothing: Gaussian factors of the shapes of ``like``, whose directions are uniform."""

    def draw(part: str) -> RunUpdates:
        updates = {name: _gaussian(update, rank, part, name) for name, update in like.items()}
        return RunUpdates(f"random {part}", rank, updates)

    return draw("a"), draw("b")


def _gaussian(like: Update, rank: int, *parts: str) -> LowRank:
    out, into = like.shape
    source = make_generator("random pair", rank, *parts)
    B, A = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((out, rank), (rank, into)))
    return LowRank(B.to(like.device, torch.float32), A.to(like.device, torch.float32))


def verdicts(result: Overlap) -> list[Verdict]:
    """Whether runs of another rank, and of another seed, have the same top directions.

    The left side decides, as the right one may say where A began (Zhu et al. 2024); of A alone the right side, where it
    counts. "yes": most layers overlap beyond chance, and φ(1, 1) does for sure. "no": most layers do not, and φ(1, 1)
    is below ``SHARED_OVERLAP`` for sure.
    """
    repeated = result.seeds[-1] if result.seeds else None
    return [
        _verdict(result.of, "ranks", result.ranks, "only one rank was trained; train more with --ranks"),
        _verdict(result.of, "seeds", repeated, "not enough seeds: there is one; train more with --seeds"),
    ]


def _verdict(of: MatrixKind, across: str, comparison: RunComparison | None, lacking: str) -> Verdict:
    claim = f"Top directions of {MATRIX_SYMBOLS[of]} are shared across {across} beyond chance."
    refuted = (
        f"At most half of the layers beyond chance (corrected p < {MAX_CORRECTED_P:g}), with a median φ(1, 1) below "
        f"{SHARED_OVERLAP:g} for sure."
    )
    if comparison is None:
        sentence = f"Undecided: {lacking}."
        return Verdict(line="overlap", claim=claim, answer="undecided", sentence=sentence, refuted_by=refuted)
    side = comparison.decisive_side
    return Verdict(
        line="overlap",
        claim=claim,
        answer=_answer(side, comparison.edge),
        sentence=_sentence(of, comparison),
        refuted_by=refuted,
    ).with_value(side.top)


def _answer(side: SideOverlap, edge: bool) -> Answer:
    most = 2 * side.significant > side.layers
    if not side.is_informative:
        return "undecided"
    if most:
        return "yes" if answer_above(side.top, side.top_expected) == "yes" else "undecided"
    return "no" if answer_above(side.top, SHARED_OVERLAP) == "no" and not edge else "undecided"


def _sentence(of: MatrixKind, comparison: RunComparison) -> str:
    side, count = comparison.decisive_side, len(comparison.pairs)
    runs = f"{count} pair{'s' if count > 1 else ''} of runs"
    said = [
        f"r = {comparison.rank_a} against r = {comparison.rank_b}, {MATRIX_SYMBOLS[of]}, {runs}, "
        f"{_describe_side(side)}."
    ]
    where = {"yes": "above", "no": "below", "undecided": "about"}[answer_above(side.top, SHARED_OVERLAP)]
    said.append(f"φ(1, 1) is {where} the {SHARED_OVERLAP:g} from which Hu et al. (2021) call a direction shared.")
    if 2 * side.significant > side.layers and answer_above(side.top, side.top_expected) != "yes":
        said.append("It is the subspaces that overlap beyond chance; their first directions do not for sure.")
    if side.side == "right" or not side.is_informative:
        said.append(f"This side {explain_side(side)}.")
    right = comparison.right
    if right is not None and side is not right:
        said.append(
            f"Right side: φ(1, 1) = {format_interval(right.top)}, {right.significant} of {right.layers} layers "
            "beyond chance; "
            f"it {explain_side(right)}."
        )
    if comparison.edge:
        said.append("A best rate lies at the end of those tried: a better one may overlap more.")
    return " ".join(said)


def _describe_side(side: SideOverlap) -> str:
    k = side.k
    square = f"φ({k}, {k}) = {format_interval(side.square)}, by chance {side.square_expected:.2g}; " if k > 1 else ""
    return (
        f"{side.side} side: φ(1, 1) = {format_interval(side.top)}, median of {side.layers} layers, by chance "
        f"{side.top_expected:.2g}; {square}{side.significant} of {side.layers} layers beyond chance "
        f"(corrected p < {MAX_CORRECTED_P:g})"
    )


def explain_side(side: SideOverlap) -> str:
    """Whether a side counts, and why, in words."""
    if side.initial_z is None:
        return "counts, as B began as zero" if side.is_informative else "does not count: it is not known where A began"
    factor = "A" if side.side == "right" else "B"
    began = f"{factor} overlapped with z = {side.initial_z:.2g} before training"
    return f"counts: {began}" if side.is_informative else f"does not count: {began}, where {ALIKE_Z:g} is too much"
