"""``rankscope convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.format_names import WritableFormat
from rankscope.cli.options import alpha_option
from rankscope.cli.surgery_output import surgery_command

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--to", type=WritableFormat(), required=True, help="The format to be written.")
@click.option(
    "--component",
    metavar="NAME",
    help="The part of a pipeline: which is kept, or what a PEFT adapter is of (unet, transformer, text_encoder …).",
)
@click.option(
    "--base",
    metavar="PATH",
    help="The model, or a pipeline's folder, whose module paths give the dots in kohya's names.",
)
@click.option("--names", metavar="FILE", help="A file with these module paths, one a line.")
@alpha_option
@surgery_command()
def command(
    adapter: str,
    to: str,
    component: str | None,
    base: str | None,
    names: str | None,
    alpha: float | None,
    **shared: Any,
) -> SurgeryResult:
    """The same updates in the format of another tool.

    ADAPTER is a LoRA in any format that can be read. Factors stay as they are, with the α that gives their scale (for
    diffusers the scale is multiplied into B). DoRA's magnitudes are copied; layers that the format cannot hold are
    listed. kohya's names have underscores instead of dots: files that convert wrote contain the dotted names, others
    need --base or --names. OUT is a folder; for kohya and diffusers it may be a file that ends in .safetensors.

    \b
    Examples:
      rankscope convert ./lora.safetensors --to peft --base ./stable-diffusion -o ./adapter --component unet
      rankscope convert ./adapter --to kohya -o lora.safetensors
    """
    from rankscope.surgery.convert import convert

    return convert(adapter, to, component=component, base=base, names=names, alpha=alpha, **shared)
