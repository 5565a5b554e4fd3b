"""Consistency: the loss and the sampler where the exact answer is known, and what the loss does with its inputs."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, STD, exact, exact_consistency, flow, law, seeded_noise, start
from test_theory import section, table_after

from forward_diffusion import SCHEDULES, NoiseScheduler
from models.exact import GaussianDenoiser
from models.space import PixelSpace
from reverse_diffusion import SAMPLERS, consistency_timesteps, sample
from training.augment import AUGMENT_DIM
from training.consistency import ConsistencyLoss, Teacher
from unet import UNet, UNetConfig

COSINE = NoiseScheduler(schedule="cosine")
BATCH = 64


class AnyRange(PixelSpace):
    """Pixels beyond [-1, 1], as Gaussian ones are."""

    latent_range = math.inf


class Exact(torch.nn.Module):
    """The optimal network of the Gaussian pixels, as a teacher has it."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor):
        return exact(COSINE, "v")(x_t, t)


def make_loss(teacher: torch.nn.Module, scheduler: NoiseScheduler = COSINE, **options) -> ConsistencyLoss:
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    return ConsistencyLoss(scheduler, AnyRange(), 2, "fp32", augment="none", prediction="v", label_dropout=0.0,
                           teacher=teacher, **options)


def gaussian_images(number: int = BATCH) -> torch.Tensor:
    """Return data as encoded images are stored, float32 [number, 1 version, 1, 2, 2]."""
    return (MEAN + STD * start(number, seed=5)).float()[:, None]


def randomness(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the randomness of a step with chosen timesteps."""
    return torch.full((len(t), 8), 0.5), t, start(len(t), seed=6).float(), torch.ones(len(t), 1, dtype=torch.bool)


TIMESTEPS = torch.tensor(consistency_timesteps(1000, 4)).repeat(BATCH // 4)
LABELS = torch.zeros(BATCH, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data


def test_the_exact_function_has_no_loss_with_an_exact_teacher():
    """To the error of the teacher's steps."""
    images = gaussian_images()
    right, losses = exact_consistency(COSINE), []
    for steps in (25, 50, 100, 200):
        loss = make_loss(Exact(), teacher_steps=steps)
        losses.append(loss(right, images, LABELS, *randomness(TIMESTEPS)).item())
        wrong = loss(lambda *inputs, **_: 0.9 * right(*inputs), images, LABELS, *randomness(TIMESTEPS))
    assert losses[-1] < 2e-6 < 1e-3 < wrong
    orders = [math.log2(a / b) / 2 for a, b in zip(losses, losses[1:])]  # of the error, whose square the loss is
    assert all(order > 1.4 for order in orders), (losses, orders)


def test_a_teacher_of_few_steps_leaves_too_little_spread():
    """DIFFUSION_THEORY.md has the table."""
    rows = table_after(section(7), "| teacher's steps |")
    assert len(rows) == 5
    for steps, *cells in rows:
        *_, (_, mean, variance) = law(COSINE, network=GaussianDenoiser(MEAN, STD, COSINE), sampler="dpm++",
                                      steps=int(steps))
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-9)
        assert cells == [f"{value:.3f}" for value in (variance.sqrt() / STD).flatten().tolist()]


def test_training_finds_where_the_paths_end():
    """A network of one factor and one shift for each jump and pixel."""
    jumps = consistency_timesteps(1000, 4)
    weights = torch.nn.Parameter(torch.zeros(2, 4, 2, 2))
    abar = torch.tensor([COSINE.alpha_bar(u) for u in jumps]).float()[:, None, None, None]

    def network(x_t, t, labels, augment_labels):
        i = torch.tensor([jumps.index(u) for u in t.tolist()])
        x_0 = weights[0, i][:, None] * x_t + weights[1, i][:, None]
        return (abar[i].sqrt() * x_t - x_0) / (1 - abar[i]).sqrt()

    loss, optimizer = make_loss(Exact(), teacher_steps=100), torch.optim.Adam([weights], 0.1)
    for step in range(300):
        generator = torch.Generator().manual_seed(step)
        augment_rand, t, noise, keep_label = loss.draw_randomness(BATCH, generator, step)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        loss(network, gaussian_images(), LABELS, augment_rand, t, noise[:, :1, :2, :2], keep_label).backward()
        optimizer.step()
    x_t = start(1)
    for i, u in enumerate(jumps):
        ends = flow(COSINE, x_t, u, -1)
        torch.testing.assert_close((weights[0, i] * x_t + weights[1, i]).detach().double(), ends, rtol=0, atol=0.02)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_samples_of_the_exact_function_have_the_law_of_the_data(steps, schedule, zero_terminal_snr):
    scheduler = NoiseScheduler(1000, schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    path = law(scheduler, network=exact_consistency(scheduler), prediction="v", sampler="consistency", steps=steps)
    assert [s for s, _, _ in path] == [*consistency_timesteps(1000, steps)[1:], -1]
    for s, mean, variance in path:
        abar = scheduler.alpha_bar(s)
        torch.testing.assert_close(mean, abar**0.5 * MEAN, rtol=0, atol=1e-9)
        torch.testing.assert_close(variance, abar * STD**2 + 1 - abar, rtol=0, atol=1e-9)


def test_any_list_of_timesteps_has_it_too():
    n, calls = 4000, []
    for timesteps in ([999], [999, 430], [999, 990, 17], [998, 3, 2, 0]):
        x_T = start(n)
        images = sample(exact_consistency(COSINE), COSINE, x_T, sampler="consistency", prediction="v", clip=False,
                        timesteps=timesteps, draw_noise=seeded_noise(x_T), callback=lambda i, *_: calls.append(i))
        assert ((images.mean((0, 1)) - MEAN) / STD).abs().max() < 4 / n**0.5
        assert (images.std((0, 1)) / STD - 1).abs().max() < 4 / (2 * n) ** 0.5
    assert calls == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# the sampler


def test_the_timesteps():
    assert [consistency_timesteps(1000, steps) for steps in (1, 2, 4)] == [[999], [999, 430], [999, 750, 430, 200]]
    for T in (1, 2, 3, 20, 1000):
        for steps in {*range(1, min(T, 20) + 1), T}:
            timesteps = consistency_timesteps(T, steps)
            assert len(timesteps) == steps and timesteps[0] == T - 1 and timesteps[-1] >= 0
            assert all(t > s for t, s in zip(timesteps, timesteps[1:]))
    for steps in (0, 21):
        with pytest.raises(ValueError, match=f"steps must be in 1 ... 20, not {steps}"):
            consistency_timesteps(20, steps)


def test_a_jump_puts_all_noise_on_anew():
    x_0, x_t = start(3), start(3, seed=1)
    mean, std = SAMPLERS["consistency"].step(COSINE, x_0, x_t, 999, 430)
    noise = start(3, seed=2)
    torch.testing.assert_close(mean + std * noise, COSINE.add_noise(x_0, 430, noise))
    assert SAMPLERS["consistency"].step(COSINE, x_0, x_t, 430, -1)[0].equal(x_0)


def test_each_jump_is_clamped():
    seen = []
    sample(lambda x_t, t: torch.full_like(x_t, -9), COSINE, start(2), sampler="consistency", prediction="v", steps=2,
           clip=0.7, callback=lambda i, x_s, x_0: seen.append(x_0))
    assert [x_0.abs().max().item() for x_0 in seen] == [0.7, 0.7]


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def random_net(seed: int = 0, **changes) -> UNet:
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**dict(channels=1, width=8, multipliers=(1,), blocks=1, groups=4, num_types=2) | changes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("has_worse", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_target_is_what_the_teacher_draws_from_x_t(guidance, has_worse):
    teacher = Teacher(random_net(), guidance, random_net(seed=1) if has_worse else None)
    loss = make_loss(teacher, teacher_steps=10)
    loss.space.latent_range = 0.4
    labels, images, inputs = torch.tensor([[1, 0], [0, 0]] * (BATCH // 2)), gaussian_images(), randomness(TIMESTEPS)
    seen = []

    def student(x_t, t, labels, augment_labels):
        seen.append((x_t, labels))
        assert torch.is_grad_enabled()
        return torch.zeros_like(x_t)

    value = loss(student, images, labels, *inputs)
    (x_t, their_labels), = seen
    torch.testing.assert_close(x_t, COSINE.add_noise(images[:, 0], TIMESTEPS, inputs[2]))
    assert their_labels.equal(labels)
    errors = []
    for u, steps in zip((999, 750, 430, 200), (10, 8, 4, 2)):
        rows, abar = TIMESTEPS == u, COSINE.alpha_bar(u)
        image = sample(teacher.net, COSINE, x_t[rows], sampler="dpm++", prediction="v", labels=labels[rows],
                       guidance=guidance, worse=teacher.worse, clip=0.4, start=u, steps=steps)
        assert image.abs().max() <= 0.4
        errors.append((abar**0.5 * x_t[rows] - image).square().mean() / (1 - abar))  # v, where the student says 0
    torch.testing.assert_close(value, torch.stack(errors).mean(), rtol=1e-4, atol=0)


def test_the_teacher_is_frozen_and_told_the_augmentation():
    sizes, told = dict(channels=3, augment_dim=AUGMENT_DIM), []
    teacher, student = Teacher(random_net(**sizes).train(), guidance=2.0), random_net(**sizes)
    assert not teacher.net.training and not any(weight.requires_grad for weight in teacher.parameters())
    for net in (teacher.net, student):
        net.register_forward_pre_hook(lambda module, inputs, options: told.append(options["augment_labels"]),
                                      with_kwargs=True)
    loss = make_loss(teacher, teacher_steps=1)
    loss.augment = "full"
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment_rand = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = TIMESTEPS[:8], torch.tensor([[1, 0]] * 8)
    loss(student, images, labels, augment_rand, t, torch.zeros(8, 3, 8, 8), torch.ones(8, 1)).backward()
    whole, *parts = told
    assert len(parts) == 4 and len(whole.unique(dim=0)) == 8
    assert all(part.equal(whole[t == u].repeat(2, 1)) for part, u in zip(parts, (999, 750, 430, 200)))
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("batch_size, jumps", [(64, 4), (6, 4), (2, 4), (3, 1)])
def test_timesteps_take_turns(batch_size, jumps):
    loss = make_loss(Exact(), jumps=jumps)
    drawn = []
    for step in range(8):
        t = loss.draw_randomness(batch_size, torch.Generator().manual_seed(step), step)[1]
        assert t.equal(loss.draw_randomness(batch_size, torch.Generator().manual_seed(step), step)[1])
        drawn.append(t)
    counts = torch.cat(drawn).unique(return_counts=True)
    assert counts[0].flip(0).tolist() == consistency_timesteps(1000, jumps)
    assert counts[1].unique().tolist() == [8 * batch_size // jumps]


def test_the_flow_of_the_reference_is_that_of_the_denoiser():
    """What `exact_consistency` leads to, in many small steps of ddim with the optimal network."""
    x_T = start(8)
    images = sample(GaussianDenoiser(MEAN, STD, COSINE), COSINE, x_T, sampler="ddim", prediction="x0", clip=False)
    jumped = sample(exact_consistency(COSINE), COSINE, x_T, sampler="consistency", prediction="v", steps=1, clip=False)
    torch.testing.assert_close(images, jumped, rtol=0, atol=5e-3)
