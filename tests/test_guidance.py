"""Options of `sample` that all samplers share: labels and guidance, a start below T; slerp; wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, exact, flow, seeded_noise, start

from forward_diffusion import PREDICTIONS, SCHEDULES, NoiseScheduler
from reverse_diffusion import SAMPLERS, sample, slerp

LABELS = torch.tensor([[0.0], [1.0], [0.5], [1.0]])
UNTUNED = [name for name in SAMPLERS if not SAMPLERS[name].tuned]


def counted(network):
    """Return the network, and a list that gets the batch size of each call."""
    calls = []

    def model(x_t, t, *labels):
        calls.append(len(x_t))
        return network(x_t, t, *labels)

    return model, calls


def draw(network=None, scheduler=None, **options):
    scheduler = scheduler or NoiseScheduler(schedule="cosine")
    options = dict(steps=5, prediction="v", clip=False) | options
    x_T = start(4)
    return sample(network or exact(scheduler, options["prediction"]), scheduler, x_T, draw_noise=seeded_noise(x_T),
                  **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_between_and_beyond(sampler):
    """Guidance 1 is the conditional output, 0 the unconditional one.

    The exact network is linear in the label, so guidance g with label y equals label g y without guidance.
    """
    network = exact(NoiseScheduler(schedule="cosine"), "v")

    def unconditional(x_t, t, labels):
        return network(x_t, t)

    conditional = draw(sampler=sampler, labels=LABELS)
    assert conditional.equal(draw(sampler=sampler, labels=LABELS, guidance=1.0))
    assert draw(unconditional, sampler=sampler, labels=LABELS).equal(draw(sampler=sampler, labels=0 * LABELS))
    assert draw(sampler=sampler, labels=LABELS, guidance=0.0).equal(draw(sampler=sampler))
    assert not conditional[1:].equal(draw(sampler=sampler)[1:]) and conditional[0].equal(draw(sampler=sampler)[0])
    for guidance in (0.3, 2.5, -1.0):
        guided = draw(sampler=sampler, labels=LABELS, guidance=guidance)
        torch.testing.assert_close(guided, draw(sampler=sampler, labels=guidance * LABELS.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_is_the_same_for_every_prediction(sampler, clip):
    images = [draw(sampler=sampler, labels=LABELS, guidance=3.0, prediction=name, clip=clip) for name in PREDICTIONS]
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(images[1], images[2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_call_a_step(sampler):
    for options, size in [(dict(), 4), (dict(labels=LABELS), 4), (dict(labels=LABELS, guidance=2.0), 8),
                          (dict(labels=LABELS, guidance=0.0), 8)]:
        model, calls = counted(exact(NoiseScheduler(schedule="cosine"), "v"))
        draw(model, sampler=sampler, steps=7, **options)
        assert calls == [size] * 7


def test_guidance_is_computed_in_the_precision_of_the_images():
    """The difference of two bfloat16 outputs, times the guidance, must not be rounded to bfloat16 again."""
    scheduler, outputs = NoiseScheduler(), torch.tensor([1.0, 0.5078125]).bfloat16()

    def model(x_t, t, labels):
        return outputs.repeat_interleave(len(x_t) // 2).view(-1, 1, 1, 1).expand_as(x_t)

    images = sample(model, scheduler, start(2).float(), steps=1, prediction="x0", labels=LABELS[:2], guidance=1.37,
                    clip=False)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 0.5078125 + 1.37 * (1 - 0.5078125)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_a_start_below_T_the_rest_of_the_path_is_the_same(schedule):
    scheduler, path = NoiseScheduler(100, 1e-3, 0.2, schedule), []
    model, x_T = exact(scheduler, "v"), start(4)
    whole = sample(model, scheduler, x_T, sampler="ddim", prediction="v", callback=lambda i, x_s, x_0: path.append(x_s))
    for at in (98, 60, 7, 0):
        rest, calls = counted(model)
        again = sample(rest, scheduler, path[98 - at], sampler="ddim", prediction="v", start=at)
        assert again.equal(whole) and len(calls) == at + 1


@pytest.mark.parametrize("sampler", UNTUNED)
def test_a_low_start_keeps_the_image_and_a_high_one_replaces_it(sampler):
    """SDEdit: start = 0 returns the image, T-1 keeps nothing of it."""
    scheduler = NoiseScheduler()
    image, noise = torch.full((256, 1, 2, 2), -0.9, dtype=torch.float64), start(256)
    distance = []
    for at in (0, 200, 500, 999):
        x_T = scheduler.add_noise(image, torch.full((256,), at), noise)
        images = sample(exact(scheduler), scheduler, x_T, sampler=sampler, steps=min(at + 1, 50), start=at, clip=False,
                        draw_noise=seeded_noise(x_T))
        distance.append(((images - image).mean((0, 1)) / (MEAN - image[0, 0])).mean().item())
    assert distance == sorted(distance) and distance[0] < 0.02 and distance[-1] == pytest.approx(1, abs=0.05)


def test_dpm_solver_from_a_start_follows_the_flow():
    scheduler, x = NoiseScheduler(), start(8)
    images = sample(exact(scheduler, "x0"), scheduler, x, sampler="dpm++", prediction="x0", start=499, clip=False)
    torch.testing.assert_close(images, flow(scheduler, x, 499, -1), rtol=0, atol=5e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, options", [
    ("ddpm", {}), ("ddpm", dict(variance="beta")), ("ddim", {}), ("ddim", dict(eta=0.5)), ("ddim", dict(eta=1)),
    ("dpm++", {}), ("sde-dpm++", {}),
])
def test_sampling_with_zero_terminal_snr(sampler, options, schedule):
    scheduler = NoiseScheduler(schedule=schedule, zero_terminal_snr=True)
    for steps in (1, 2, 7, 100):
        v, x_0 = (draw(exact(scheduler, name), scheduler, sampler=sampler, steps=steps, prediction=name, **options)
                  for name in ("v", "x0"))
        assert v.isfinite().all() and v.dtype == torch.float64
        torch.testing.assert_close(v, x_0, rtol=0, atol=1e-9)
        if steps == 1:
            torch.testing.assert_close(v, MEAN.expand_as(v))  # pure noise says nothing about the image
    with pytest.raises(ValueError, match="eps.*999.*choose v or x0"):
        draw(scheduler=scheduler, sampler=sampler, prediction="eps")
    below = draw(scheduler=scheduler, sampler=sampler, prediction="eps", start=998, **options)
    assert below.isfinite().all()


def test_slerp():
    a, b = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    b = b * a.norm() / b.norm()
    angle = torch.acos((a * b).sum() / a.norm() ** 2)
    for weight in (0.1, 0.5, 0.8):
        between = slerp(a, b, weight)
        assert between.norm() == pytest.approx(a.norm().item(), rel=1e-12)  # the arc keeps the norm
        assert torch.acos((a * between).sum() / a.norm() ** 2) == pytest.approx(weight * angle.item(), rel=1e-9)
        assert ((1 - weight) * a + weight * b).norm() < 0.96 * a.norm()  # the straight line does not
        torch.testing.assert_close(between, slerp(b, a, 1 - weight))
    frames = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64).view(5, 1, 1, 1))
    assert frames.shape == (5, 3, 8, 8)
    torch.testing.assert_close(frames[2:3], slerp(a, b, 0.5))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(torch.cat([a, b]), torch.cat([b, a]), 0.3)[1:], slerp(b, a, 0.3))  # an angle each


@pytest.mark.parametrize("wrong, message", [
    (dict(sampler="euler"), "unknown sampler 'euler': choose one of ddpm, ddim, dpm++, sde-dpm++, consistency"),
    (dict(variance="learned"), "unknown variance 'learned': choose one of beta_tilde, beta"),
    (dict(prediction="score"), "unknown prediction 'score': choose one of eps, v, x0"),
    (dict(steps=0), "steps must be in 1 ... 100, not 0"),
    (dict(steps=101), "steps must be in 1 ... 100, not 101"),
    (dict(steps=12, start=10), "steps must be in 1 ... 11, not 12"),
    (dict(start=-1), "start must be in 0 ... 99, not -1"),
    (dict(start=100), "start must be in 0 ... 99, not 100"),
    (dict(timesteps=[]), "timesteps must fall, from 99 or less to 0 or more, not (none)"),
    (dict(timesteps=[100, 3]), "timesteps must fall, from 99 or less to 0 or more, not 100 3"),
    (dict(timesteps=[99, 3, -1]), "timesteps must fall, from 99 or less to 0 or more, not 99 3 -1"),
    (dict(timesteps=[99, 3, 3]), "timesteps must fall, from 99 or less to 0 or more, not 99 3 3"),
    (dict(eta=0.5), "sampler ddpm has no option eta"),
    (dict(sampler="dpm++", eta=0.5, variance="beta"), "sampler dpm++ has no option eta, variance"),
    (dict(sampler="ddim", eta=-0.1), "eta must be in [0, 1], not -0.1"),
    (dict(sampler="ddim", eta=1.1), "eta must be in [0, 1], not 1.1"),
    (dict(sampler="ddim", eta=math.nan), "eta must be in [0, 1], not nan"),
    (dict(labels=LABELS), "4 rows of labels for 2 images"),
    (dict(guidance=2.0), "guidance 2.0 needs labels, and there are none: leave it at 1"),
    (dict(guidance=math.nan, labels=LABELS[:2]), "guidance must be a finite number, not nan"),
    (dict(guidance=math.inf, labels=LABELS[:2]), "guidance must be a finite number, not inf"),
])
def test_wrong_arguments_are_refused_in_one_line(wrong, message):
    scheduler = NoiseScheduler(100)
    with pytest.raises(ValueError) as error:
        sample(exact(scheduler), scheduler, start(2), **wrong)
    assert str(error.value) == message
