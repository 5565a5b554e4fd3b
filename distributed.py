"""One training in one process, or in many that torchrun starts; each does its share of every batch.

    torchrun --nproc_per_node=8 train.py --batch_size 256                       # eight GPUs of one machine
    torchrun --nproc_per_node=2 train.py --preset quick --device cpu            # two processes on a CPU

The batch of a step is the same whatever the number of processes: each takes its part of it, DistributedDataParallel
averages the gradients, and every process makes the same step. In a single process nothing here does anything.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from devices import pick_device

PATIENCE = timedelta(hours=1)  # for the others, who wait while the first draws a grid or saves


class Processes:
    """The processes of this training, as torchrun tells of them: `size` of them, of which this is number `rank`.

    The first one, rank 0, is the one that writes and speaks.
    """

    def __init__(self):
        started = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
        alone = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
        self.rank, self.size, self.local_rank = (int((os.environ if started else alone)[name]) for name in alone)
        self.first = self.rank == 0

    def pick_device(self, name: str) -> torch.device:
        """The device of this process: `name`, or one GPU for each process of a machine. Raises ValueError."""
        if self.size > 1:
            if name == "auto":
                name = "cuda" if torch.cuda.is_available() else "cpu"
            if name not in ("cuda", "cpu"):
                raise ValueError(f"several processes train on --device cuda, one GPU each, or on cpu; not on {name}")
            if name == "cuda" and not self.local_rank < torch.cuda.device_count():
                raise ValueError(f"this machine has {torch.cuda.device_count()} GPUs, too few for one a process; "
                                 f"give torchrun a smaller --nproc_per_node, or --device cpu")
            name += f":{self.local_rank}" if name == "cuda" else ""
        return pick_device(name)

    def share(self, batch_size: int, grad_accum: int) -> slice:
        """This process's part of a batch. Raises ValueError if the batch cannot be divided evenly."""
        if batch_size % (self.size * grad_accum):
            raise ValueError(f"--batch_size {batch_size} cannot be divided evenly among {self.size} processes times "
                             f"--grad_accum {grad_accum}; choose a multiple of {self.size * grad_accum}")
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def join(self, device: torch.device) -> None:
        """Meet the others. Tensors on a GPU will travel by NCCL, those on the CPU by gloo."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)

    def leave(self) -> None:
        """Part from the others once all have come here: torchrun ends the first, which may still be writing, if one of
        the others ends badly before it."""
        if self.size > 1:
            self.largest(0)  # which comes back when all have asked
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, which from now on averages its gradients over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of x over all processes, on its device, without waiting for it."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. It travels by gloo, between the hosts: no GPU is waited for.

        It is also where a process notices, within a moment, that another one has died.
        """
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def check_same(self, value: Any, what: str) -> None:
        """Raise ValueError, in every process, if `value` is not the same in all of them."""
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
            if any(other != values[0] for other in values):
                raise ValueError(f"the processes of this training do not have the same {what}: see to it that all "
                                 f"machines have the same folders")
