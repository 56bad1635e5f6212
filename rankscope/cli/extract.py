"""``rankscope extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rankscope.cli.common import tracker
from rankscope.cli.surgery_output import (
    choice_options,
    chosen,
    command_line,
    dtype_option,
    parsed_dtype,
    place_options,
    report_options,
    required,
    show,
)

if TYPE_CHECKING:
    from rankscope.surgery.extract import Embeddings


@click.command()
@click.argument("tuned", metavar="TUNED")
@click.option("--base", metavar="PATH", help="The checkpoint that was tuned; needed for full weights.")
@choice_options
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "low-rank"]),
    default="whole",
    show_default=True,
    help="Embeddings that changed: saved whole, or low-rank as other matrices.",
)
@place_options
@dtype_option
@report_options
def command(
    tuned: str,
    base: str | None,
    rank: int | None,
    energy: float | None,
    sigma_ratio: float | None,
    noise: bool,
    budget: int | None,
    embeddings: Embeddings,
    output: str,
    device: str,
    dtype: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Make a LoRA adapter of a full fine-tuning.

    TUNED is a checkpoint (with --base), or a study's run of full fine-tuning. Energies are shares of the exact energy
    of each update. What cannot be low-rank (norms, biases, new modules) goes along whole where PEFT can load it;
    -v lists the rest. Factors are written in float32 unless --dtype says otherwise.

    \b
    Examples:
      rankscope extract ./tuned --base ./base --rank 32 -o ./adapter
      rankscope extract ./tuned --base ./base --noise -o ./adapter
    """
    import torch

    from rankscope.surgery.extract import extract

    choice = required(chosen(rank, energy, sigma_ratio, noise, budget))
    result = extract(
        tuned,
        choice,
        output,
        base,
        embeddings=embeddings,
        dtype=parsed_dtype(dtype) or torch.float32,
        device=device,
        track=tracker(quiet, "layers"),
        command=command_line(),
    )
    show(result, as_json, verbose, quiet)
