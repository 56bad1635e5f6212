"""``rankscope train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rankscope.cli.options import combine_options
from rankscope.cli.torchrun import is_first_process
from rankscope.train.method_table import selectable_methods


class CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """``1,4,16``: several values of one type, separated by commas."""

    def __init__(self, kind: type[int] | type[float] | type[str]) -> None:
        self.kind, self.name = kind, f"{kind.__name__.upper()},…" if kind is not str else "PATTERN,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers separated by commas", param, ctx)


data_options = combine_options(
    click.option("--task", type=click.Choice(["docs", "planted", "classify", "lm"]), help="What to learn [docs]."),
    click.option("--model", metavar="DIR_OR_ID", help="Base model, a folder or a hub id (classify, lm)."),
    click.option("--data", metavar="FILE", help="Training examples (classify, lm): csv, tsv, jsonl or parquet."),
    click.option("--eval", metavar="FILE", help="Held-out examples; without it a tenth of --data."),
    click.option("--text", metavar="COLUMN", help="Column of the text (classify, lm) [text]."),
    click.option("--label", metavar="COLUMN", help="Column of the class (classify) [label]."),
    click.option("--max-length", type=int, metavar="N", help="Longest text, in tokens; the rest is cut off."),
    click.option("--planted-rank", type=int, metavar="R", help="Rank of the planted update (planted) [4]."),
    click.option(
        "--planted-spectrum",
        type=click.Choice(["even", "flat", "decaying"]),
        help="Singular values of the planted update (planted) [even].",
    ),
)
grid_options = combine_options(
    click.option(
        "--methods",
        "--method",
        type=CommaSeparated(str),
        help=f"{', '.join(selectable_methods())} [lora].",
    ),
    click.option("--ranks", type=CommaSeparated(int), help="LoRA ranks [1,2,4,8,16,64]."),
    click.option(
        "--dims", type=CommaSeparated(int), help="Sizes of random subspaces (subspace, said) [16,64,…,16384]."
    ),
    click.option(
        "--targets",
        multiple=True,
        metavar="NAMES",
        help="Modules that get LoRA: names such as q_proj,v_proj; q, k, v, o, attention, mlp or all. "
        "Repeat it to compare sets.  [all]",
    ),
    click.option("--budget", type=int, metavar="PARAMS", help="Give each set of targets the rank that has so many."),
    click.option("--lrs", type=CommaSeparated(float), help="Learning rates of LoRA [three around 10 x those of full]."),
    click.option("--full-lrs", type=CommaSeparated(float), help="Learning rates of full fine-tuning [three]."),
    click.option(
        "--extend-lrs", is_flag=True, default=None, help="Try further learning rates where the best is at an end."
    ),
    click.option(
        "--halving",
        is_flag=True,
        default=None,
        help="Stop the worse half of the learning rates after a third of the steps.",
    ),
    click.option("--seeds", type=CommaSeparated(int), help="Seeds [0]."),
    click.option("--full/--no-full", default=None, help="Full fine-tuning beside LoRA [yes]."),
)
adapter_options = combine_options(
    click.option("--alpha", metavar="NUMBER|Xr", help="The update is scaled by alpha / r [2r; rslora: 16]."),
    click.option("--init", type=click.Choice(["kaiming", "gaussian"]), help="How A starts [kaiming]."),
    click.option("--dropout", type=float, help="Dropout before A [0]."),
    click.option(
        "--bias", type=click.Choice(["none", "lora_only", "all"]), help="Which biases are trained too [none]."
    ),
    click.option("--lora-plus-ratio", type=float, help="B's learning rate over A's in lora+ [16]."),
)
training_options = combine_options(
    click.option("--steps", type=int, help="Optimizer steps of each run; overrides --epochs."),
    click.option("--epochs", type=float, help="Passes over the training data (classify, lm) [3]."),
    click.option("--batch", type=int, help="Examples a step [docs: 8, others: 16]."),
    click.option("--accumulate", type=int, help="Batches whose gradients make one step [1]."),
    click.option("--warmup", type=float, help="Share of the steps in which the learning rate rises [0.06]."),
    click.option(
        "--schedule", type=click.Choice(["linear", "cosine", "constant"]), help="Learning rate after that [cosine]."
    ),
    click.option("--weight-decay", type=float, help="AdamW's weight decay, on matrices alone [0.01]."),
    click.option("--clip", type=float, help="Largest norm of the gradient [1]."),
    click.option("--evaluations", type=int, help="Evaluations during a run, besides the first and the last [1]."),
)
machine_options = combine_options(
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps [auto]."),
    click.option("--workers", type=int, metavar="N", help="Processes that share the grid [1]."),
    click.option("--tokens", type=int, metavar="N", help="Tokens in one pass: how many runs are trained together."),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Precision of the passes [float32]."
    ),
    click.option("--tf32", is_flag=True, default=None, help="TF32 in float32 products (CUDA)."),
    click.option("--compile", is_flag=True, default=None, help="torch.compile the model."),
    click.option("--checkpointing", is_flag=True, default=None, help="Recompute activations: less memory, more time."),
    click.option("--data-parallel", is_flag=True, default=None, help="Full fine-tuning by all of torchrun (DDP)."),
    click.option("--shard", is_flag=True, default=None, help="The same with sharded weights (FSDP2)."),
)


@click.command()
@click.option("-o", "--output", default="study", show_default=True, metavar="STUDY", help="Folder of the study.")
@click.option("--config", "config_file", metavar="FILE", help="The same settings in TOML; options override it.")
@data_options
@grid_options
@adapter_options
@training_options
@machine_options
@click.option("--report", is_flag=True, help="Then write the study's report, as rankscope report does.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="A row for each run, not one for each rank.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    output: str,
    config_file: str | None,
    workers: int | None,
    report: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
    **settings: Any,
) -> None:
    """Train LoRA at many ranks and learning rates, and full fine-tuning beside it, into a study folder.

    Without arguments it trains the embedded model on the embedded task, which takes some minutes on two cores.
    Ctrl-C saves the runs in progress, and the same command continues them. Several such commands at once, on
    any machines that see the folder, share the runs; so do the processes of torchrun -m rankscope train.

    \b
    Examples:
      rankscope train
      rankscope train --model ./minilm --task classify --data reviews.csv --ranks 1,4,16 --seeds 0,1 -o reviews
      rankscope train --targets q --targets v --targets q,v --budget 16384 -o which-matrices
    """
    if report and as_json:
        raise click.UsageError("--json prints the rows of the runs; for the evidence use rankscope report --json")
    from rankscope.cli.progress import open_listener, stop_on_signal
    from rankscope.cli.study_output import print_study, write_plots
    from rankscope.train.config import make_study_config, read_study_config
    from rankscope.train.loop import InterruptedTrainingError
    from rankscope.train.results import run_results
    from rankscope.train.serving import serving_latency
    from rankscope.train.worker_processes import run_study_with_workers

    settings["targets"] = settings["targets"] or None  # click gives () where the option is not given
    overrides = {key: value for key, value in settings.items() if value is not None}
    if ("model" in overrides or "data" in overrides) and "task" not in overrides and config_file is None:
        raise click.UsageError("--model and --data need --task classify or --task lm")
    config = read_study_config(Path(config_file), overrides) if config_file else make_study_config(overrides, "options")
    speaks = is_first_process()  # of torchrun's processes only the first writes to the terminal
    try:
        with stop_on_signal() as stop, open_listener(quiet or not speaks, output, workers or 1) as listener:
            study = run_study_with_workers(config, output, workers or 1, listener, stop)
    except InterruptedTrainingError as error:
        click.echo(f"rankscope: {error}; the same command continues from there", err=True)
        raise click.exceptions.Exit(130) from error
    if not speaks:
        return
    results = run_results(study)
    # Drawn first: whoever pipes the table into head may end this process.
    written = write_plots(study, results)
    print_study(study, results, as_json, verbose, serving_latency(study))
    for path in written:
        if not quiet:
            click.echo(f"wrote {path}", err=True)
    if report:
        from rankscope.cli.report_command import print_verdicts, write_study_report

        click.echo()
        print_verdicts(write_study_report(study, Path(output), device=config.device, quiet=quiet, rows=results))
