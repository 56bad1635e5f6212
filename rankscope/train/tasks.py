"""Which task a study's settings name."""

from __future__ import annotations

from rankscope.train.config import StudyConfig
from rankscope.train.docs import DocsTask
from rankscope.train.task import Task


def make_task(config: StudyConfig) -> Task:
    """The task that the settings name.

    Raises:
        ConfigError: a model or data file that the task needs is missing or does not fit.
    """
    if config.task == "docs":
        return DocsTask(config.max_length or 128)
    if config.task == "planted":
        from rankscope.train.planted import PlantedTask

        return PlantedTask(config.planted_rank, config.planted_noise, config.planted_spectrum)
    from rankscope.train.hf import make_hf_task

    return make_hf_task(config)
