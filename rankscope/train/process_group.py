"""Processes that train one run together: torchrun's, for full fine-tuning split over them. One is the usual case.

DDP keeps the whole model in each process; FSDP2 (``shard_model``) keeps a part of each weight. Either way the batch of
one process is divided among all, so what is learned is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rankscope.analysis.process_sharing import torchrun_rank_and_size
from rankscope.errors import ConfigError, TrainingError
from rankscope.train.config import StudyConfig
from rankscope.train.task import Batch

TIMEOUT = timedelta(minutes=30)  # for a process that is still at runs of its own


class TrainingProcesses:
    """``size`` processes, of which this is number ``rank``; one alone waits for nobody.

    Attributes:
        sharded: each process keeps a part of each weight (FSDP2) rather than all of it (DDP).
    """

    def __init__(self, rank: int = 0, size: int = 1, sharded: bool = False) -> None:
        self.rank, self.size, self.sharded = rank, size, sharded

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch: (rows, …) to (rows / size, …).

        Raises:
            ConfigError: the rows cannot be shared out evenly.
        """
        if self.size == 1:
            return batch
        rows = len(next(iter(batch.values())))
        if rows % self.size:
            raise ConfigError(f"batch = {rows}: it cannot be shared out to {self.size} processes; make it a multiple")
        return {name: tensor[self.rank :: self.size] for name, tensor in batch.items()}

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training; with ``sharded``, its parameters are sharded in place."""
        if self.size == 1:
            return model
        if self.sharded:
            return shard_model(model)
        return nn.parallel.DistributedDataParallel(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor (any shape) on the CPU, in the same shape."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any of the processes says so; on the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return flag
        largest = torch.tensor([float(flag)])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return bool(largest.item())

    def wait(self) -> None:
        """Wait until all processes have come this far."""
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = TrainingProcesses()


def shard_model(model: nn.Module) -> nn.Module:
    """FSDP2: the blocks of the model one by one, so that only one is whole at a time, then what is left."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)
    return model


def gather_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every process, in its full shape (any shape); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if callable(gather) else tensor


def distribute_like(value: Tensor, target: Tensor) -> Tensor:
    """A full tensor (any shape, that of ``target``), sharded and placed as ``target`` is."""
    placed = value.to(target.device, target.dtype)
    mesh: Any = getattr(target, "device_mesh", None)
    if mesh is None:
        return placed
    from torch.distributed.tensor import distribute_tensor

    return cast(Tensor, distribute_tensor(placed, mesh, cast(Any, target).placements))


@contextmanager
def open_process_group(config: StudyConfig, device: torch.device) -> Iterator[TrainingProcesses]:
    """The processes that torchrun started, where the settings want full fine-tuning split over them; else this one.

    Raises:
        ConfigError: ``shard_model`` or ``data_parallel`` without torchrun, or settings that sharding does not go with.
        TrainingError: the others did not come, or were lost.
    """
    rank, size = torchrun_rank_and_size()
    wanted = config.shard or config.data_parallel
    if not wanted or size == 1:
        if wanted:
            raise ConfigError("shard and data_parallel split a run over processes: start them with torchrun")
        yield SINGLE_PROCESS
        return
    if config.shard and config.dtype == "float16":
        raise ConfigError("dtype = 'float16' scales losses, which sharded training cannot; take bfloat16")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A bare name stands for all devices; gloo serves CPU tensors beside nccl.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of torchrun did not find each other ({error})") from error
    try:
        yield TrainingProcesses(rank, size, config.shard)
    except RuntimeError as error:
        if "onnection" in str(error) or "gloo" in str(error) or "NCCL" in str(error):
            raise TrainingError("another process of torchrun was lost; the same command continues the study") from error
        raise
    finally:
        dist.destroy_process_group()
