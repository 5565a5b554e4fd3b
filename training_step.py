"""One step of training, made fast: loss, gradient, Adam, moving average, and nothing that waits for the machine.

    step = TrainingStep(task, config, device, precision, Processes())
    step(images, types, number)         # step `number` of the run, counted from 0
    step.tally.tolist()                 # what happened since it was set to 0; this waits for the device

What makes it fast, each where it holds: bfloat16 (devices.py), `torch.compile` where the run is long enough to earn
it, fused Adam, an average in three operations, no wait for the device, and on CUDA the whole step as one graph, which
the GPU repeats without Python.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from devices import Recorded, first_line
from distributed import Processes
from forward_diffusion import seed_from


@dataclass
class Task:
    """What is to be learned: all in which one training differs from another.

    Attributes:
        model: the network, on its device.
        draw: (batch size B, generator) -> all random tensors of a step, [B, ...] each, on the generator's device.
        loss: (network, images as the data set has them, types uint8 [b, K], *drawn) -> the mean loss, for part of a
            batch and the same part of what was drawn for it. It calls `network` as it would `model`.
        picture: (network, path): writes a picture of what the averaged network can do.
        measure: (network) -> figures of it by the names in `measures`, which metrics.csv gets with each picture.
        content: what a checkpoint must hold to rebuild all this, besides the weights.
        shows, next_command: what the picture shows, and what to do with the final checkpoint, for the last line.
    """

    model: nn.Module
    draw: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    loss: Callable[..., torch.Tensor]
    picture: Callable[[nn.Module, Path], None]
    content: dict[str, Any] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    measure: Callable[[nn.Module], dict[str, float]] = lambda network: {}
    shows: str = "samples"
    next_command: str = "for more: python generate.py --checkpoint"


class TrainingStep:
    """The network that learns, its moving average, its optimizer, and the step that changes them.

    Args:
        config: a TrainingConfig, see training.py.
        total_steps: of the whole run, over which the learning rate falls.

    Attributes:
        model, average: the network and its average, which is what pictures are drawn with.
        tally: float32 [4] on the device: the sum of the losses, the steps that were skipped because their loss or
            gradient was not finite, those skipped in a row until now, and the last loss. Set the first two to 0 to
            begin anew.
    """

    def __init__(self, task: Task, config: Any, device: torch.device, precision: str, processes: Processes,
                 total_steps: int):
        self.config, self.device, self.processes, self.total_steps = config, device, processes, total_steps
        self.model, self.draw, self.loss = task.model, task.draw, task.loss
        self.average = copy.deepcopy(task.model).eval().requires_grad_(False)
        on_gpu = device.type == "cuda"
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # of steps that are made before the recording
        # On a GPU the rate is a number in its memory, which a recorded step reads anew each time.
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=torch.tensor(config.lr, device=device) if on_gpu else config.lr,
            fused=device.type in ("cuda", "cpu"), capturable=on_gpu,
        )
        # float16 has no room for small gradients: the scaler multiplies the loss by as much as does not overflow.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.tally = torch.zeros(4, device=device)
        self.share = processes.share(config.batch_size, config.grad_accum)
        self.generator = torch.Generator(device)
        self.has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.model.modules())
        self._choose_how_to_run()

    def begin(self) -> None:
        """Make ready for the first step, after what was restored: meet the other processes."""
        self.network = self.wrapped = self.processes.wrap(self.model)
        self.weights, self.averages = list(self.model.parameters()), list(self.average.parameters())
        self.model.train()

    def compile(self, images: torch.Tensor, types: torch.Tensor) -> bool:
        """Have the network compiled, for batches of such images and types; False, with a line that says why, where that
        does not work."""
        self.network = torch.compile(self.wrapped)
        self.wrapped.require_backward_grad_sync = False  # each process tries alone
        try:  # forward and backward, so that what cannot be compiled is known now
            count = (self.share.stop - self.share.start) // self.config.grad_accum
            images, types = (x[:1].to(self.device).repeat(count, *[1] * (x.ndim - 1)) for x in (images, types))
            drawn = self.draw(self.config.batch_size, self.generator.manual_seed(0))
            self.loss(self.network, images, types, *(x[:count] for x in drawn)).backward()
        except Exception as error:  # a compiler can be missing, or fail, in more ways than have a name
            print(f"note: torch.compile does not work here ({first_line(error)}); it goes on without")
            self.network = self.wrapped
        if self.processes.largest(int(self.network is self.wrapped)):  # it failed in one: then none
            self.network = self.wrapped
        self.optimizer.zero_grad(set_to_none=True)
        self._choose_how_to_run()  # a graph recorded before is of the network as it was
        return self.network is not self.wrapped

    def _choose_how_to_run(self) -> None:
        recordable = (self.device.type == "cuda" and not self.scaler.is_enabled() and self.processes.size == 1
                      and not self.has_dropout)
        self.compute = Recorded(self._compute) if recordable else self._compute

    def __call__(self, images: torch.Tensor, types: torch.Tensor, number: int) -> None:
        """Make step `number` with this process's share of its batch: images as the data set has them, types [b, K].

        All randomness of a step comes from the seed and its number, so that a resumed run repeats it exactly. It is
        drawn for the whole batch, of which this process takes its share: that costs little next to the network, and
        gives the same step in any number of processes and parts.
        """
        config = self.config
        drawn = self.draw(config.batch_size, self.generator.manual_seed(seed_from(config.seed, number, stream="step")))
        rate = learning_rate(config, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        # The average follows the weights closely at first: with the full decay it would stay near the random start.
        follow = torch.full((), 1 - min(config.ema_decay, (1 + number) / (10 + number)), device=self.device)
        self.number = number
        self.compute(images.to(self.device, non_blocking=True), types.to(self.device, non_blocking=True), follow,
                     *(x[self.share] for x in drawn))

    def _compute(self, images: torch.Tensor, types: torch.Tensor, follow: torch.Tensor, *drawn: torch.Tensor) -> None:
        """The step itself: tensors of the device in, and all of its results in tensors that stay where they are."""
        self.optimizer.zero_grad(set_to_none=True)  # a recording that failed leaves gradients that were never computed
        parts = self.config.grad_accum
        loss = torch.zeros((), device=self.device)
        for part, inputs in enumerate(zip(*(x.chunk(parts) for x in (images, types, *drawn)))):
            if self.has_dropout:  # the one thing that is drawn inside of the network, and so part by part
                torch.manual_seed(seed_from(self.config.seed, self.number, self.share.start, part, stream="dropout"))
            self.wrapped.require_backward_grad_sync = part == parts - 1  # the processes meet at the last part
            part_loss = self.loss(self.network, *inputs) / parts
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.clip_grad)
        loss = self.processes.mean(loss)
        # A step whose loss or gradient is not finite is skipped: nothing changes. This is decided on the device, where
        # fused Adam and the factor of the average look at `finite`; asking for it here would make the host wait.
        finite = torch.isfinite(loss + norm)
        skip = 1 - finite.float()
        self.optimizer.found_inf = skip
        if self.optimizer.defaults["fused"] or finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            change = torch._foreach_sub(self.weights, self.averages)
            torch._foreach_mul_(change, finite * follow)
            torch._foreach_add_(self.averages, change)
            total, skipped, in_a_row, _ = self.tally
            self.tally.copy_(torch.stack([total + loss.where(finite, 0), skipped + skip, (in_a_row + 1) * skip, loss]))


def learning_rate(config: Any, step: int, total_steps: int) -> float:
    """The rate at one step: a linear rise, then level, or half a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / total_steps)) if config.lr_schedule == "cosine" else 1.0
    return config.lr * rise * fall
