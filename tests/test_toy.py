"""tools/toy: ink from drawings, the score against the density, the walk out, learning, and the command."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image, ImageDraw
from scripts import assert_one_line, call

from forward_diffusion import PREDICTIONS, NoiseScheduler
from models.exact import ExactDenoiser
from reverse_diffusion import SAMPLERS, find_sampler
from tools.toy import __main__ as toy
from tools.toy import figures
from tools.toy.ink import PREDICTION, SCHEDULE, Model, copies, load_ink, on_ink, score, train, walk_back, walk_out
from utils import plots

SCHEDULER = NoiseScheduler(schedule=SCHEDULE)


@pytest.fixture(scope="module")
def ink():
    return load_ink("", 1000, seed=0)


def test_ink_is_the_dark_part_of_a_drawing(tmp_path, ink):
    assert ink.points.shape == (1000, 2, 1, 1) and on_ink(ink.points, ink) == 1 and copies(ink.points, ink) == 1
    assert ink.points.abs().max() <= ink.reach
    assert ink.pixels.mean(0).abs().max() < 1e-5
    assert ink.pixels.square().mean().item() == pytest.approx(1, abs=1e-5)
    # Another seed: other molecules of the same drawing.
    other = load_ink("", 1000, seed=1)
    assert other.pixels.equal(ink.pixels) and on_ink(other.points, ink) == 1 and copies(other.points, ink) < 0.05
    # A drawing of one's own: a dark bar above a lighter one, which is no ink. Up is up.
    image = Image.new("RGB", (300, 200), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle([60, 20, 240, 40], fill=(30, 30, 60))
    pen.rectangle([60, 100, 66, 180], fill=(30, 30, 60))  # and a leg on its left
    pen.rectangle([120, 120, 240, 180], fill=(200, 200, 200))
    image.save(tmp_path / "bar.png")
    x, y = load_ink(str(tmp_path / "bar.png"), 500, seed=0).points.flatten(1).T
    assert y[x > 0.5].min() > 0 and y[x < x.min() + 0.1].min() < -1


def test_an_image_without_ink_is_one_line(tmp_path, capsys):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    assert_one_line(call(toy, tmp_path / "white.png"), capsys, "white.png has hardly any dark pixels")
    assert_one_line(call(toy, tmp_path / "none.png"), capsys, "cannot read", "none.png")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_arrows_are_the_gradient_of_the_log_density(ink, prediction):
    """Whatever the network's output means; the gradient is taken from differences of the density."""
    exact = ExactDenoiser(ink.points[:50].double(), SCHEDULER)

    def network(x_t, t):
        x_0 = exact(x_t, t)
        return SCHEDULER.target(prediction, x_0, t, SCHEDULER.to_eps(x_0, x_t, t))

    h, steps = 1e-5, 1e-5 * torch.eye(2, dtype=torch.float64)[:, None, :, None, None]
    for t in figures.ARROWS_AT:
        x_t = figures.grid(5).double()
        ahead, behind = (torch.stack([exact.log_density(x_t + sign * step, torch.full((25,), t)) for step in steps], 1)
                         for sign in (1, -1))
        gradient = (ahead - behind) / (2 * h)
        arrows = score(Model("exact", network, prediction), SCHEDULER, x_t, t).flatten(1)
        assert torch.allclose(arrows, gradient, rtol=1e-4, atol=1e-4)


def test_the_walk_out_ends_where_the_jump_does(ink):
    """x_t has the mean and the variance of q(x_t | x_0), and each step starts where the last one ended."""
    timesteps = [30, 200, 600]
    states = walk_out(ink.points, SCHEDULER, timesteps, torch.Generator().manual_seed(0))
    noise = []
    for t, x_t in zip(timesteps, states):
        noise.append(SCHEDULER.to_eps(ink.points, x_t, t).flatten())
        assert noise[-1].mean().abs() < 4 / math.sqrt(2000)
        assert abs(noise[-1].square().mean() - 1) < 4 * math.sqrt(2 / 2000)
    before, after = (SCHEDULER.snr()[t].item() ** 0.5 for t in timesteps[:2])
    assert (noise[0] * noise[1]).mean().item() == pytest.approx(after / before, abs=4 / math.sqrt(2000))


def test_the_way_back_visits_all_timesteps(ink):
    model = Model("exact", ExactDenoiser(ink.points, SCHEDULER), "x0")
    x_T = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    states = walk_back(model, SCHEDULER, x_T, ink.reach, torch.Generator().manual_seed(1), "dpm++", 20)
    assert len(states) == 21 and list(states)[0] == 999 and list(states)[-1] == -1
    assert states[999] is x_T and on_ink(states[-1], ink) > 0.8


def test_a_short_training_finds_the_drawing(ink):
    """After 80 steps, the network draws on ink more often than the rough shape alone would."""
    torch.set_num_threads(1)
    network, loss = train(ink, SCHEDULER, steps=80, seed=0)
    assert 0.5 < loss < 1.2
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(1000, 2, 1, 1, generator=generator)
    states = walk_back(Model("learned", network, PREDICTION), SCHEDULER, x_T, ink.reach, generator, "dpm++", 20)
    assert on_ink(states[-1], ink) > 1.3 * on_ink(x_T, ink)


def test_the_command_draws_everything(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plots, "DPI", 50)
    monkeypatch.setattr(figures, "STEPS", 4)
    monkeypatch.setattr(figures, "FRAMES_OUT", 2)
    monkeypatch.setattr(figures, "FRAMES_BACK", 2)
    monkeypatch.setattr(figures, "default_steps", lambda name, _: drawn.append(find_sampler(name)) or 4)
    assert call(toy, "--points", 100, "--steps", 2, "--output", tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert "50,114 parameters, 2 steps" in printed and "exact" in printed and "learned" in printed
    assert drawn == [sampler for sampler in SAMPLERS.values() if not sampler.tuned]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_ink.gif", "a_ink.png", "a_paths.png", "a_score.png"]
    with Image.open(tmp_path / "a_ink.gif") as animation:
        assert animation.n_frames >= 4
    for name in ("ink", "paths", "score"):
        darkest, brightest = Image.open(tmp_path / f"a_{name}.png").convert("L").getextrema()
        assert darkest < 100 and brightest == 255


def test_exact_trains_nothing(tmp_path, monkeypatch, capsys):
    for name in ("draw_ink", "draw_animation", "draw_score", "draw_paths"):
        monkeypatch.setattr(toy, name, lambda *_: None)
    monkeypatch.setattr(toy, "train", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(toy, "STEPS", 20)
    assert call(toy, "--exact", "--points", 200, "--output", tmp_path / "a") == 0
    assert "learned" not in capsys.readouterr().out
