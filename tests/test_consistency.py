"""Consistency: the loss and the sampler where the exact answer is known, and what the loss does with its inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from gaussian import MEAN, STD, exact_consistency, flow, law, seeded_noise, start
from test_theory import section, table_after

from forward_diffusion import SCHEDULES, NoiseScheduler
from models.exact import GaussianDenoiser
from models.space import PixelSpace
from reverse_diffusion import SAMPLERS, consistency_timesteps, sample
from training.augment import AUGMENT_DIM
from training.consistency import PATH_WEIGHT, ConsistencyLoss, Teacher
from training.loss import to_x_0
from unet import UNet, UNetConfig

COSINE = NoiseScheduler(schedule="cosine")
BATCH = 64


class AnyRange(PixelSpace):
    """Pixels beyond [-1, 1], as Gaussian ones are."""

    latent_range = math.inf


class Optimal(torch.nn.Module):
    """The optimal denoiser of what an `Affine` network of one jump draws; without a network, of the Gaussian pixels."""

    def __init__(self, network: torch.nn.Module | None = None):
        super().__init__()
        self.law = [MEAN, STD] if network is None else [network.shift[0], network.w[0]]  # not as its parameters

    def forward(self, x_t, t, labels, augment_labels):
        mean, std = (x.detach().float() for x in self.law)
        abar = COSINE.alphas_cumprod[t][:, None, None, None].float()
        x_0 = mean + abar.sqrt() * std**2 * (x_t - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)
        return (abar.sqrt() * x_t - x_0) / (1 - abar).sqrt()


def make_loss(teacher: torch.nn.Module, critic: torch.nn.Module | None = None, kind: type = ConsistencyLoss,
              jumps: int = 4, **options) -> ConsistencyLoss:
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    return kind(COSINE, AnyRange(), 2, "fp32", augment="none", prediction="v", label_dropout=0.0, teacher=teacher,
                critic=critic or Optimal(), jumps=jumps, **options)


def gaussian_images(number: int = BATCH) -> torch.Tensor:
    """Return data as encoded images are stored, float32 [number, 1 version, 1, 2, 2]."""
    return (MEAN + STD * start(number, seed=5)).float()[:, None]


def path_error(loss: ConsistencyLoss, network: Callable) -> torch.Tensor:
    """Return the squared error of a network for where the paths from noised data end."""
    x_t = COSINE.add_noise(gaussian_images()[:, 0], TIMESTEPS, start(BATCH, seed=6).float())
    inputs = (x_t, TIMESTEPS, LABELS, torch.zeros(BATCH, AUGMENT_DIM))
    return (network(*inputs) - loss.path_target(*inputs)).square().mean()


TIMESTEPS = torch.tensor(consistency_timesteps(1000, 4)).repeat(BATCH // 4)
LABELS = torch.zeros(BATCH, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data


def test_the_exact_function_ends_where_an_exact_teacher_leads():
    """To the error of the teacher's steps."""
    right, losses = exact_consistency(COSINE), []
    for steps in (25, 50, 100, 200):
        loss = make_loss(Optimal(), teacher_steps=steps)
        losses.append(path_error(loss, right).item())
        wrong = path_error(loss, lambda *inputs: 0.9 * right(*inputs))
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


class Affine(torch.nn.Module):
    """A network of v that jumps to w x_t + shift, with one w and one shift for each jump and pixel."""

    def __init__(self, jumps: int):
        super().__init__()
        self.timesteps = consistency_timesteps(1000, jumps)
        self.w = torch.nn.Parameter(torch.full((jumps, 2, 2), 0.1))
        self.shift = torch.nn.Parameter(torch.zeros(jumps, 2, 2))

    def forward(self, x_t, t, labels, augment_labels):
        i = torch.tensor([self.timesteps.index(u) for u in t.tolist()])
        abar = COSINE.alphas_cumprod[t][:, None, None, None].float()
        x_0 = self.w[i][:, None] * x_t + self.shift[i][:, None]
        return (abar.sqrt() * x_t - x_0) / (1 - abar).sqrt()


def train_affine(jumps: int, change: Callable, **options) -> Affine:
    """Train an `Affine` network, with the randomness of each step changed by `change`."""
    network = Affine(jumps)
    loss = make_loss(Optimal(), jumps=jumps, critic=Optimal(network), **options)
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    for step in range(300):
        names = inspect.signature(loss.__call__).parameters
        drawn = dict(zip([*names][3:], loss.draw_randomness(BATCH, torch.Generator().manual_seed(step), step)))
        drawn |= {name: drawn[name][..., :1, :2, :2] for name in ("noise", "jump_noise", "level_noise")}
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        loss(network, gaussian_images(), LABELS, **change(drawn)).backward()
        optimizer.step()
    return network


def test_training_finds_where_the_paths_end():
    """Matching alone leaves open which noise becomes which image; with the paths' loss alone, they are found."""
    class PathsAlone(ConsistencyLoss):
        def matching_loss(self, image, *_):
            return 0 * image.sum()

    network = train_affine(4, lambda drawn: drawn, kind=PathsAlone, teacher_steps=100)
    x_t = start(1)
    for w, shift, u in zip(network.w, network.shift, network.timesteps):
        ends = flow(COSINE, x_t, u, -1)
        torch.testing.assert_close((w * x_t + shift).detach().double(), ends, rtol=0, atol=0.02)


def test_distribution_matching_alone_finds_the_law_of_the_data():
    network = train_affine(1, lambda drawn: drawn | dict(path_weight=torch.zeros(BATCH)))
    torch.testing.assert_close(network.shift[0].detach().double(), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(network.w[0].detach().abs().double(), STD, rtol=0, atol=0.02)


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


AUGMENT_LABELS = 2 * torch.rand(BATCH, AUGMENT_DIM, generator=torch.Generator().manual_seed(0)) - 1


def told_twice(net: UNet, augment_labels: torch.Tensor, x_t: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Call a network with an augmentation for each image; guidance by types asks for each image twice."""
    both = torch.cat([augment_labels, augment_labels]) if len(x_t) > len(augment_labels) else augment_labels
    return net(x_t, *inputs, augment_labels=both)


@pytest.mark.parametrize("has_worse", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_end_of_a_path_is_what_the_teacher_draws_from_x_t(guidance, has_worse):
    teacher = Teacher(random_net(), guidance, random_net(seed=1) if has_worse else None)
    loss = make_loss(teacher, teacher_steps=10)
    loss.space.latent_range = 0.4
    labels, x_t = torch.tensor([[1, 0], [0, 0]] * (BATCH // 2)), start(BATCH).float()
    target = loss.path_target(x_t, TIMESTEPS, labels, AUGMENT_LABELS)
    for u, steps in zip((999, 750, 430, 200), (10, 8, 4, 2)):
        rows, abar = TIMESTEPS == u, COSINE.alpha_bar(u)
        net, worse = (network and partial(told_twice, network, AUGMENT_LABELS[rows])
                      for network in (teacher.net, teacher.worse))
        image = sample(net, COSINE, x_t[rows], sampler="dpm++", prediction="v", labels=labels[rows],
                       guidance=guidance, worse=worse, clip=0.4, start=u, steps=steps)
        assert image.abs().max() <= 0.4
        torch.testing.assert_close(target[rows], (abar**0.5 * x_t[rows] - image) / (1 - abar) ** 0.5)


@pytest.mark.parametrize("has_worse", [False, True])
def test_drawn_images_move_by_what_teacher_and_critic_see_differently(has_worse):
    teacher = Teacher(random_net(), 3.0, random_net(seed=1) if has_worse else None)
    loss = make_loss(teacher, critic=random_net(seed=2))
    loss.space.latent_range = 0.4
    labels = torch.tensor([[1, 0], [0, 1]] * (BATCH // 2))
    image, noise = (start(BATCH, seed).float() for seed in (0, 1))
    t = torch.randint(20, 980, (BATCH,), generator=torch.Generator().manual_seed(0))
    loss.matching_loss(image.requires_grad_(), t, noise, labels, AUGMENT_LABELS).backward()
    told = dict(augment_labels=AUGMENT_LABELS)
    x_t = COSINE.add_noise(image.detach(), t, noise)
    with torch.no_grad():
        output = teacher.net(x_t, t, labels, **told)
        worse = teacher.worse(x_t, t, labels, **told) if has_worse else teacher.net(x_t, t, 0 * labels, **told)
        teacher_x_0 = COSINE.to_x_0("v", worse + 3 * (output - worse), x_t, t).clamp(-0.4, 0.4)
        critic_x_0 = COSINE.to_x_0("v", loss.critic(x_t, t, labels, **told), x_t, t).clamp(-0.4, 0.4)
    distance = (teacher_x_0 - image.detach()).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(image.grad, (critic_x_0 - teacher_x_0) / distance / image.numel())
    assert all(weight.grad is None for weight in (*teacher.parameters(), *loss.critic.parameters()))


def test_where_teacher_and_critic_agree_nothing_moves():
    loss, image = make_loss(Optimal()), start(BATCH).float().requires_grad_()
    t = torch.full((BATCH,), 300)
    loss.matching_loss(image, t, start(BATCH, 1).float(), LABELS, LABELS).backward()
    assert not image.grad.any()


def test_images_are_drawn_as_the_sampler_draws_them():
    """To each jump's timestep, with the same noise."""
    net, loss = random_net(), make_loss(Optimal())
    loss.space.latent_range = 0.4
    labels = torch.tensor([[1, 0]] * 4)
    jump_noise = torch.randn(4, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    visited, rest = [jump_noise[:, 0]], iter(jump_noise.unbind(1)[1:])
    sample(net, COSINE, jump_noise[:, 0], sampler="consistency", prediction="v", steps=4, labels=labels, clip=0.4,
           draw_noise=lambda: next(rest), callback=lambda i, x_t, x_0: visited.append(x_t))
    for number, t in enumerate(loss.timesteps):
        x_t = loss.before_last_jump(net, torch.full((4,), t), jump_noise, labels, torch.zeros(4, AUGMENT_DIM))
        torch.testing.assert_close(x_t, visited[number])
    mixed = loss.before_last_jump(net, torch.tensor(loss.timesteps), jump_noise, labels, torch.zeros(4, AUGMENT_DIM))
    torch.testing.assert_close(mixed, torch.stack([visited[i][i] for i in range(4)]))


def test_each_of_the_three_losses_trains_what_it_should():
    """The critic learns from drawn images alone, the network from all but the critic's error, the teacher nothing."""
    sizes = dict(channels=3, augment_dim=AUGMENT_DIM)
    net, critic, teacher = random_net(**sizes), random_net(3, **sizes), Teacher(random_net(**sizes).train(), 2.0)
    assert not teacher.net.training and not any(weight.requires_grad for weight in teacher.parameters())
    loss = make_loss(teacher, critic, teacher_steps=1)
    loss.image_size, loss.augment, labels = 8, "full", torch.tensor([[1, 0]] * 8)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = loss.draw_randomness(8, torch.Generator().manual_seed(0), 0)
    value = loss(net, images, labels, *drawn)
    value.backward()
    gradients = [weight.grad.clone() for weight in critic.parameters()]
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad.any() for weight in net.parameters())

    # The critic's: denoising of what the network draws, told the labels and the augmentation.
    x_0, augment_labels = to_x_0(images, drawn[0], "full", loss.space, "fp32")
    assert len(augment_labels.unique(dim=0)) > 4
    t, keep_label, jump_noise, levels, level_noise = drawn[1], drawn[3], *drawn[5:]
    with torch.no_grad():
        x_t = loss.before_last_jump(net, t, jump_noise, labels * keep_label, augment_labels)
        output = net(x_t, t, labels * keep_label, augment_labels=augment_labels)
    image = COSINE.to_x_0("v", output, x_t, t)
    critic.zero_grad()
    x_t, target = (f(image, levels[:, 0], level_noise[:, 0]) for f in (COSINE.add_noise, partial(COSINE.target, "v")))
    output = critic(x_t, levels[:, 0], labels * keep_label, augment_labels=augment_labels)
    (output - target).square().mean().backward()
    critic_loss = (output - target).square().mean()
    for weight, gradient in zip(critic.parameters(), gradients):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)

    # Their sum, in which few images have a path.
    known, noise, path_weight = (labels * keep_label, augment_labels), drawn[2], drawn[4]
    matching_loss = loss.matching_loss(image, levels[:, 1], level_noise[:, 1], *known)
    path_x_t = COSINE.add_noise(x_0, t, noise)
    output = net(path_x_t, t, known[0], augment_labels=augment_labels)
    path_error = (output - loss.path_target(path_x_t, t, *known)).square().mean(dim=(1, 2, 3))
    path_loss = (path_weight * path_error).mean()
    torch.testing.assert_close(value, matching_loss + critic_loss + path_loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch_size, with_path", [(16, 4), (18, 5), (2, 1), (1, 1)])
def test_a_quarter_of_the_images_has_a_path_and_its_weight_is_kept(batch_size, with_path):
    weights = make_loss(Optimal()).draw_randomness(batch_size, torch.Generator().manual_seed(0), 0)[4]
    assert (weights > 0).sum() == with_path
    assert weights.mean().item() == pytest.approx(PATH_WEIGHT)


@pytest.mark.parametrize("batch_size, jumps", [(64, 4), (6, 4), (2, 4), (3, 1)])
def test_timesteps_take_turns(batch_size, jumps):
    loss = make_loss(Optimal(), jumps=jumps)
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
