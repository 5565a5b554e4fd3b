"""Consistency: the loss and the sampler where the exact answer is known, and what the loss does with its inputs."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, STD, exact_consistency, flow, law, seeded_noise, start
from test_theory import section, table_after

from forward_diffusion import SCHEDULES, NoiseScheduler
from models.exact import GaussianDenoiser
from models.space import PixelSpace
from reverse_diffusion import SAMPLERS, consistency_timesteps, ddim_step, sample
from training.consistency import ConsistencyLoss, lower_timesteps
from unet import UNet, UNetConfig

COSINE = NoiseScheduler(schedule="cosine")
GAPS = (2, 3, 4, 8, 16, 64)
BATCH = 64


class AnyRange(PixelSpace):
    """Pixels beyond [-1, 1], as Gaussian ones are."""

    latent_range = math.inf


def make_loss(scheduler: NoiseScheduler = COSINE, **options) -> ConsistencyLoss:
    return ConsistencyLoss(scheduler, AnyRange(), 2, "fp32", augment="none", prediction="v",
                           **dict(label_dropout=0.0, anchor=0.0) | options)


def gaussian_images(std: torch.Tensor = STD) -> torch.Tensor:
    """Return data as encoded images are stored, float32 [BATCH, 1 version, 1, 2, 2]."""
    return (MEAN + std * start(BATCH, seed=5)).float()[:, None]


def randomness(t: torch.Tensor, gap: int) -> tuple[torch.Tensor, ...]:
    """Return the randomness of a step with chosen timesteps."""
    r = t - torch.ceil((t + 1) / gap).long()
    return torch.full((len(t), 8), 0.5), t, start(len(t), seed=6).float(), torch.ones(len(t), 1, dtype=torch.bool), r


SPREAD = torch.linspace(0, 999, BATCH).long()
LABELS = torch.zeros(BATCH, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data


class OnTheFlow(torch.nn.Module):
    """A teacher whose step of DDIM, of the length that the gap says, ends exactly where the probability flow does."""

    def __init__(self, gap: int):
        super().__init__()
        self.gap = gap

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *_, **__) -> torch.Tensor:
        outputs = []
        for x, u in zip(x_t.double(), t.tolist()):
            a, b = COSINE.alpha_bar(u) ** 0.5, (1 - COSINE.alpha_bar(u)) ** 0.5
            s = max(u - math.ceil((u + 1) / self.gap), 0)
            a_s, b_s = COSINE.alpha_bar(s) ** 0.5, (1 - COSINE.alpha_bar(s)) ** 0.5
            x_0 = x if s == u else (flow(COSINE, x, u, s) - b_s / b * x) / (a_s - b_s * a / b)
            outputs.append((a * x - x_0) / b)
        return torch.stack(outputs).float()


@pytest.mark.parametrize("gap", GAPS)
def test_along_the_flow_the_exact_function_has_no_loss_for_any_gap(gap):
    """Of images on one path of the flow, as an exact teacher gives them; t = 0 is compared with the image itself."""
    loss = make_loss(teacher=OnTheFlow(gap))
    t = SPREAD.clamp(min=1)
    value = loss(exact_consistency(COSINE), gaussian_images(), LABELS, *randomness(t, gap))
    wrong = loss(lambda *inputs, **_: 0.9 * exact_consistency(COSINE)(*inputs), gaussian_images(), LABELS,
                 *randomness(t, gap))
    assert value < 2e-6 < 1e-2 < wrong


@pytest.mark.parametrize("gap", GAPS)
def test_for_a_single_image_lines_are_paths_and_the_exact_function_has_no_loss(gap):
    """x_t and x_r of one noise are on one path of the flow if there is but one image."""
    network = exact_consistency(COSINE, std=0 * STD)
    assert make_loss()(network, gaussian_images(0 * STD), LABELS, *randomness(SPREAD, gap)) < 2e-6
    assert make_loss()(exact_consistency(COSINE, MEAN + 0.1, 0 * STD), gaussian_images(0 * STD), LABELS,
                       *randomness(SPREAD, gap)) > 0.1  # the data at r = -1 see that all others agree on another image


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


def best_gains(scheduler: NoiseScheduler, std: torch.Tensor, gap: int) -> list[torch.Tensor]:
    """Return, for t = -1 ... T-1, how far the best answer moves with x_t: it is the mean of the answers at x_r."""
    gains = [torch.ones_like(std)]  # at t = -1 the image itself
    for t in range(scheduler.num_timesteps):
        r = t - math.ceil((t + 1) / gap)
        abar_t, abar_r = scheduler.alpha_bar(t), scheduler.alpha_bar(r)
        covariance = (abar_t * abar_r) ** 0.5 * std**2 + ((1 - abar_t) * (1 - abar_r)) ** 0.5
        gains.append(gains[r + 1] * covariance / (abar_t * std**2 + 1 - abar_t))
    return gains


def test_a_finite_gap_asks_for_too_little_spread():
    """Each stride multiplies the spread by a correlation; the table of DIFFUSION_THEORY.md has the products."""
    std, left = STD.flatten(), {}
    for gap in GAPS:
        last = COSINE.alpha_bar(999)
        left[gap] = best_gains(COSINE, std, gap)[-1] * (last * std**2 + 1 - last) ** 0.5 / std
        t, product = 999, torch.ones_like(std)
        while t >= 0:
            r = t - math.ceil((t + 1) / gap)
            t, product = r, product * correlation(std, t, r)
        torch.testing.assert_close(left[gap], product, rtol=1e-9, atol=0)
    fractions = torch.stack(list(left.values()))
    assert (fractions.diff(dim=0) > 0).all() and (fractions[0] < 0.86).all() and (fractions[-1] > 0.98).all()
    for row in table_after(section(7), "| gap |"):
        assert row[1:] == [f"{value:.3f}" for value in left[int(row[0])].tolist()]


def correlation(std: torch.Tensor, t: int, r: int) -> torch.Tensor:
    abar_t, abar_r = COSINE.alpha_bar(t), COSINE.alpha_bar(r)
    covariance = (abar_t * abar_r) ** 0.5 * std**2 + ((1 - abar_t) * (1 - abar_r)) ** 0.5
    return covariance / ((abar_t * std**2 + 1 - abar_t) * (abar_r * std**2 + 1 - abar_r)) ** 0.5


@pytest.mark.parametrize("gap", [2, 6])
def test_training_finds_the_best_answers(gap):
    """Of a network with one number for each timestep."""
    scheduler, std = NoiseScheduler(12, schedule="cosine"), torch.tensor(0.5)
    gains = torch.nn.Parameter(torch.ones(12))
    abar = scheduler.alphas_cumprod[:, None, None, None]

    def network(x_t, t, labels, augment_labels):
        return (abar[t].sqrt() - gains[t][:, None, None, None]) / (1 - abar[t]).sqrt() * x_t

    steps, optimizer = 600, torch.optim.Adam([gains], 0.05)
    loss = make_loss(scheduler, gaps=(gap,), huber=1.0)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        augment_rand, t, noise, *others = loss.draw_randomness(240, generator, step)
        images = std * torch.randn(240, 1, 1, 1, 1, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        loss(network, images, torch.zeros(240, 0), augment_rand, t, noise[:, :1, :1, :1], *others).backward()
        optimizer.step()
    torch.testing.assert_close(gains.data, torch.stack(best_gains(scheduler, std, gap)[1:]).float(), rtol=0, atol=0.03)


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


class Constant(torch.nn.Module):
    """A network whose predicted x_0 is always the same; it counts its calls."""

    def __init__(self, value: float):
        super().__init__()
        self.value, self.calls = torch.nn.Parameter(torch.tensor(value)), []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor):
        self.calls.append((t, torch.is_grad_enabled()))
        abar = torch.tensor([COSINE.alpha_bar(u) for u in t.tolist()])[:, None, None, None]
        return (abar.sqrt() * x_t - self.value) / (1 - abar).sqrt()


@pytest.mark.parametrize("huber", [5e-4, 0.3])
def test_without_noise_the_target_is_the_image(huber):
    """r = -1, for t = 0 alone; elsewhere a constant agrees with itself."""
    images, t = gaussian_images(), torch.arange(BATCH)
    network = Constant(0.2)
    value = make_loss(huber=huber)(network, images, LABELS, *randomness(t, 4))
    distance = (images[0, 0] - 0.2).square().mean().sqrt().item()
    expected = (math.sqrt(distance**2 + huber**2) - huber) * 1000 / BATCH
    assert value.item() == pytest.approx(expected, rel=1e-3)
    (_, with_gradient_r), (asked, with_gradient_t) = network.calls
    assert not with_gradient_r and with_gradient_t and asked.equal(t)
    value.backward()
    assert network.value.grad.isfinite() and network.value.grad != 0


def test_the_distance_is_weighted_by_the_length_of_the_stride():
    """With a network that answers with x_t itself, each distance is known."""
    t = SPREAD[1:]
    images, inputs = gaussian_images()[1:], randomness(t, 8)
    noise, r = inputs[2], inputs[4]

    def as_it_is(x_t, t, labels, augment_labels):
        abar = torch.tensor([COSINE.alpha_bar(u) for u in t.tolist()])[:, None, None, None]
        return (abar.sqrt() - 1) / (1 - abar).sqrt() * x_t

    value = make_loss(huber=0.01)(as_it_is, images, LABELS[1:], *inputs)
    x_t, x_r = COSINE.add_noise(images[:, 0], t, noise), COSINE.add_noise(images[:, 0], r.clamp(min=0), noise)
    squared = (x_t - torch.where(r[:, None, None, None] < 0, images[:, 0], x_r)).square().mean((1, 2, 3))
    expected = (((squared + 1e-4).sqrt() - 0.01) * 1000 / (t - r)).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)


def test_the_gap_doubles_over_the_quarters_of_the_run():
    loss = make_loss(total_steps=40)
    for step in range(45):
        inputs = loss.draw_randomness(BATCH, torch.Generator().manual_seed(step), step)
        again = loss.draw_randomness(BATCH, torch.Generator().manual_seed(step), step)
        assert all(a.equal(b) for a, b in zip(inputs, again))  # a function of the step alone: a resumed run has it too
        t, r = inputs[1], inputs[4]
        gap = [2, 4, 8, 16, 16][step // 10]
        assert (t - r).tolist() == [math.ceil((u + 1) / gap) for u in t.tolist()]
        assert (r >= -1).all() and (r < t).all()
    short = make_loss(total_steps=3, gaps=(5, 7))
    assert [int(short.draw_randomness(1, torch.Generator().manual_seed(1), step)[1]
                - short.draw_randomness(1, torch.Generator().manual_seed(1), step)[4])
            for step in range(3)] == [math.ceil((int(short.draw_randomness(1, torch.Generator().manual_seed(1), 0)[1])
                                                 + 1) / gap) for gap in (5, 5, 7)]


@pytest.mark.parametrize("gap", GAPS)
def test_below_the_anchor_the_image_itself_is_the_target(gap):
    t, plain = torch.arange(1000), lower_timesteps(1000, gap, 0.0)
    assert plain.tolist() == [u - math.ceil((u + 1) / gap) for u in range(1000)]
    anchored = lower_timesteps(1000, gap, 0.1)
    assert (anchored[:100] == -1).all() and anchored[100:].equal(plain[100:])
    loss = make_loss(anchor=0.1, gaps=(gap,))
    _, t, _, _, r = loss.draw_randomness(BATCH, torch.Generator().manual_seed(0), 0)
    assert r.equal(anchored[t]) and (r == -1).sum() >= BATCH // 10


def random_net(**changes) -> UNet:
    torch.manual_seed(0)
    net = UNet(UNetConfig(**dict(channels=1, width=8, multipliers=(1,), blocks=1, groups=4, num_types=2) | changes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_both_passes_have_the_same_dropout_mask(dropout):
    """And another step has another one."""
    net, masks = random_net(dropout=dropout).train(), []
    for part in net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.register_forward_hook(lambda module, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))
    labels = torch.tensor([[1, 0]] * BATCH)
    loss = make_loss(dropout=dropout > 0)
    for step in (1, 1, 2):
        torch.manual_seed(step)
        loss(net, gaussian_images(), labels, *randomness(SPREAD, 4))
    third = len(masks) // 3
    target, student = masks[:third // 2], masks[third // 2 : third]
    assert len(target) == len(student) > 2 and all(a.equal(b) for a, b in zip(target, student))
    assert all(a.equal(b) for a, b in zip(masks[:third], masks[third:]))
    assert any(mask.any() for mask in target) == (dropout > 0)
    assert all(a.equal(b) for a, b in zip(masks[:third], masks[2 * third :])) == (dropout == 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_teachers_guided_step_of_ddim_gives_x_r(guidance):
    teacher, student = random_net().eval(), Constant(0.1)
    seen = []
    student.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    labels, images, t = torch.tensor([[1, 0]] * BATCH), gaussian_images(), torch.full((BATCH,), 700)
    loss = make_loss(teacher=teacher, guidance=guidance)
    loss.space.latent_range = 0.4
    loss(student, images, labels, *randomness(t, 4))

    x_t = COSINE.add_noise(images[:, 0], t, randomness(t, 4)[2])
    with torch.no_grad():
        output, plain = teacher(x_t, t, labels), teacher(x_t, t, 0 * labels)
    x_0 = COSINE.to_x_0("v", plain + guidance * (output - plain), x_t, t).clamp(-0.4, 0.4)
    r = 700 - math.ceil(701 / 4)
    torch.testing.assert_close(seen[0], ddim_step(COSINE, x_0, x_t, 700, r)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[1], x_t)


def test_the_flow_of_the_reference_is_that_of_the_denoiser():
    """What `exact_consistency` leads to, in many small steps of ddim with the optimal network."""
    x_T = start(8)
    images = sample(GaussianDenoiser(MEAN, STD, COSINE), COSINE, x_T, sampler="ddim", prediction="x0", clip=False)
    jumped = sample(exact_consistency(COSINE), COSINE, x_T, sampler="consistency", prediction="v", steps=1, clip=False)
    torch.testing.assert_close(images, jumped, rtol=0, atol=5e-3)
