"""``rankscope train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rankscope.cli.common import grouped


class Values(click.ParamType[tuple[Any, ...]]):
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


data_options = grouped(
    click.option("--task", type=click.Choice(["docs", "planted", "classify", "lm"]), help="What to learn [docs]."),
    click.option("--model", metavar="DIR_OR_ID", help="Base model, a folder or a hub id (classify, lm)."),
    click.option("--data", metavar="FILE", help="Training examples (classify, lm): csv, tsv, jsonl or parquet."),
    click.option("--eval", metavar="FILE", help="Held-out examples; without it a tenth of --data."),
    click.option("--text", metavar="COLUMN", help="Column of the text (classify, lm) [text]."),
    click.option("--label", metavar="COLUMN", help="Column of the class (classify) [label]."),
    click.option("--max-length", type=int, metavar="N", help="Tokens kept of a text."),
    click.option("--planted-rank", type=int, metavar="R", help="Rank of the planted update (planted) [4]."),
)
grid_options = grouped(
    click.option("--ranks", type=Values(int), help="LoRA ranks [1,2,4,8,16,64]."),
    click.option("--lrs", type=Values(float), help="Learning rates of LoRA; the task has its own default."),
    click.option("--full-lrs", type=Values(float), help="Learning rates of full fine-tuning."),
    click.option("--seeds", type=Values(int), help="Seeds [0]."),
    click.option("--full/--no-full", default=None, help="Full fine-tuning beside LoRA [yes]."),
)
adapter_options = grouped(
    click.option("--targets", type=Values(str), help="Modules that get LoRA: names or ends of names [all-linear]."),
    click.option("--alpha", type=float, help="The update is scaled by alpha / r [alpha = 2r]."),
    click.option("--rslora", is_flag=True, default=None, help="Scale by alpha / √r."),
    click.option("--init", type=click.Choice(["kaiming", "gaussian"]), help="How A starts [kaiming]."),
    click.option("--dropout", type=float, help="Dropout before A [0]."),
    click.option("--bias", type=click.Choice(["none", "lora_only", "all"]), help="Biases trained along [none]."),
)
training_options = grouped(
    click.option("--steps", type=int, help="Optimizer steps of each run; overrides --epochs."),
    click.option("--epochs", type=float, help="Passes over the training data (classify, lm) [3]."),
    click.option("--batch", type=int, help="Examples a step [16]."),
    click.option("--accumulate", type=int, help="Batches whose gradients make one step [1]."),
    click.option("--warmup", type=float, help="Share of the steps with rising rate [0.06]."),
    click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), help="Then [cosine]."),
    click.option("--weight-decay", type=float, help="AdamW's, on matrices [0.01]."),
    click.option("--clip", type=float, help="Largest norm of the gradient [1]."),
    click.option("--evaluations", type=int, help="Looks at held-out data during a run [4]."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Arithmetic of forward and backward."),
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps [auto]."),
)


@click.command()
@click.option("-o", "--output", default="study", show_default=True, metavar="STUDY", help="Folder of the study.")
@click.option("--config", "config_file", metavar="FILE", help="The same settings in TOML; options override it.")
@data_options
@grid_options
@adapter_options
@training_options
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON instead of a table.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(output: str, config_file: str | None, as_json: bool, quiet: bool, debug: bool, **settings: Any) -> None:
    """Train LoRA at many ranks, and full fine-tuning beside it, into a study folder.

    Without arguments: the embedded model and task, some minutes on two cores. The same command takes up
    a study that was stopped; Ctrl-C saves the run in progress first.

    \b
    Examples:
      rankscope train
      rankscope train --model ./minilm --task classify --data reviews.csv --ranks 1,4,16 --seeds 0,1 -o reviews
    """
    from rankscope.cli.progress import listen, stop_on_signal
    from rankscope.cli.study_output import print_study, write_plots
    from rankscope.train.config import make_config, read_config
    from rankscope.train.loop import InterruptedTrainingError
    from rankscope.train.results import rows
    from rankscope.train.study import run_study

    overrides = {key: value for key, value in settings.items() if value is not None}
    if ("model" in overrides or "data" in overrides) and "task" not in overrides and config_file is None:
        raise click.UsageError("--model and --data need --task classify or --task lm")
    config = read_config(Path(config_file), overrides) if config_file else make_config(overrides, "options")
    try:
        with stop_on_signal() as stop, listen(quiet) as listener:
            study = run_study(config, output, listener, stop)
    except InterruptedTrainingError as error:
        click.echo(f"rankscope: {error}; the same command goes on from there", err=True)
        raise click.exceptions.Exit(130) from error
    found = rows(study)
    # Drawn first: whoever pipes the table into head may end this process.
    written = write_plots(study, found)
    print_study(study, found, as_json)
    for path in written:
        if not quiet:
            click.echo(f"wrote {path}", err=True)
