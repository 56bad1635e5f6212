"""A grid of LoRA runs: PEFT one run after another, and rankscope step by step to all it has, in one process run.

python benchmarks/training.py                      # the embedded base, the default grid's ranks and rates
python benchmarks/training.py --model minilm --data brown-train.tsv --batch 8
python benchmarks/training.py --device cuda --seeds 3 --compile

Every row trains the same runs: the same initial factors, the same batches. What is timed is training steps, after
``--warm`` untimed ones, without evaluations and without loading. The rows are timed in turns, ``--repeats`` times, and
the median is shown. ``difference`` is the largest relative difference of a run's training losses from PEFT's: the
median over runs, and the worst; a run at too high a rate amplifies rounding until nothing agrees.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankscope.train.config import StudyConfig
from rankscope.train.costs import peak_memory, reset_peak_memory
from rankscope.train.docs import embedded_base_folder
from rankscope.train.loop import RunGroup, Silent, autocast, batch_size, move_batch, set_precision
from rankscope.train.run_state import schedule_factor
from rankscope.train.runs import Run, plan_runs
from rankscope.train.sweep import CPU_TOKENS, MAX_RANK_RATIO
from rankscope.train.task import Task
from rankscope.train.tasks import make_task


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Measured:
    """Seconds of all timed steps of all runs, the losses by run, and the peak of the process's memory."""

    seconds: float
    losses: dict[str, list[float]]
    peak: int


class Job:
    """The runs and how many steps of each are trained."""

    def __init__(self, arguments: argparse.Namespace, **changes: Any) -> None:
        self.arguments, self.changes = arguments, changes
        self.device = torch.device(arguments.device)
        own = {"task": "classify", "model": arguments.model, "data": arguments.data} if arguments.model else {}
        ranks = tuple(int(rank) for rank in arguments.ranks.split(","))
        lrs = tuple(float(lr) for lr in arguments.lrs.split(","))
        self.config = StudyConfig(
            **own,  # type: ignore[arg-type]
            ranks=ranks,
            lrs=lrs,
            full=False,
            seeds=tuple(range(arguments.seeds)),
            batch=arguments.batch,
            max_length=arguments.max_length,
            steps=arguments.warm + arguments.steps,
            **changes,
        )
        self.task: Task = make_task(self.config)
        self.task.draws = False  # see quiet_dropout
        self.runs = [run for run in plan_runs(self.config, self.task) if run.is_lora]
        self.warm, self.steps = arguments.warm, arguments.steps

    def __reduce__(self) -> Any:
        """A worker reads the data again: thousands of tensors cannot be passed to it."""
        return make_job, (self.arguments, self.changes)


def make_job(arguments: argparse.Namespace, changes: dict[str, Any]) -> Job:
    return Job(arguments, **changes)


def passes_of(runs: list[Run], together: int) -> list[list[Run]]:
    """Runs that go together, at most so many, as ``rankscope train`` groups them: ranks within a factor."""
    found: list[list[Run]] = []
    for run in runs:
        ranks = [other.rank or 1 for other in (*(found[-1] if found else []), run)]
        if found and len(found[-1]) < together and max(ranks) <= MAX_RANK_RATIO * min(ranks):
            found[-1].append(run)
        else:
            found.append([run])
    return found


def ours(job: Job, passes: Iterable[list[Run]]) -> Measured:
    """Pass after pass."""
    losses, seconds = {}, 0.0
    reset_peak_memory(job.device)
    with tempfile.TemporaryDirectory() as folder:
        for some in passes:
            group = make_group(job, some, Path(folder))
            with set_precision(job.device, job.config):
                for _ in range(job.warm):
                    group.try_step()
                began = now(job.device)
                for _ in range(job.steps):
                    group.try_step()
                seconds += now(job.device) - began
            losses |= {t.run.name: t.losses.tolist() for t in group.trainees}
    return Measured(seconds, losses, peak_memory(job.device) or 0)


def make_group(job: Job, runs: list[Run], folder: Path) -> RunGroup:
    before: dict[int, dict[str, dict[str, float]]] = {run.seed: {} for run in runs}
    group = RunGroup(job.task, job.config, runs, [folder / run.name for run in runs], before, job.device, Silent())
    quiet_dropout(group.model)
    return group


def worker(job: Job, together: int, threads: int, ready: Any, following: Any, answers: Any) -> None:
    torch.set_num_threads(threads)
    passes = passes_of(job.runs, together)
    # The first passes of each process pay for imports and, with torch.compile, for compiling.
    warm = make_job(job.arguments, job.changes)
    warm.steps = 1
    ours(warm, passes)
    ready.wait()
    answers.put(ours(job, take_passes(passes, following)))


def take_passes(passes: list[list[Run]], following: Any) -> Iterator[list[Run]]:
    """The passes that this worker comes to first."""
    while True:
        with following.get_lock():
            at, following.value = following.value, following.value + 1
        if at >= len(passes):
            return
        yield passes[at]


def ours_in_workers(job: Job, together: int, count: int) -> Measured:
    """The passes shared out to processes of one thread each; the time is that of the slowest."""
    context = multiprocessing.get_context("spawn")
    ready, following, answers = context.Barrier(count), context.Value("i", 0), context.Queue()
    threads = max(1, torch.get_num_threads() // count)
    given = (job, together, threads, ready, following, answers)
    processes = [context.Process(target=worker, args=given) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    losses = {name: values for one in found for name, values in one.losses.items()}
    return Measured(max(one.seconds for one in found), losses, sum(one.peak for one in found))


def theirs(job: Job) -> Measured:
    """PEFT on transformers' model, one run after another, with the same data, factors, schedule and optimizer."""
    import peft

    losses, seconds = {}, 0.0
    reset_peak_memory(job.device)
    with tempfile.TemporaryDirectory() as folder:
        for run in job.runs:
            start = make_group(job, [run], Path(folder))
            start.trained.save_initial(0, Path(folder))
            model = peft.PeftModel.from_pretrained(base_of(job, run), Path(folder) / "initial", is_trainable=True)
            with set_precision(job.device, job.config):
                took, losses[run.name] = train_peft(job, run, model.to(job.device))
            seconds += took
    return Measured(seconds, losses, peak_memory(job.device) or 0)


def base_of(job: Job, run: Run) -> Any:
    if job.config.model:
        return job.task.model(run.seed)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_base_folder(), dtype=torch.float32)
    model.config.use_cache = False
    return model


def train_peft(job: Job, run: Run, model: Any) -> tuple[float, list[float]]:
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr or 0.0, weight_decay=job.config.weight_decay, fused=True)
    model.train()
    quiet_dropout(model)
    losses, began = [], 0.0
    total = job.warm + job.steps
    for step in range(total):
        if step == job.warm:
            began = now(job.device)
        optimizer.param_groups[0]["lr"] = (run.lr or 0.0) * schedule_factor(step, total, job.config)
        batch = move_batch(job.task.batch(run.seed, step, batch_size(job.task, job.config)), job.device)
        with autocast(job.device, job.config):
            loss = peft_loss(job, model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = now(job.device) - began
    return seconds, torch.stack(losses).tolist()


def peft_loss(job: Job, model: Any, batch: Any) -> torch.Tensor:
    if job.config.model:
        outputs = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
    else:
        outputs = model(input_ids=batch["tokens"]).logits
    return job.task.loss(outputs, batch)


def quiet_dropout(model: torch.nn.Module) -> None:
    """Dropout of the base off, on both sides: PEFT's random stream is another, and losses could not be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model, "config"):
        model.config.attention_probs_dropout_prob = 0.0


def differences(ours: Measured, theirs: Measured) -> list[float]:
    """The largest relative difference of any loss of each run, ascending."""
    found = []
    for name, losses in theirs.losses.items():
        pairs = zip(ours.losses[name], losses, strict=True)
        found.append(max(abs(a - b) / abs(b) for a, b in pairs))
    return sorted(found)


def rows(arguments: argparse.Namespace) -> dict[str, Callable[[], Measured]]:
    plain = Job(arguments)
    tokens = plain.task.tokens_per_example() * batch_size(plain.task, plain.config)
    together = arguments.together or max(1, arguments.tokens // tokens)
    cores = os.cpu_count() or 1
    if plain.device.type == "cuda":
        return rows_on_gpu(arguments)
    half = Job(arguments, dtype="bfloat16")
    found: dict[str, Callable[[], Measured]] = {
        "PEFT, one run after another": lambda: theirs(plain),
        "PEFT, one run after another, bfloat16": lambda: theirs(half),
        "rankscope, one run after another": lambda: ours(plain, passes_of(plain.runs, 1)),
        f"{together} runs in one pass": lambda: ours(plain, passes_of(plain.runs, together)),
        f"1 in one pass, {cores} workers": lambda: ours_in_workers(plain, 1, cores),
    }
    if len(passes_of(plain.runs, together)) < cores:  # there is no pass for each worker
        return found
    found |= {
        f"{together} in one pass, {cores} workers": lambda: ours_in_workers(plain, together, cores),
        f"{together}, {cores} workers, bfloat16": lambda: ours_in_workers(half, together, cores),
    }
    if arguments.compile:
        compiled = Job(arguments, compile=True)
        both = Job(arguments, compile=True, dtype="bfloat16")
        found |= {
            f"{together}, {cores} workers, compiled": lambda: ours_in_workers(compiled, together, cores),
            f"{together}, {cores} workers, compiled, bfloat16": lambda: ours_in_workers(both, together, cores),
        }
    return found


def rows_on_gpu(arguments: argparse.Namespace) -> dict[str, Callable[[], Measured]]:
    """One process; as many runs in a pass as the ranks allow, since these bases leave most of the memory free."""
    plain, half = Job(arguments), Job(arguments, dtype="bfloat16")
    together = arguments.together or len(plain.runs)
    found: dict[str, Callable[[], Measured]] = {
        "PEFT, one run after another": lambda: theirs(plain),
        "PEFT, one run after another, bfloat16": lambda: theirs(half),
        "rankscope, one run after another": lambda: ours(plain, passes_of(plain.runs, 1)),
        "runs in one pass": lambda: ours(plain, passes_of(plain.runs, together)),
        "runs in one pass, bfloat16": lambda: ours(half, passes_of(half.runs, together)),
    }
    if arguments.compile:
        compiled = Job(arguments, compile=True, dtype="bfloat16")
        found["runs in one pass, compiled, bfloat16"] = lambda: ours(compiled, passes_of(compiled.runs, together))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model to classify with; the embedded base without it")
    parser.add_argument("--data", help="its training examples")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--ranks", default="1,2,4,8,16,64")
    parser.add_argument("--lrs", default="0.003,0.01,0.03")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=CPU_TOKENS, help="budget of a pass")
    parser.add_argument("--together", type=int, help="runs in a pass, instead of the budget")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table = rows(arguments)
    measured: dict[str, list[Measured]] = {name: [] for name in table}
    for _ in range(arguments.repeats):
        for name, measure in table.items():
            measured[name].append(measure())
            print(f"{name}: {measured[name][-1].seconds:.2f} s", file=sys.stderr)
    report(measured, arguments)


def report(measured: dict[str, list[Measured]], arguments: argparse.Namespace) -> None:
    reference = next(iter(measured.values()))
    base = statistics.median(one.seconds for one in reference)
    runs = len(reference[0].losses)
    lines = []
    for name, found in measured.items():
        seconds = statistics.median(one.seconds for one in found)
        lines.append(
            {
                "row": name,
                "ms_per_run_and_step": 1000 * seconds / (runs * arguments.steps),
                "times_faster_than_peft": base / seconds,
                "difference_median": statistics.median(differences(found[0], reference[0])),
                "difference_worst": differences(found[0], reference[0])[-1],
                "peak_mib": max(one.peak for one in found) / 2**20,
            }
        )
    if arguments.json:
        print(json.dumps({"runs": runs, "steps": arguments.steps, "batch": arguments.batch, "rows": lines}, indent=2))
        return
    print(f"{'':48}{'ms a run and step':>18}{'x PEFT':>8}{'difference':>12}{'worst':>10}{'peak MiB':>10}")
    for line in lines:
        print(
            f"{line['row']:48}{line['ms_per_run_and_step']:18.1f}{line['times_faster_than_peft']:8.2f}"
            f"{line['difference_median']:12.1e}{line['difference_worst']:10.1e}{line['peak_mib']:10.0f}"
        )


if __name__ == "__main__":
    main()
