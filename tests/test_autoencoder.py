"""The autoencoder: its loss against known values, and its training through the command line."""

from __future__ import annotations

import signal
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import TINY_AUTOENCODER, assert_one_line, assert_same_run, call, metrics
from torch import nn

import train
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.space import load_space, space_from_state
from tools import train_autoencoder
from training.autoencoder import AutoencoderTrainingConfig
from training.loss import AutoencoderLoss
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import check_ranges

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_convolution_runs_at_full_resolution():
    """The file says so, and the cost depends on it."""
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
    latents = model.encode(noise(1, 3, 32, 48))
    assert model.factor == factor and latents.shape == (1, 3, 32 // factor, 48 // factor)
    assert model.latent_shape(32) == (3, 32 // factor, 32 // factor)
    assert model.decode(latents).shape == (1, 3, 32, 48) and model.decode(100 * latents).abs().max() <= 1


ZERO = torch.zeros(1)


def loss(output: torch.Tensor, images: torch.Tensor, mean: torch.Tensor = ZERO, log_variance: torch.Tensor = ZERO,
         **settings: float) -> float:
    def net(x, noise, extra_std):
        return output, mean, log_variance

    autoencoder_loss = AutoencoderLoss((4, 4, 4), "fp32", "none", **settings)
    augment_rand = torch.zeros(len(images), 8)
    return autoencoder_loss(net, images, None, augment_rand, None, None).item()


def test_the_loss_is_that_of_colours_edges_and_kl_divergence():
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


def test_latent_noise_is_in_units_of_the_normalised_latents(monkeypatch):
    model = Autoencoder(AutoencoderConfig(width=8, channels=5, mean_colours=True))
    monkeypatch.setattr(model, "reconstruct", lambda latents: latents)  # what is decoded
    images, draw, extra = noise(2, 3, 16, 16), noise(2, 5, 4, 4, seed=1), torch.tensor([0.0, 0.3]).view(2, 1, 1, 1)
    latents, mean, log_variance = model(images, draw, extra)
    model.set_normalisation(mean)
    colours_and_details = torch.tensor([1, 1, 1, 2, 2]).view(5, 1, 1)
    std = mean.std(dim=(0, 2, 3), correction=0).view(5, 1, 1) * colours_and_details
    torch.testing.assert_close(model.std, std)
    torch.testing.assert_close((latents - mean) / draw, (log_variance.exp() + (extra * std) ** 2).sqrt(),
                               rtol=1e-3, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    *_, extra = AutoencoderLoss((5, 4, 4), "fp32", latent_noise=0.4).draw_randomness(1000, generator, 0)
    assert extra.shape == (1000, 1, 1, 1) and extra.min() >= 0 and 0.39 < extra.max() <= 0.4


def test_latent_noise_reaches_the_network(monkeypatch):
    seen, forward = [], Autoencoder.forward

    def recorded(self, images, draw, extra_std):
        seen.append(extra_std)
        return forward(self, images, draw, extra_std)

    monkeypatch.setattr(Autoencoder, "forward", recorded)
    assert call(train_autoencoder, *TINY_AUTOENCODER, "--latent_noise", 0.1, "--max_steps", 1) == 0
    assert 0 < seen[0].max() <= 0.1


def test_a_training_learns_and_measures_itself(trained_autoencoder, monkeypatch):
    monkeypatch.chdir(trained_autoencoder)
    rows = metrics("autoencoder/metrics.csv")
    assert len(rows) == 4 and [bool(row["psnr"]) for row in rows] == [False, True, False, True]
    first, last = rows[1], rows[3]
    assert float(last["loss"]) < float(first["loss"]) and float(last["psnr"]) > float(first["psnr"])
    assert 0 < float(last["ssim"]) < 1
    # Two images beside their reconstructions: four tiles and their borders.
    assert Image.open("outputs/autoencoder/generated_epoch_0004.png").size == (4 * 18 + 2, 20)
    space = load_space("checkpoints/autoencoder/final_model.pt")
    images = noise(2, 3, 16, 16)
    content = load_checkpoint("checkpoints/autoencoder/final_model.pt")
    assert "model" not in content and content["autoencoder"]["config"] == vars(space.autoencoder.config)
    ema = Autoencoder(space.autoencoder.config)
    ema.load_state_dict(content["ema"])
    assert torch.allclose(ema.encode(images), space.encode(images), atol=1e-4)


def test_a_resumed_training_is_the_same(trained_autoencoder):
    assert call(train_autoencoder, *TINY_AUTOENCODER, "--max_steps", 3) == 0
    assert call(train_autoencoder, "--resume", "--max_steps", 0) == 0
    theirs = trained_autoencoder / "checkpoints/autoencoder/latest.pt"
    assert_same_run(load_checkpoint("checkpoints/autoencoder/latest.pt"), load_checkpoint(theirs))


def test_a_stopped_run_names_the_command_that_resumes_it(monkeypatch, capsys):
    monkeypatch.setattr(AutoencoderLoss, "draw_randomness", interrupting(AutoencoderLoss.draw_randomness))
    assert call(train_autoencoder, *TINY_AUTOENCODER) == 130
    assert "python -m tools.train_autoencoder --resume --run_name autoencoder" in capsys.readouterr().out


def interrupting(function):
    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        return function(*args)
    return interrupt


def test_parts_of_a_batch_change_nothing():
    """But the order of additions: the gradients, which Adam keeps a tenth of, are the same."""
    states = {}
    for parts in (1, 2):
        flags = ["--run_name", f"in_{parts}", "--grad_accum", parts, "--max_steps", 1, "--latent_noise", 0]
        assert call(train_autoencoder, *TINY_AUTOENCODER, *flags) == 0
        states[parts] = load_checkpoint(f"checkpoints/in_{parts}/latest.pt")["optimizer"]["state"]
    for ours, theirs in zip(states[1].values(), states[2].values()):
        assert torch.allclose(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)


def test_held_out_images_are_those_that_are_measured(capsys):
    assert call(train_autoencoder, *TINY_AUTOENCODER, "--holdout", 0.25, "--max_steps", 1) == 0
    printed = capsys.readouterr().out
    assert "6 of 16 x 16" in printed and "2 held-out images" in printed
    assert load_checkpoint("checkpoints/autoencoder/final_model.pt")["held_out"]


@pytest.mark.parametrize("flags, words", [
    (["--image_size", 18], ["--image_size", "multiple of 4", "18"]),
    (["--image_size", 8], ["at least 16"]),
    (["--width", 12], ["12 channels", "8 groups"]),
    (["--channels", 0], ["--channels", "more than 0"]),
    (["--kl_weight", -1], ["--kl_weight", "at least 0"]),
    (["--latent_noise", -1], ["--latent_noise", "at least 0"]),
])
def test_one_clear_line(capsys, flags, words):
    line = call(train_autoencoder, *TINY_AUTOENCODER, *flags)
    capsys.readouterr()
    assert_one_line(line, capsys, *words)


def test_train_py_does_not_resume_a_run_of_the_autoencoder(trained_autoencoder, monkeypatch, capsys):
    monkeypatch.chdir(trained_autoencoder)
    assert_one_line(call(train, "--resume", "--run_name", "autoencoder"), capsys, "cannot be resumed")


def test_a_run_of_before_mean_colours_goes_on_without_them():
    flags = ["--no_mean_colours", "--latent_noise", 0, "--max_steps", 2]
    assert call(train_autoencoder, *TINY_AUTOENCODER, *flags) == 0
    content = load_checkpoint("checkpoints/autoencoder/latest.pt")
    for name in ("mean_colours", "latent_noise"):
        del content["config"][name]
    save_checkpoint("checkpoints/autoencoder/latest.pt", **{name: x for name, x in content.items() if name != "format"})
    assert call(train_autoencoder, "--resume", "--max_steps", 3) == 0
    config = load_checkpoint("checkpoints/autoencoder/latest.pt")["config"]
    assert config["mean_colours"] is False and config["latent_noise"] == 0


def test_the_presets_are_within_their_ranges():
    for preset in train_autoencoder.PRESETS.values():
        check_ranges(AutoencoderTrainingConfig(**preset))


def test_mean_colours_bypass_encoder_and_decoder():
    """An untrained autoencoder with it gives an image of one colour back; one without does not."""
    image = torch.tensor([0.9, -0.5, 0.2])[None, :, None, None].expand(1, 3, 32, 32)
    for bypass in (True, False):
        torch.manual_seed(0)
        autoencoder = Autoencoder(AutoencoderConfig(width=8, multipliers=(1, 1, 1), channels=5,
                                                    mean_colours=bypass))
        for network in (autoencoder.encoder, autoencoder.decoder):
            nn.init.zeros_(list(network.parameters())[-2])
            nn.init.zeros_(list(network.parameters())[-1])
        error = (autoencoder.decode(autoencoder.encode(image)) - image).abs().max()
        assert error < 1e-6 if bypass else error > 0.5
    with pytest.raises(ValueError, match="at least 3 channels"):
        AutoencoderConfig(channels=2, mean_colours=True)


def test_latents_with_mean_colours_hold_a_small_image_and_quieter_details():
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(width=8, channels=5, mean_colours=True))
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    means = autoencoder.posterior(images)[0]
    assert means[:, :3].equal(F.avg_pool2d(images, 4))
    autoencoder.set_normalisation(means)
    latents = autoencoder.encode(images)
    assert latents.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1, 0.5, 0.5], rel=1e-4)
    assert latents.abs().max() == autoencoder.largest


@pytest.mark.parametrize("shortcut", [False, True])
def test_an_autoencoder_of_before_mean_colours_is_read_if_it_had_no_other_bypass(shortcut, tmp_path):
    autoencoder = Autoencoder(AutoencoderConfig(width=8))
    config = asdict(autoencoder.config) | dict(colour_shortcut=shortcut)
    del config["mean_colours"]
    save_checkpoint(tmp_path / "a.pt", autoencoder=dict(config=config, weights=autoencoder.state_dict()))
    stored = load_checkpoint(tmp_path / "a.pt")["autoencoder"]
    if shortcut:
        with pytest.raises(ValueError, match="incomplete autoencoder"):
            space_from_state(stored)
    else:
        assert space_from_state(stored).autoencoder.config == autoencoder.config
