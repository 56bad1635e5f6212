"""Break a key line of the package, one at a time, and see that the tests notice.

    python tools/mutate.py               every mutation, half an hour
    python tools/mutate.py NAME …        only these
    python tools/mutate.py --table       every mutation; writes docs/mutations.md too

Works on a copy of the package and its tests in a temporary folder. The tests of a mutation must pass without it, and
at least one must fail with it: else the mutation survives, a test is missing, and the exit code is 1.
``tests/test_mutations.py`` holds that every line still stands where this file says.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutations.md"
COPIED = ("rankscope", "tests", "tools", "examples", "docs", "README.md", "pyproject.toml")
LIMIT = 900
"""Seconds for the tests of one mutation; a mutation that makes them hang is noticed."""
HEAD = """# Mutations

Written by `python tools/mutate.py --table`. Each row breaks one line of the package; the tests beside it must fail.

| mutation | file | the line becomes | tests | noticed |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Mutation:
    """``old``, which stands once in ``file`` (in the package), becomes ``new``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """Write the mutation to a copy of the package; returns the file's text before.

        Raises:
            ValueError: ``old`` does not stand exactly once in the file.
        """
        path = root / "rankscope" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def mutation(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, tuple(f"tests/test_{test}" for test in tests))


MUTATIONS = (
    # Linear algebra and updates
    mutation(
        "scale of an update dropped",
        "updates.py",
        "return self.B.to(working_dtype(self.device)) * self.scale",
        "return self.B.to(working_dtype(self.device))",
        "updates.py::test_dense_is_the_matrix_in_float32",
    ),
    mutation(
        "V in the place of Vᵀ",
        "linalg.py",
        "return SVD(vt.T, s, u.T)",
        "return SVD(vt.T, s, u)",
        "linalg.py::test_svd_of_a_matrix_in_both_orientations",
    ),
    mutation(
        "σ² in the place of σ",
        "linalg.py",
        ".flip(0).clamp(min=0).sqrt()\n    return",
        ".flip(0).clamp(min=0)\n    return",
        "linalg.py::test_squares_in_float64_lose_nothing_that_float32_holds",
    ),
    mutation(
        "Cholesky without its limit for vectors",
        "linalg.py",
        "if certified.condition**2 > _condition_limit(tall):",
        "if False:",
        "linalg.py::test_directions_are_orthonormal_between_the_limits_too",
    ),
    mutation(
        "a factor's triangle remembered after training",
        "updates.py",
        "return pair if versions == self._versions else None",
        "return pair",
        "updates.py::test_what_was_found_once_is_not_found_again_unless_a_factor_changed",
    ),
    mutation(
        "float64's eps for float32 matrices",
        "updates.py",
        "return torch.finfo(torch.float32).eps",
        "return torch.finfo(torch.float64).eps",
        "spectra.py::test_spectra_of_every_kind",
        "spectra.py::test_rounding_dust_is_not_counted",
    ),
    mutation(
        "no rounding floor of bfloat16",
        "updates.py",
        "if torch.finfo(stored).eps > torch.finfo(torch.float32).eps:",
        "if False:",
        "updates.py::test_the_rounding_of_real_storage",
    ),
    mutation(
        "Kronecker factors the other way round",
        "structured.py",
        "return LowRank(kron(first.left, second.left)",
        "return LowRank(kron(second.left, first.left)",
        "updates.py::test_inner_of_every_two_kinds",
    ),
    # Spectra and noise
    mutation(
        "k90 one too small",
        "spectra.py",
        "return int(np.argmax(reached)) + 1",
        "return int(np.argmax(reached))",
        "spectra.py::test_unit_values",
    ),
    mutation(
        "energy of the values that a truncation kept",
        "spectra.py",
        "energy = float(values @ values) if all_values else update.energy",
        "energy = float(values @ values)",
        "sketch.py::test_what_is_open_is_an_interval",
    ),
    mutation(
        "noise of the smaller side",
        "spectra.py",
        "median / math.sqrt(n * mp_median(m / n))",
        "median / math.sqrt(m * mp_median(m / n))",
        "noise.py::test_counts_find_the_planted_rank_in_noise",
    ),
    mutation(
        "edge of noise by the sum of the sides",
        "noise.py",
        "return per_entry * (math.sqrt(shape[0]) + math.sqrt(shape[1]))",
        "return per_entry * math.sqrt(shape[0] + shape[1])",
        "noise.py::test_counts_find_the_planted_rank_in_noise",
        "noise.py::test_rounding_floor_of_bfloat16",
    ),
    mutation(
        "shrinker with a wrong sign",
        "noise.py",
        "(y**2 - beta - 1) ** 2",
        "(y**2 - beta + 1) ** 2",
        "noise.py::test_the_shrinker_undoes_known_noise",
    ),
    mutation(
        "Ritz values taken for upper bounds",
        "sketch.py",
        "np.minimum.accumulate(self.top.values + self.errors) ** 2",
        "self.top.values**2",
        "sketch.py::test_bounds_hold_where_the_values_are_known_only_roughly",
    ),
    # Subspaces
    mutation(
        "left directions for right ones",
        "subspace.py",
        'cls._side(svd.V, "right"',
        'cls._side(svd.U, "right"',
        "subspace.py::test_directions_of_every_kind",
    ),
    mutation(
        "small angles by their cosines",
        "subspace.py",
        "    if small:\n",
        "    if False:\n",
        "subspace.py::test_planted_angles",
    ),
    mutation(
        "chance level i/d in the place of max(i, j)/d",
        "subspace.py",
        "expected = np.maximum(i, j) / d",
        "expected = i / d",
        "subspace.py::test_chance_is_symmetric_and_one_sided",
        "subspace.py::test_chance_against_random_subspaces",
    ),
    mutation(
        "χ with too many degrees of freedom",
        "haar.py",
        "rng.chisquare(d - k_a - diagonal",
        "rng.chisquare(d - diagonal",
        "haar.py::test_moments_of_the_sampler",
    ),
    # Statistics
    mutation(
        "Holm without monotonicity",
        "inference.py",
        "np.maximum.accumulate(np.minimum(values[order] * factors, 1.0))",
        "np.minimum(values[order] * factors, 1.0)",
        "inference.py::test_holm_against_the_rule_by_hand",
    ),
    mutation(
        "Fieller's covariance with the wrong sign",
        "inference.py",
        "y.mean() - t2 * covariance[0, 1]",
        "y.mean() + t2 * covariance[0, 1]",
        "inference.py::test_fieller_inverts_the_paired_t_test",
    ),
    mutation(
        "equivalence on one side only",
        "inference.py",
        "margin - abs(float(x.mean()))",
        "margin - float(x.mean())",
        "inference.py::test_equivalence_is_the_worse_of_two_one_sided_tests",
    ),
    # Analysis
    mutation(
        "‖a + b‖ for ‖a − b‖",
        "analysis/layer_comparison.py",
        "norms[0] ** 2 + norms[1] ** 2 - 2 * inner",
        "norms[0] ** 2 + norms[1] ** 2 + 2 * inner",
        "analysis_comparison.py::test_files_against_numpy_and_scipy",
    ),
    mutation(
        "least error of one rank more",
        "analysis/layer_agreement.py",
        "energies[rank:].sum()",
        "energies[rank + 1 :].sum()",
        "analysis_agreement.py::test_every_number_against_whole_matrices",
    ),
    mutation(
        "q, k and v in the wrong order",
        "analysis/matching.py",
        "    return tuple(places)\n",
        "    return tuple(places)[::-1]\n",
        "analysis_matching.py::test_the_order_is_q_k_v_and_rows_are_exact",
        "analysis_matching.py::test_a_fused_projection_is_its_blocks",
    ),
    # Files
    mutation(
        "α/r for rsLoRA's α/√r",
        "formats/peft_config.py",
        "return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank",
        "return alpha / rank",
        "formats_peft_truth.py::test_patterns_and_rslora",
    ),
    mutation(
        "A and B swapped",
        "formats/peft_lora.py",
        "= LowRank(B, A, ",
        "= LowRank(A.T, B.T, ",
        "formats_peft_truth.py::test_linear",
    ),
    mutation(
        "DoRA without its magnitude",
        "formats/peft_lora.py",
        "return Dense((m[:, None] if over_columns else m[None, :]) / norms * moved - start)",
        "return Dense(moved - start)",
        "formats_peft_truth.py::test_dora",
    ),
    mutation(
        "kohya's α not read",
        "formats/adapter_file.py",
        "self._read_alpha(keys[ALPHA_LEAF]) if ALPHA_LEAF in keys else self._scale_alpha(module, rank, kernel)",
        "self._scale_alpha(module, rank, kernel)",
        "formats_adapter_file.py::test_kohya",
    ),
    mutation(
        "a file in its place before it is written",
        "formats/file_io.py",
        "        write(Path(name))\n",
        "        write(path)\n        Path(name).write_bytes(path.read_bytes())\n",
        "train_full_disk.py",
        "surgery_writing.py",
    ),
    # Bank and surgery
    mutation(
        "Conv1D's weight not transposed",
        "lora/layer_types.py",
        "        return update.T\n",
        "        return update\n",
        "lora_layers.py::test_merged_equals_unmerged_and_comes_back_bit_for_bit",
    ),
    mutation(
        "merge adds twice",
        "lora/layer.py",
        "(weight.to(working) + change)",
        "(weight.to(working) + 2 * change)",
        "lora_layers.py::test_merged_equals_unmerged_and_comes_back_bit_for_bit",
    ),
    mutation(
        "unmerge forgets the weight that was kept",
        "lora/swap.py",
        "        setattr(self.owner, self.name, original)\n",
        "        pass\n",
        "lora_layers.py::test_merged_equals_unmerged_and_comes_back_bit_for_bit",
    ),
    mutation(
        "an extracted adapter with α = 1",
        "formats/peft_write.py",
        '"lora_alpha": common,',
        '"lora_alpha": 1,',
        "surgery_extract.py::test_a_merge_gives_its_adapter_back_and_nothing_else",
        "surgery_extract.py::test_the_folder_that_is_written",
    ),
    mutation(
        "σ on each side of a truncated product",
        "surgery/truncate.py",
        "root = svd.s[:k].sqrt()",
        "root = svd.s[:k]",
        "surgery_truncate.py::test_no_matrix_of_that_rank_is_closer",
    ),
    # Training
    mutation(
        "initial factors alike at every rank",
        "train/methods.py",
        'return (run.seed, "init", run.rank, *others)',
        'return (run.seed, "init", *others)',
        "train_loop.py::test_initial_factors_of_ranks_are_unrelated",
        "train_loop.py::test_seeds_and_ranks_start_apart",
    ),
    mutation(
        "resumed without the optimizer's state",
        "train/run_state.py",
        'moments: dict[str, dict[str, Tensor]] = state["optimizer"]',
        "moments: dict[str, dict[str, Tensor]] = {}",
        "train_loop.py::test_a_stopped_study_goes_on_to_the_same_numbers",
    ),
    mutation(
        "learning rate without its schedule",
        "train/run_state.py",
        'group["lr"] = group["peak_lr"] * share',
        'group["lr"] = group["peak_lr"]',
        "train_loop.py::test_a_step_is_that_of_plain_adamw",
        "train_loop.py::test_schedule_is_the_closed_form",
    ),
    mutation(
        "best learning rate chosen on the test split",
        "train/study.py",
        'self.score(record, "validation")',
        "self.score(record)",
        "train_bank.py::test_the_choice_does_not_see_the_test_split",
    ),
    mutation(
        "a run claimed without its lock",
        "train/claims.py",
        "if name not in self._held and lock_byte(",
        "if name not in self._held and bool(",
        "train_processes.py::test_a_claim_is_one_processs_and_goes_with_it",
    ),
    # Evidence
    mutation(
        "gains of different seeds paired",
        "evidence/entries.py",
        "differences = [gains[seed] - full[seed] for seed in paired]",
        "differences = [gains[seed] - full[max(paired)] for seed in paired]",
        "evidence_performance.py::test_shares_and_differences_are_paired_by_seed",
    ),
)


def run_tests(root: Path, tests: tuple[str, ...], limit: int = LIMIT) -> bool:
    """Whether the tests pass in a copy, within so many seconds."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        result = subprocess.run(
            command, cwd=root, env=environment, check=False, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    if result.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {' '.join(tests)}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0


def copy_checkout(folder: Path) -> Path:
    """A copy of what the tests need, without compiled files, which would hide a mutation of the same second."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def try_mutation(root: Path, change: Mutation, is_green: bool) -> str:
    """Try a mutation; "yes" where its tests notice it, else what is wrong. ``is_green``: they pass without it."""
    if not is_green:
        return "its tests fail without it"
    text = change.apply(root)
    try:
        return "SURVIVES" if run_tests(root, change.tests) else "yes"
    finally:
        (root / "rankscope" / change.file).write_text(text, encoding="utf-8")


def table_row(change: Mutation, outcome: str) -> str:
    old, new = (" ⏎ ".join(line.strip() for line in text.strip().splitlines()) for text in (change.old, change.new))
    tests = ", ".join(test.removeprefix("tests/").replace("::", " ") for test in change.tests)
    line = f"`{old}` → `{new}`".replace("|", "\\|")
    return f"| {change.name} | {change.file} | {line} | {tests} | {outcome} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; all where none is given")
    parser.add_argument("--table", action="store_true", help=f"write the results to {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {change.name for change in MUTATIONS}
    if unknown:
        parser.error(f"no mutation {sorted(unknown)[0]!r}; there are: {', '.join(change.name for change in MUTATIONS)}")
    chosen = [change for change in MUTATIONS if not arguments.names or change.name in arguments.names]
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = copy_checkout(Path(folder))
        # All in one run, which loads the libraries once; one by one only to see which of them fail.
        every = tuple(dict.fromkeys(test for change in chosen for test in change.tests))
        all_green = run_tests(root, every, LIMIT * len(chosen))
        for change in chosen:
            began = time.monotonic()
            outcomes[change.name] = try_mutation(root, change, all_green or run_tests(root, change.tests))
            print(f"{outcomes[change.name]:9} {time.monotonic() - began:5.0f} s  {change.name}", flush=True)
    if arguments.table:
        PAGE.write_text(HEAD + "".join(table_row(change, outcomes[change.name]) for change in chosen), encoding="utf-8")
    missed = sum(outcome != "yes" for outcome in outcomes.values())
    print(f"{len(outcomes) - missed} of {len(outcomes)} mutations are noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
