"""One training step: what makes it fast does not change what it does, and its state can be restored."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from forward_diffusion import NoiseScheduler
from models.space import PixelSpace
from training.augment import augment
from training.distributed import DistEnv
from training.loss import DiffusionLoss, draw_timesteps
from training.step import TrainingStep, adam_options, learning_rate
from unet import UNet, UNetConfig
from utils.checkpoint import CheckpointError
from utils.seeding import seed_from

CPU, SIZE, BATCH = torch.device("cpu"), 16, 4
SCHEDULER = NoiseScheduler(50)
CONFIG = SimpleNamespace(batch_size=BATCH, grad_accum=1, lr=1e-3, lr_schedule="cosine", warmup_steps=2, clip_grad=0.05,
                         ema_decay=0.99, seed=3)


def network(seed: int = 0, **changes) -> UNet:
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**dict(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=2) | changes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
             torch.randint(2, (BATCH, 2), generator=generator, dtype=torch.uint8)) for _ in range(steps)]


def make_step(net: torch.nn.Module, steps: int, precision: str = "fp32", **optimizer_options) -> TrainingStep:
    loss = DiffusionLoss(SCHEDULER, PixelSpace(), SIZE, precision, label_dropout=0.5)
    optimizer = torch.optim.Adam(net.parameters(), **adam_options(CONFIG.lr, CPU) | optimizer_options)
    return TrainingStep(net, loss, optimizer, CONFIG, CPU, precision, DistEnv(), steps)


def train_plainly(net: UNet, steps: int) -> tuple[UNet, UNet, list[float]]:
    """Train in the most direct way, in float32; return the network, its EMA, and the losses."""
    ema = copy.deepcopy(net)
    optimizer, losses = torch.optim.Adam(net.parameters()), []
    for step, (images, labels) in enumerate(batches(steps)):
        # Loss.
        generator = torch.Generator().manual_seed(seed_from(CONFIG.seed, step, stream="step"))
        augment_rand = torch.rand(BATCH, 8, generator=generator)
        t = draw_timesteps(BATCH, 50, generator)
        noise = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        keep_label = torch.rand(BATCH, 1, generator=generator) >= 0.5
        x_0, augment_labels = augment(images, mode="full", augment_rand=augment_rand)
        output = net(SCHEDULER.add_noise(x_0, t, noise), t, labels * keep_label, augment_labels=augment_labels)
        loss = F.mse_loss(output, noise)
        losses.append(loss.item())

        # Update.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CONFIG.clip_grad)
        optimizer.param_groups[0]["lr"] = learning_rate(CONFIG, step, steps)
        optimizer.step()
        ema_beta = min(CONFIG.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(ema.parameters(), net.parameters()):
                mean.copy_(ema_beta * mean + (1 - ema_beta) * weight)
    return net, ema, losses


def train_fast(net: torch.nn.Module, steps: int, precision: str, compiled: bool = False
               ) -> tuple[TrainingStep, list[float]]:
    step, losses = make_step(net, steps, precision), []
    step.begin()
    if compiled:
        assert step.compile(*batches(1)[0])
    for number, (images, labels) in enumerate(batches(steps)):
        step(images, labels, number)
        losses.append(step.stats().last_loss)
    return step, losses


def distance(ours: torch.nn.Module, theirs: torch.nn.Module, start: torch.nn.Module) -> float:
    """Return how far apart two networks are, as a fraction of how far they have come."""
    a, b, c = (torch.cat([p.flatten() for p in net.parameters()]) for net in (ours, theirs, start))
    return ((a - b).norm() / (b - c).norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# the step


@pytest.mark.parametrize("precision, of_losses, of_weights", [
    ("fp32", 1e-5, 1e-3),  # the order of additions alone, which Adam's first steps can amplify
    ("bf16", 1e-2, 0.15),  # 8 bits of a number: 0.4 % for each, and Adam divides small gradients by themselves
])
def test_the_fast_step_is_the_plain_one(precision, of_losses, of_weights):
    net, ema, losses = train_plainly(network(), 6)
    step, our_losses = train_fast(network(), 6, precision)
    assert our_losses == pytest.approx(losses, rel=of_losses)
    assert distance(step.raw_net, net, network()) < of_weights
    assert distance(step.ema, ema, network()) < of_weights
    assert not any(ours.equal(theirs) for ours, theirs in zip(step.raw_net.parameters(), network().parameters()))
    stats = step.stats()
    assert stats.loss_sum == pytest.approx(sum(our_losses)) and (stats.skipped, stats.skipped_in_a_row) == (0, 0)
    step.reset_counts()
    assert step.stats().loss_sum == 0 and step.stats().last_loss == our_losses[-1]


class Small(torch.nn.Module):
    """One convolution, which is traced in no time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t, labels, *, augment_labels):
        return F.silu(self.conv(x_t)) * (1 + labels.sum(1))[:, None, None, None]


def test_a_compiled_step_is_the_same(monkeypatch):
    """The network is traced, forward and backward, but without the C++ compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, losses = train_fast(Small(), 6, "bf16")
    compiled, compiled_losses = train_fast(Small(), 6, "bf16", compiled=True)
    assert compiled.net is not compiled.raw_net
    assert compiled_losses == pytest.approx(losses, rel=1e-2)
    assert distance(compiled.raw_net, plain.raw_net, Small()) < 0.1


def test_a_compiler_that_fails_is_reported_in_one_line_and_no_obstacle(monkeypatch, capsys):
    def broken(module):
        def call(*args, **kwargs):
            raise RuntimeError("\n\ncl.exe is not found\nand many more lines")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    step = make_step(network(), 6)
    step.begin()
    assert not step.compile(*batches(1)[0])
    announced, note = capsys.readouterr().out.splitlines()
    assert "compiling" in announced and "torch.compile does not work here (cl.exe is not found)" in note
    for number, (images, labels) in enumerate(batches(6)):
        step(images, labels, number)
    assert distance(step.raw_net, train_plainly(network(), 6)[0], network()) < 1e-3


def test_a_recording_that_fails_half_way_does_not_spoil_the_next_step():
    """It leaves gradients that point to memory which no kernel has filled."""
    step, _ = train_fast(network(), 1, "fp32")
    plain, _ = train_fast(network(), 1, "fp32")
    for parameter in step.raw_net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    images, labels = batches(2)[1]
    step(images, labels, 0)
    plain(images, labels, 0)
    assert all(ours.equal(theirs) for ours, theirs in zip(step.raw_net.parameters(), plain.raw_net.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# its state


def stepped(seed: int, **options) -> TrainingStep:
    """Return a step after one gradient of a network without labels."""
    net = network(seed, num_types=0)
    step = make_step(net, 6, **options)
    net(torch.ones(1, 3, 8, 8), torch.tensor([seed])).sum().backward()
    step.optimizer.step()
    return step


def state_of(step: TrainingStep) -> dict:
    return copy.deepcopy(dict(step.state(), ema=step.ema.state_dict()))


def test_the_state_of_a_step_can_be_restored():
    step, other = stepped(1), stepped(2)
    step._stats += torch.tensor([5.0, 1.0, 2.0, 0.5])
    state = state_of(step)
    state["optimizer"]["param_groups"][0]["lr"] = "not a number"  # options come from the code, never from a file
    other.load_state("a.pt", state)
    assert all(a.equal(b) for a, b in zip(step.raw_net.parameters(), other.raw_net.parameters()))
    assert all(a.equal(b) for a, b in zip(step.ema.parameters(), other.ema.parameters()))
    assert other.optimizer.param_groups[0]["lr"] == CONFIG.lr
    for p, q in zip(step.raw_net.parameters(), other.raw_net.parameters()):
        ours, theirs = step.optimizer.state[p], other.optimizer.state[q]
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert other.stats() == step.stats() and step.stats().skipped_in_a_row == 2


def test_a_training_continues_the_same_on_a_device_with_another_memory_format():
    """Channels last on a GPU, contiguous on a CPU: fused Adam relies on moments that lie in memory as weights do."""
    def next_step(fused: bool) -> list[torch.Tensor]:
        state = state_of(stepped(1))
        for moments in state["optimizer"]["state"].values():
            for name, value in moments.items():
                moments[name] = value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        other = make_step(network(2, num_types=0), 6, fused=fused)
        other.load_state("a.pt", state)
        other.raw_net(torch.ones(1, 3, 8, 8), torch.tensor([3])).square().sum().backward()
        other.optimizer.step()
        return list(other.raw_net.parameters())

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(next_step(True), next_step(False)))


@pytest.mark.parametrize("damage", [
    lambda c: c.pop("model"), lambda c: c.update(model=3), lambda c: c["model"].pop("conv_in.bias"),
    lambda c: c["model"].update({"conv_in.bias": torch.zeros(3)}), lambda c: c["model"].update(more=torch.zeros(1)),
    lambda c: c["model"]["conv_in.bias"].fill_(float("nan")), lambda c: c["ema"]["conv_in.bias"].fill_(float("inf")),
    lambda c: c.pop("ema"), lambda c: c.pop("optimizer"), lambda c: c.update(optimizer=[]),
    lambda c: c["optimizer"]["state"][0].clear(),
    lambda c: c["optimizer"]["state"].pop(0),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    lambda c: c["optimizer"]["state"].update({9999: {}}), lambda c: c["optimizer"]["state"][0].update(exp_avg="zero"),
    lambda c: c["scaler"].pop("scale"), lambda c: c.update(scaler=3),
    lambda c: c.pop("stats"), lambda c: c["stats"].update(more=1.0), lambda c: c["stats"].update(loss_sum="zero"),
    lambda c: c["stats"].update(loss_sum=[0.0]), lambda c: c.update(stats=[0.0, 0.0, 0.0, 0.0]),
])
def test_a_state_that_does_not_fit_is_refused(damage):
    step = stepped(1, precision="fp16")
    state = state_of(step)
    damage(state)
    with pytest.raises(CheckpointError) as refused:
        step.load_state(Path("a.pt"), state)
    assert "a.pt" in str(refused.value) and "\n" not in str(refused.value)
