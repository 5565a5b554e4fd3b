"""autoencoder.py: its loss and measures against what is known, and its training through the command line."""

from dataclasses import fields

import pytest
import torch
from PIL import Image
from torch import nn

import autoencoder
import train
from autoencoder import Coding, ssim
from checkpoint import load_checkpoint, load_codec
from latents import Autoencoder, AutoencoderConfig, psnr
from runs import check_range
from scripts import TINY_AUTOENCODER, assert_one_line, assert_same_run, call, metrics

pytestmark = pytest.mark.usefixtures("own_folder")
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_convolution_runs_at_full_resolution():
    """The file says so, and the cost rests on it."""
    model, sides = Autoencoder(AutoencoderConfig(width=8)), []
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda part, inputs, output: sides.append(output.shape[-1]))
    images, mean, log_variance = model(noise(2, 3, 32, 32), noise(2, 4, 8, 8))
    assert images.shape == (2, 3, 32, 32) and mean.shape == log_variance.shape == (2, 4, 8, 8)
    assert max(sides) == 16 and min(sides) == 8


@pytest.mark.parametrize("multipliers, factor", [((1,), 2), ((1, 2), 4), ((1, 2, 2), 8)])
def test_a_level_halves_the_resolution(multipliers, factor):
    model = Autoencoder(AutoencoderConfig(width=8, multipliers=multipliers, channels=3))
    x_0 = model.encode(noise(1, 3, 32, 48))
    assert model.factor == factor and x_0.shape == (1, 3, 32 // factor, 48 // factor)
    assert model.shape(32) == (3, 32 // factor, 32 // factor)
    assert model.decode(x_0).shape == (1, 3, 32, 48) and model.decode(100 * x_0).abs().max() <= 1


def loss(output: torch.Tensor, images: torch.Tensor, mean=torch.zeros(1), log_variance=torch.zeros(1), **settings):
    task = Coding((4, 4, 4), CPU, "fp32", "none", **settings)
    u = torch.zeros(len(images), 8)
    return task.loss(lambda x, noise: (output, mean, log_variance), images, None, u, None).item()


def test_the_loss_counts_colours_edges_and_bits():
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = images.float() / 127.5 - 1
    assert loss(x, images) == 0
    assert loss(x + 0.25, images, edge_weight=7) == pytest.approx(0.25, rel=1e-4)  # another colour has the same edges
    stripes = x + 0.1 * (torch.arange(16) % 2)  # off by 0 and 0.1 in turn: each difference sideways is off by 0.1
    assert loss(stripes, images, edge_weight=2) == pytest.approx(0.05 + 2 * 0.1, rel=1e-4)
    mean, log_variance = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean().item()
    assert loss(x, images, mean, log_variance, kl_weight=0.5) == pytest.approx(0.5 * kl, rel=1e-4)


def test_psnr_and_ssim_of_what_is_known():
    images = noise(3, 3, 24, 24).clamp(-1, 1)
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    assert psnr(images, images).min() >= 100
    assert psnr(images, images + 0.2).tolist() == pytest.approx([20, 20, 20], abs=1e-3)  # 0.1 of the range
    other = noise(3, 3, 24, 24, seed=1).clamp(-1, 1)
    assert ssim(images, other).equal(ssim(other, images)) and ssim(images, other).max() < 0.2
    a, b = 0.8, 0.3  # of one colour each, in [0, 1]: only the means differ
    flat = ssim(torch.full((1, 3, 16, 16), 2 * a - 1), torch.full((1, 3, 16, 16), 2 * b - 1)).item()
    assert flat == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-3)


def test_a_training_learns_and_says_how_well(trained_autoencoder, monkeypatch):
    monkeypatch.chdir(trained_autoencoder)
    rows = metrics("autoencoder/metrics.csv")
    assert len(rows) == 4 and [bool(row["psnr"]) for row in rows] == [False, True, False, True]
    first, last = rows[1], rows[3]
    assert float(last["loss"]) < float(first["loss"]) and float(last["psnr"]) > float(first["psnr"])
    assert 0 < float(last["ssim"]) < 1
    # Two pictures beside what comes back of them: four tiles and their borders.
    assert Image.open("outputs/autoencoder/generated_epoch_0004.png").size == (4 * 18 + 2, 20)
    codec = load_codec("checkpoints/autoencoder/final_model.pt")
    images = noise(2, 3, 16, 16)
    content = load_checkpoint("checkpoints/autoencoder/final_model.pt")
    assert "model" not in content and content["autoencoder"]["config"] == vars(codec.config)
    average = Autoencoder(codec.config)
    average.load_state_dict(content["ema"])
    assert torch.allclose(average.encode(images), codec.encode(images), atol=1e-4)


def test_a_resumed_training_is_the_same(trained_autoencoder):
    assert call(autoencoder, *TINY_AUTOENCODER, "--max_steps", 3) == 0
    assert call(autoencoder, "--resume", "--max_steps", 0) == 0
    theirs = trained_autoencoder / "checkpoints/autoencoder/latest.pt"
    assert_same_run(load_checkpoint("checkpoints/autoencoder/latest.pt"), load_checkpoint(theirs))


def test_parts_of_a_batch_change_nothing():
    """But the order of additions: the gradients, of which Adam keeps a tenth, are the same."""
    found = {}
    for parts in (1, 2):
        flags = ["--run_name", f"in_{parts}", "--grad_accum", parts, "--max_steps", 1]
        assert call(autoencoder, *TINY_AUTOENCODER, *flags) == 0
        found[parts] = load_checkpoint(f"checkpoints/in_{parts}/latest.pt")["optimizer"]["state"]
    for ours, theirs in zip(found[1].values(), found[2].values()):
        assert torch.allclose(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)


def test_pictures_kept_aside_are_those_that_are_measured(capsys):
    assert call(autoencoder, *TINY_AUTOENCODER, "--holdout", 0.25, "--max_steps", 1) == 0
    said = capsys.readouterr().out
    assert "6 of 16 x 16" in said and "2 pictures kept aside" in said
    assert load_checkpoint("checkpoints/autoencoder/final_model.pt")["held_out"]


@pytest.mark.parametrize("flags, words", [
    (["--image_size", 18], ["--image_size", "multiple of 4", "18"]),
    (["--image_size", 8], ["at least 16"]),
    (["--width", 12], ["12 channels", "8 groups"]),
    (["--channels", 0], ["--channels", "more than 0"]),
    (["--kl_weight", -1], ["--kl_weight", "at least 0"]),
])
def test_one_clear_line(capsys, flags, words):
    line = call(autoencoder, *TINY_AUTOENCODER, *flags)
    capsys.readouterr()
    assert_one_line(line, capsys, *words)


def test_its_run_is_none_of_train_py(trained_autoencoder, monkeypatch, capsys):
    monkeypatch.chdir(trained_autoencoder)
    assert_one_line(call(train, "--resume", "--run_name", "autoencoder"), capsys, "cannot be resumed")


def test_the_presets_are_within_their_ranges():
    for preset in autoencoder.PRESETS.values():
        for setting in fields(config := autoencoder.Config(**preset)):
            check_range(setting, getattr(config, setting.name))
