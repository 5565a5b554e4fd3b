"""One training step: loss, gradient, Adam and EMA, without waiting for the device (but for a teacher).

    step = TrainingStep(net, loss, optimizer, config, device, precision, dist, total_steps)
    step.begin()
    step(images, labels, number)        # step `number` of the run, counted from 0
    step.stats().last_loss              # waits for the device

What makes it fast, where it applies: bfloat16 (utils/device.py), torch.compile, fused Adam, an EMA in three
operations, no synchronisation, and on CUDA the whole step as one graph.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.config import TrainingConfig
from training.distributed import DistEnv
from utils.checkpoint import CheckpointError, check_finite
from utils.cuda_graph import CUDAGraphed
from utils.errors import first_line
from utils.seeding import seed_from


def adam_options(lr: float, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of torch.optim.Adam that suit the device."""
    on_gpu = device.type == "cuda"
    # On a GPU the learning rate is a number in its memory, which a recorded step reads anew each time.
    rate = torch.tensor(lr, device=device) if on_gpu else lr
    return dict(lr=rate, fused=device.type in ("cuda", "cpu"), capturable=on_gpu)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / total_steps)) if config.lr_schedule == "cosine" else 1.0
    return config.lr * rise * fall


@dataclass
class Stats:
    """What happened since the counts were reset.

    Attributes:
        loss_sum: of the steps that were not skipped.
        skipped: steps whose loss or gradient was not finite.
        skipped_in_a_row: skipped since the last good step.
        last_loss: of the newest step.
    """

    loss_sum: float = 0.0
    skipped: float = 0.0
    skipped_in_a_row: float = 0.0
    last_loss: float = 0.0


class TrainingStep:
    """The network, its EMA, its optimizer, and the update of all three.

    Args:
        net: the network, on its device.
        loss: has `draw_randomness` and `__call__`, see training/loss.py.
        config: a TrainingConfig.
        total_steps: of the whole run, over which a cosine learning rate falls.
        guide_step: number of steps after which `earlier` is made; 0: never.

    Attributes:
        raw_net, ema: the network and its exponential moving average, from which samples are drawn.
        earlier: the EMA as it was after `guide_step` steps, for guidance; None until then.
        ddp: the network with gradients averaged over processes; from `begin` on.
        net: `ddp`, compiled if `compile` succeeded; from `begin` on.
        teacher, critic: of a loss that has them, see training/consistency.py; the critic is trained as well.
    """

    def __init__(self, net: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, config: TrainingConfig,
                 device: torch.device, precision: str, dist: DistEnv, total_steps: int, guide_step: int = 0):
        self.raw_net, self.loss, self.optimizer, self.config = net, loss, optimizer, config
        self.device, self.precision, self.dist, self.total_steps = device, precision, dist, total_steps
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.earlier: nn.Module | None = None
        self.guide_step = guide_step
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # about steps made before the recording
        # float16 has no room for small gradients: the scaler multiplies the loss as far as nothing overflows.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        for group in optimizer.param_groups:  # on CUDA the rate is a tensor, which all groups would share
            group["lr"] = copy.deepcopy(group["lr"])
        self._stats = torch.zeros(4, device=device)  # the fields of Stats, kept on the device
        self.rank_slice = dist.rank_slice(config.batch_size, config.grad_accum)
        self.generator = torch.Generator(device)
        self.has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in net.modules())
        self.teacher: nn.Module | None = getattr(loss, "teacher", None)
        self.critic: nn.Module | None = getattr(loss, "critic", None)
        self._choose_how_to_run()

    # -----------------------------------------------------------------------------------------------------------------
    # before the first step

    def load_state(self, path: str | Path, checkpoint: dict[str, Any]) -> None:
        """Restore network, EMA, optimizer, scaler, stats, teacher and critic from the latest.pt at `path`.

        Raises:
            CheckpointError: if they do not fit, or a weight is not finite.
        """
        try:
            self.raw_net.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["ema"])
            if self.guide_step and "earlier" in checkpoint:
                self.earlier = copy.deepcopy(self.ema)
                self.earlier.load_state_dict(checkpoint["earlier"])
            if self.teacher is not None:
                self.teacher.load_state_dict(checkpoint["teacher"])
                self.critic.load_state_dict(checkpoint["critic"])
            _load_adam(self.optimizer, checkpoint["optimizer"]["state"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:  # else this run or the one before needs none
                self.scaler.load_state_dict(checkpoint["scaler"])
            self._stats += torch.tensor(list(asdict(Stats(**checkpoint["stats"])).values()), device=self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not fit the network that its own settings describe; choose another "
                                  f"file") from error
        networks = (self.raw_net, self.ema, self.earlier, self.teacher, self.critic)
        check_finite(path, *(net for net in networks if net is not None))

    def state(self) -> dict[str, Any]:
        """Return what `load_state` restores, less the EMA."""
        state = dict(model=self.raw_net.state_dict(), optimizer=self.optimizer.state_dict(),
                     scaler=self.scaler.state_dict(), stats=asdict(self.stats()))
        if self.teacher is not None:  # a run must not depend on the file that its teacher came from
            state |= dict(teacher=self.teacher.state_dict(), critic=self.critic.state_dict())
        return state

    def ema_state(self) -> dict[str, Any]:
        """Return the EMA, and the earlier one, as every checkpoint holds them."""
        earlier = {} if self.earlier is None else dict(earlier=self.earlier.state_dict())
        return dict(ema=self.ema.state_dict(), **earlier)

    def begin(self) -> None:
        """Prepare the first step, after anything was restored; the processes must have met."""
        self.net = self.ddp = self.dist.wrap(self.raw_net)
        self.weights, self.ema_weights = list(self.raw_net.parameters()), list(self.ema.parameters())
        self.raw_net.train()
        self.trained = self.weights
        if self.critic is not None:
            self.loss.critic = self.dist.wrap(self.critic.train())
            self.trained = [*self.weights, *self.critic.parameters()]

    def compile(self, images: torch.Tensor, labels: torch.Tensor) -> bool:
        """Compile the network for batches of such images and labels.

        Returns False, after a line that says why, where that does not work.
        """
        print("compiling the network, which takes a minute or two")
        self.net = torch.compile(self.ddp)
        self._meet_in_backward(False)  # each process tries alone
        try:  # forward and backward, so that what cannot be compiled is known now
            count = (self.rank_slice.stop - self.rank_slice.start) // self.config.grad_accum
            images, labels = (x[:1].to(self.device).repeat(count, *[1] * (x.ndim - 1)) for x in (images, labels))
            randomness = self.loss.draw_randomness(self.config.batch_size, self.generator.manual_seed(0), 0)
            self.loss(self.net, images, labels, *(x[:count] for x in randomness)).backward()
        except Exception as error:  # a compiler can be missing, or fail, in more ways than have a name
            print(f"note: torch.compile does not work here ({first_line(error)}); continuing without")
            self.net = self.ddp
        if self.dist.all_max(int(self.net is self.ddp)):  # it failed in one process: then in none
            self.net = self.ddp
        self.optimizer.zero_grad(set_to_none=True)
        self._choose_how_to_run()  # a graph recorded before belongs to the network as it was
        return self.net is not self.ddp

    def run_eagerly(self) -> None:
        """Do without a CUDA graph from now on, so that a profiler sees the operations."""
        self.compute = self._compute

    def _choose_how_to_run(self) -> None:
        recordable = (self.device.type == "cuda" and not self.scaler.is_enabled() and self.dist.world_size == 1
                      and not self.has_dropout and self.teacher is None)  # a teacher's images wait for the host
        self.compute: Callable[..., None] = CUDAGraphed(self._compute) if recordable else self._compute

    # -----------------------------------------------------------------------------------------------------------------
    # the step

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        """Make step `number` with this process's part of its batch: images as the data set has them, labels [b, K].

        All randomness of a step follows from the seed and its number, so that a resumed run repeats it exactly. It is
        drawn for the whole batch, and each process takes its slice: cheap next to the network, and the same step in
        any number of processes and parts (but for --latent_noise, see `Autoencoder.forward`).
        """
        config = self.config
        generator = self.generator.manual_seed(seed_from(config.seed, number, stream="step"))
        randomness = self.loss.draw_randomness(config.batch_size, generator, number)
        rate = learning_rate(config, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group_rate = config.lr * group["rate"] if "rate" in group else rate
            group["lr"] = group["lr"].fill_(group_rate) if isinstance(group["lr"], torch.Tensor) else group_rate
        # EMA warm-up: with the full decay the average would stay near the random start.
        ema_beta = min(config.ema_decay, (1 + number) / (10 + number))
        self.number = number
        self.compute(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True),
                     torch.full((), 1 - ema_beta, device=self.device), *(x[self.rank_slice] for x in randomness))
        # A resumed run whose length or --guide_at was changed can be past that step, or reach it a second time.
        if self.guide_step and (number + 1 == self.guide_step or self.earlier is None and number >= self.guide_step):
            self.earlier = copy.deepcopy(self.ema)

    def _compute(self, images: torch.Tensor, labels: torch.Tensor, ema_rate: torch.Tensor,
                 *randomness: torch.Tensor) -> None:
        """Make the update: tensors of the device in, all results in tensors that stay where they are."""
        # Gradient, part by part.
        self.optimizer.zero_grad(set_to_none=True)  # a failed recording leaves gradients that were never computed
        num_parts = self.config.grad_accum
        loss = torch.zeros((), device=self.device)
        for part, inputs in enumerate(zip(*(x.chunk(num_parts) for x in (images, labels, *randomness)))):
            if self.has_dropout:  # drawn inside the network, and therefore part by part
                torch.manual_seed(seed_from(self.config.seed, self.number, self.rank_slice.start, part,
                                            stream="dropout"))
            self._meet_in_backward(part == num_parts - 1)
            part_loss = self.loss(self.net, *inputs) / num_parts
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        # Adam. A step whose loss or gradient is not finite changes nothing. That is decided on the device, where fused
        # Adam and the EMA look at `finite`; asking for its value here would make the host wait.
        self.scaler.unscale_(self.optimizer)
        # One norm for network and critic: a step that is too large for one of them is made smaller for both.
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad)
        loss = self.dist.mean(loss)
        finite = torch.isfinite(loss + norm)
        skip = 1 - finite.float()
        self.optimizer.found_inf = skip
        if self.optimizer.defaults["fused"] or finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        # EMA and stats.
        with torch.no_grad():
            change = torch._foreach_sub(self.weights, self.ema_weights)
            torch._foreach_mul_(change, finite * ema_rate)
            torch._foreach_add_(self.ema_weights, change)
            loss_sum, skipped, in_a_row, _ = self._stats
            self._stats.copy_(torch.stack([loss_sum + loss.where(finite, 0), skipped + skip, (in_a_row + 1) * skip,
                                           loss]))

    def _meet_in_backward(self, value: bool) -> None:
        """Set whether the processes average their gradients in the next backward pass."""
        for net in (self.ddp, *([] if self.critic is None else [self.loss.critic])):
            net.require_backward_grad_sync = value

    def stats(self) -> Stats:
        """Read the stats; this waits for the device."""
        return Stats(*self._stats.tolist())

    def reset_counts(self) -> None:
        """Start `loss_sum` and `skipped` anew."""
        self._stats[:2] = 0


def _load_adam(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, torch.Tensor]]) -> None:
    """Restore Adam's moments. Raises ValueError if they belong to other weights, which PyTorch does not check."""
    groups = optimizer.state_dict()["param_groups"]  # the options are the code's; the file has the moments
    if state.keys() != {i for group in groups for i in group["params"]}:
        raise ValueError("the moments of another number of weights")
    optimizer.load_state_dict(dict(state=state, param_groups=groups))
    for parameter, moments in optimizer.state.items():
        shapes = {name: value.shape for name, value in moments.items()}
        if shapes != dict(step=torch.Size([]), exp_avg=parameter.shape, exp_avg_sq=parameter.shape):
            raise ValueError("the moments of other weights")
        for name in ("exp_avg", "exp_avg_sq"):
            # In the weights' own memory format, on which fused Adam relies: another device may have another.
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
