"""``rankscope extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command

if TYPE_CHECKING:
    from rankscope.surgery.extract import EmbeddingMode
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("tuned", metavar="TUNED")
@click.option("--base", metavar="PATH", help="The checkpoint that was tuned; needed for full weights.")
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "low-rank"]),
    default="whole",
    show_default=True,
    help="Save embeddings that changed whole, or make them low-rank like other matrices.",
)
@surgery_command(chooses="always")
def command(tuned: str, base: str | None, embeddings: EmbeddingMode, **shared: Any) -> SurgeryResult:
    """Make a LoRA adapter of a full fine-tuning.

    TUNED is a checkpoint (with --base), or a study's run of full fine-tuning. Energies are shares of the exact energy
    of each update. --rank computes only the largest singular values where that is faster: the error, which is reported
    exactly, is then at most 0.1 % above the least. What cannot be low-rank (norms, biases, new modules) is copied whole
    where PEFT can load it; -v lists the rest. Factors are written in float32 unless --dtype names another type.

    \b
    Examples:
      rankscope extract ./tuned --base ./base --rank 32 -o ./adapter
      rankscope extract ./tuned --base ./base --noise -o ./adapter
    """
    from rankscope.surgery.extract import extract

    return extract(tuned, base=base, embeddings=embeddings, **shared)
