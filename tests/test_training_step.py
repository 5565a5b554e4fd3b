"""One step of training: what makes it fast changes nothing of what it does."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import training
from augmentation import augment
from denoising import Denoising, draw_timesteps
from distributed import Processes
from forward_diffusion import NoiseScheduler, seed_from
from latents import Pixels
from training_step import Task, TrainingStep, learning_rate
from unet import UNet, UNetConfig

CPU, SIZE, BATCH = torch.device("cpu"), 16, 4
SCHEDULER = NoiseScheduler(50)
CONFIG = SimpleNamespace(batch_size=BATCH, grad_accum=1, lr=1e-3, lr_schedule="cosine", warmup_steps=2, clip_grad=0.05,
                         ema_decay=0.99, seed=3)


def network() -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def batches(steps: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
             torch.randint(2, (BATCH, 2), generator=generator, dtype=torch.uint8)) for _ in range(steps)]


def plainly(model: UNet, steps: int) -> tuple[UNet, UNet, list[float]]:
    """The same training as one writes it first, in float32: the network, its average, and the losses."""
    average = copy.deepcopy(model)
    optimizer, losses = torch.optim.Adam(model.parameters()), []
    for step, (images, types) in enumerate(batches(steps)):
        generator = torch.Generator().manual_seed(seed_from(CONFIG.seed, step, stream="step"))
        u = torch.rand(BATCH, 8, generator=generator)
        t = draw_timesteps(BATCH, 50, generator)
        noise = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        told = torch.rand(BATCH, 1, generator=generator) >= 0.5
        x_0, augmentation = augment(images, mode="full", u=u)
        output = model(SCHEDULER.add_noise(x_0, t, noise), t, types * told, augmentation=augmentation)
        loss = F.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_grad)
        optimizer.param_groups[0]["lr"] = learning_rate(CONFIG, step, steps)
        optimizer.step()
        decay = min(CONFIG.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.copy_(decay * mean + (1 - decay) * weight)
        losses.append(loss.item())
    return model, average, losses


def denoising(precision: str) -> Denoising:
    return Denoising(SCHEDULER, Pixels().prepare(None, "full", precision)[1], (3, SIZE, SIZE), CPU, precision,
                     label_dropout=0.5)


def fast(model: UNet, steps: int, precision: str, compiled: bool = False) -> tuple[TrainingStep, list[float]]:
    task = Task(model, denoising(precision).draw, denoising(precision).loss, lambda average, path: None)
    step, losses = TrainingStep(task, CONFIG, CPU, precision, Processes(), steps), []
    step.begin()
    if compiled and not step.compile(*batches(1)[0]):
        pytest.skip("no compiler")
    for number, (images, types) in enumerate(batches(steps)):
        step(images, types, number)
        losses.append(step.tally[3].item())
    return step, losses


def distance(ours: torch.nn.Module, theirs: torch.nn.Module, start: torch.nn.Module) -> float:
    """How far apart two networks are, as a part of how far they have come."""
    a, b, c = (torch.cat([p.flatten() for p in model.parameters()]) for model in (ours, theirs, start))
    return ((a - b).norm() / (b - c).norm()).item()


@pytest.mark.parametrize("precision, of_losses, of_weights", [
    ("fp32", 1e-5, 1e-3),  # the order of additions alone, which Adam's first steps can make larger
    ("bf16", 1e-2, 0.15),  # 8 bits of a number: 0.4 % for each, and Adam divides small gradients by themselves
])
def test_the_fast_step_is_the_plain_one(precision, of_losses, of_weights):
    model, average, losses = plainly(network(), 6)
    step, our_losses = fast(network(), 6, precision)
    assert our_losses == pytest.approx(losses, rel=of_losses)
    assert distance(step.model, model, network()) < of_weights
    assert distance(step.average, average, network()) < of_weights
    assert not any(ours.equal(theirs) for ours, theirs in zip(step.model.parameters(), network().parameters()))
    assert step.tally[0].item() == pytest.approx(sum(our_losses)) and step.tally[1:3].tolist() == [0, 0]


class Small(torch.nn.Module):
    """One convolution, which compiles in seconds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t, types, *, augmentation):
        return F.silu(self.conv(x_t)) * (1 + types.sum(1))[:, None, None, None]


def test_a_compiled_step_is_the_same():
    plain, losses = fast(Small(), 6, "bf16")
    compiled, its_losses = fast(Small(), 6, "bf16", compiled=True)
    assert compiled.network is not compiled.model
    assert its_losses == pytest.approx(losses, rel=1e-2)
    assert distance(compiled.model, plain.model, Small()) < 0.1


def test_a_compiler_that_fails_is_one_line_and_no_obstacle(monkeypatch, capsys):
    def broken(module):
        def call(*args, **kwargs):
            raise RuntimeError("\n\ncl.exe is not found\nand many more lines")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    task = Task(network(), denoising("fp32").draw, denoising("fp32").loss, lambda average, path: None)
    step = TrainingStep(task, CONFIG, CPU, "fp32", Processes(), 6)
    step.begin()
    assert not step.compile(*batches(1)[0])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "torch.compile does not work here (cl.exe is not found)" in said
    for number, (images, types) in enumerate(batches(6)):
        step(images, types, number)
    assert distance(step.model, plainly(network(), 6)[0], network()) < 1e-3


@pytest.mark.parametrize("device, minutes, pays", [("cpu", 4, False), ("cpu", 600, False), ("cuda", 2, False),
                                                   ("cuda", 120, True), ("mps", 600, False)])
def test_compiling_pays_in_long_runs_alone(device, minutes, pays):
    assert training.compiling_pays(60 * minutes, torch.device(device)) == pays


def test_a_recording_that_fails_half_way_does_not_spoil_the_next_step():
    """It leaves gradients that point to memory which no kernel has filled."""
    step, _ = fast(network(), 1, "fp32")
    plain, _ = fast(network(), 1, "fp32")
    for parameter in step.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    images, types = batches(2)[1]
    step(images, types, 0)
    plain(images, types, 0)
    assert all(ours.equal(theirs) for ours, theirs in zip(step.model.parameters(), plain.model.parameters()))
