"""How a source of updates is opened: the settings that go with a path from the command line down to its reader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from rankscope.errors import ConfigError
from rankscope.formats.hub import local_path


@dataclass(frozen=True)
class Opening:
    """What ``rankscope.open`` takes beside the path.

    ``base``: checkpoint of the pre-trained model, a path or an id of the hub. ``alpha``: LoRA's α where the file has
    none. ``initial``: the adapter before training, where its initialisation moved the base. ``device``: where updates
    are put.
    """

    base: str | os.PathLike[str] | None = None
    alpha: float | None = None
    initial: str | os.PathLike[str] | None = None
    device: torch.device | str = "cpu"

    @cached_property
    def base_path(self) -> Path | None:
        """The base on disk. An id of the hub is looked up, and downloaded where it has to be, on the first access.

        Raises:
            FormatError: an id that is not in the cache and cannot be downloaded.
        """
        return None if self.base is None else local_path(self.base)

    @property
    def initial_path(self) -> Path | None:
        """The adapter before training, with ``~`` resolved."""
        return None if self.initial is None else Path(self.initial).expanduser()

    def for_sources(self, initial: Sequence[str | os.PathLike[str] | None], count: int) -> list[Opening]:
        """These settings for each of ``count`` sources; the i-th source gets the i-th of the ``initial`` adapters.

        Raises:
            ConfigError: more initial adapters than sources.
        """
        if len(initial) > count:
            raise ConfigError(
                f"{len(initial)} initial adapters were given for {count} sources; give one for each at most"
            )
        return [replace(self, initial=start) for start in (*initial, *[None] * (count - len(initial)))]
