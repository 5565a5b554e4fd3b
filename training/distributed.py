"""Training in one process, or in several that torchrun starts, each with its part of every batch.

    torchrun --nproc_per_node=8 train.py --batch_size 256                       # eight GPUs of one machine
    torchrun --nproc_per_node=2 train.py --preset quick --device cpu            # two processes on a CPU

The batch of a step does not depend on the number of processes: each takes its slice of it, DistributedDataParallel
averages the gradients, and every process makes the same update. With a single process nothing here has an effect.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.device import pick_device

TIMEOUT = timedelta(hours=1)  # of the other processes, which wait while the main one draws a grid or saves


class DistEnv:
    """The processes of this training, as torchrun describes them.

    Attributes:
        rank, world_size, local_rank: as torch.distributed has them; 0, 1 and 0 without torchrun.
        is_main: this is the process that writes and prints.
    """

    def __init__(self):
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
            try:
                self.rank, self.world_size, self.local_rank = (
                    int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            except ValueError as error:
                raise ValueError("RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets, must be numbers") from error
        self.is_main = self.rank == 0

    def pick_device(self, name: str) -> torch.device:
        """Return the device of this process: `name`, or one GPU for each process of a machine. Raises ValueError."""
        if self.world_size > 1:
            if name == "auto":
                name = "cuda" if torch.cuda.is_available() else "cpu"
            if name not in ("cuda", "cpu"):
                raise ValueError(f"several processes train on --device cuda, one GPU each, or on cpu; not on {name}")
            if name == "cuda" and not self.local_rank < torch.cuda.device_count():
                raise ValueError(f"this machine has {torch.cuda.device_count()} GPUs, too few for one a process; "
                                 f"give torchrun a smaller --nproc_per_node, or --device cpu")
            name += f":{self.local_rank}" if name == "cuda" else ""
        return pick_device(name)

    def rank_slice(self, batch_size: int, grad_accum: int) -> slice:
        """Return this process's part of a batch. Raises ValueError if the batch cannot be divided evenly."""
        if batch_size % (self.world_size * grad_accum):
            raise ValueError(f"--batch_size {batch_size} cannot be divided evenly among {self.world_size} processes "
                             f"times --grad_accum {grad_accum}; choose a multiple of {self.world_size * grad_accum}")
        part = batch_size // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)

    def init(self, device: torch.device) -> None:
        """Join the other processes, once: NCCL for tensors on a GPU, gloo for those on the CPU."""
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)

    def wait(self) -> None:
        """Return when all processes are here, and so the main one has written its files."""
        self.all_max(0)

    def finalize(self) -> None:
        """Leave once all processes are here: torchrun ends the main one, which may still be writing, if another fails
        before it."""
        if self.world_size > 1:
            self.wait()
            dist.destroy_process_group()

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the network with gradients that are averaged over all processes."""
        if self.world_size == 1:
            return net
        # Buffers are the same everywhere; sending them would ask all processes for the same number of passes.
        return DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of x over all processes, on its device, without waiting for it."""
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def all_max(self, number: int) -> int:
        """Return the largest of the processes' numbers. It travels by gloo, so no GPU is waited for.

        A process that has died is noticed here, within a moment.
        """
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def check_same(self, value: Any, what: str) -> None:
        """Raise ValueError, in every process, if `value` differs between them."""
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
            if any(other != values[0] for other in values):
                raise ValueError(f"the processes of this training do not have the same {what}: make sure that all "
                                 f"machines have the same folders")

    @contextlib.contextmanager
    def main_process_output(self) -> Iterator[None]:
        """Print from the main process only; of several processes, end each at the end of the block.

        Use it around `utils.errors.one_line_errors`. Nothing after the `with` block happens in several processes.
        """
        if self.world_size == 1:
            yield
            return
        message, status = "", 0
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            try:
                yield
            except SystemExit as stopped:
                message, status = (stopped.code, 1) if isinstance(stopped.code, str) else ("", stopped.code or 0)
            except BaseException as error:
                message, status = traceback.format_exc().rstrip(), 1
                lost_another = re.search("gloo|nccl|connection|peer|socket", str(error), re.IGNORECASE)
                if isinstance(error, RuntimeError) and lost_another:
                    message = ("error: another process of this training has ended; its own message says why. "
                               "--resume continues")
        _end_process(self.is_main, message, status)


def _end_process(is_main: bool, message: str, status: int) -> NoReturn:
    """End this process without tearing the interpreter down, which can hang or abort in gloo's threads."""
    if 0 < status < 128 and not is_main:
        # torchrun ends all processes when one has failed. The main one should have spoken by then; if it has the same
        # to say, this one is ended before it speaks.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(5)
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr, flush=True)
    os._exit(status)
