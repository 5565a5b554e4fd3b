"""Pipeline: an image depends on its own seed, labels and x_T alone, to the last bit; defaults; refused arguments."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from gaussian import exact

from forward_diffusion import NoiseScheduler
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.pipeline import BUNDLED, Pipeline, newest_checkpoint
from models.space import LatentSpace, PixelSpace
from reverse_diffusion import SAMPLERS, Sampler, ddim_step, ddpm_step, sample, slerp
from unet import UNet, UNetConfig
from utils.checkpoint import CheckpointError, save_checkpoint

CPU, SIZE = torch.device("cpu"), 8
SCHEDULER = NoiseScheduler(schedule="cosine")
CLASSES = ("fire", "flying", "water")
SEEDS = list(range(40, 40 + 65))
LABELS = (torch.rand(65, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def random_net(num_types: int = 3) -> UNet:
    """Return a small U-Net, all of its weights random: an untrained one predicts 0."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(width=32, multipliers=(1, 2), blocks=1, num_types=num_types))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return random_net()


def make_pipeline(net, precision="fp32", class_names=CLASSES, scheduler=SCHEDULER, space=None, **settings) -> Pipeline:
    settings = dict(image_size=SIZE, prediction="v") | settings
    return Pipeline(net, scheduler, space or PixelSpace(), settings, class_names, CPU, precision)


def draw(net, seeds, precision="fp32", **options):
    return make_pipeline(net, precision).sample(seeds, **dict(sampler="ddpm", steps=3) | options)


def save_model(path: Path, **settings) -> Path:
    net = random_net()
    save_checkpoint(path, ema=net.state_dict(), network=dict(kind="unet", config=asdict(net.config)), types=CLASSES,
                    scheduler=NoiseScheduler(60).config(), config=dict(image_size=SIZE, prediction="v") | settings)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# seeds and batches


@pytest.mark.parametrize("precision, guidance", [("fp32", None), ("fp32", 2.0), ("bf16", 2.0)])
@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", dict(eta=0.5)), ("dpm++", {}), ("sde-dpm++", {})])
def test_every_bit_is_the_same_in_any_batch(net, sampler, options, precision, guidance):
    """Batches of 1, 7, 64 and 65's lone last one, in another order too. Without the padding float32 fails here."""
    def images(indices: list[int], batch_size: int) -> torch.Tensor:
        labels = {} if guidance is None else dict(labels=LABELS[indices], guidance=guidance)
        seeds = [SEEDS[i] for i in indices]
        return draw(net, seeds, precision, sampler=sampler, batch_size=batch_size, **labels, **options)

    together = images(list(range(65)), 64)
    assert together.shape == (65, 3, SIZE, SIZE) and together.dtype == torch.float32
    assert together.isfinite().all() and together.std() > 0.05 and not together[0].equal(together[1])
    assert together[:14].equal(images(list(range(14)), 7))
    assert together[[64, 3]].equal(images([64, 3], 1))
    assert together[[9, 33, 64]].equal(images([9, 33, 64], 64))


class FourPixels(PixelSpace):
    """The space of gaussian.py: images of 2 x 2 pixels in one channel."""

    channels = 1


@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", dict(eta=0.7)), ("ddim", {})])
def test_an_image_depends_on_its_own_seed_alone(sampler, options):
    scheduler = NoiseScheduler(100, beta_end=0.1)
    pipeline = make_pipeline(exact(scheduler), scheduler=scheduler, space=FourPixels(), image_size=2, prediction="eps")

    def images(seeds: list[int]) -> torch.Tensor:
        torch.randn(len(seeds))  # the state of the global generator must not matter
        return pipeline.sample(seeds, sampler=sampler, steps=20, **options)

    alone = images([5])[0]
    assert images([3, 4, 5])[2].equal(alone)
    assert images([5, 11, 12, 13, 14, 15, 16])[0].equal(alone)
    assert not images([6])[0].equal(alone)


def test_labels_and_x_T_go_with_their_images(net):
    """Each image's own, across the boundaries of batches."""
    x_T = make_pipeline(net).noise(range(9))
    together = draw(net, SEEDS[:9], labels=LABELS[:9], x_T=x_T, batch_size=4)
    for i in (0, 4, 8):
        alone = draw(net, SEEDS[i : i + 1], labels=LABELS[i : i + 1], x_T=x_T[i : i + 1])
        assert alone[0].equal(together[i])
    assert not together[0].equal(draw(net, SEEDS[:1], x_T=x_T[:1])[0])
    assert not together[0].equal(draw(net, SEEDS[:1], labels=LABELS[:1])[0])


def test_without_x_T_it_comes_from_the_seeds(net):
    own = make_pipeline(net).noise(SEEDS[:3])
    assert draw(net, SEEDS[:3]).equal(draw(net, SEEDS[:3], x_T=own))
    assert not draw(net, SEEDS[:3], x_T=own).equal(draw(net, SEEDS[3:6], x_T=own))  # ddpm's steps draw as well
    ddim = dict(sampler="ddim", x_T=slerp(own[:1], own[1:2], 0.5))
    assert draw(net, [1], **ddim).equal(draw(net, [2], **ddim))


def test_a_padded_batch_gives_the_same_images(net):
    """As `sample` draws them without padding, but for rounding."""
    seeds, x_T = SEEDS[:3], make_pipeline(net).noise(SEEDS[:3])
    plain = sample(net, SCHEDULER, x_T, sampler="ddim", steps=3, prediction="v", labels=LABELS[:3], guidance=2.0)
    torch.testing.assert_close(draw(net, seeds, sampler="ddim", labels=LABELS[:3], guidance=2.0), plain, rtol=0,
                               atol=1e-4)


def test_noise(net):
    pipeline = make_pipeline(net, image_size=64)
    noise = pipeline.noise([7, 8, 7])
    assert noise.shape == (3, 3, 64, 64) and noise[0].equal(noise[2]) and not noise[0].equal(noise[1])
    assert noise[1].equal(pipeline.noise([8])[0])
    assert abs(noise[:2].mean()) < 0.03 and abs(noise[:2].std() - 1) < 0.03  # 24,576 numbers: 4.6 standard errors


def test_the_noise_of_the_steps_is_new():
    """Seeded with the image's seed alone, the first step would add x_T once more, and the variance would be wrong."""
    seen = []
    pipeline = make_pipeline(lambda x_t, t: 0 * x_t, scheduler=NoiseScheduler(), prediction="eps", image_size=32)
    x_T = pipeline.noise([4, 5])
    pipeline.sample([4, 5], sampler="ddpm", steps=4, callback=lambda *a: seen.append(a))
    drawn, x_t = [x_T], x_T
    for t, s, (_, x_s, x_0) in zip([999, 749, 499], [749, 499, 249], seen):
        mean, std = ddpm_step(pipeline.scheduler, x_0, x_t, t, s)
        drawn.append((x_s - mean) / std)
        x_t = x_s
    drawn = torch.stack(drawn).transpose(0, 1).flatten(0, 1).flatten(1)  # x_T and three steps, for each of two images
    torch.testing.assert_close(torch.corrcoef(drawn), torch.eye(8), rtol=0, atol=0.08)  # 4.4 / sqrt(3072)
    torch.testing.assert_close(drawn.std(1), torch.ones(8), rtol=0, atol=0.06)


def test_the_drawn_values_never_change():
    """Otherwise the seeds that people noted would give other images."""
    pipeline = make_pipeline(lambda x_t, t: 0 * x_t, prediction="x0")
    assert pipeline.noise([3]).flatten()[:3].tolist() == pytest.approx([-0.0766443, 0.3598815, -0.7820168], abs=1e-6)
    seen = []
    pipeline.sample([3], sampler="ddpm", steps=2, callback=lambda i, x_t, x_0: seen.append(x_t))
    mean, std = ddpm_step(SCHEDULER, torch.zeros(1), pipeline.noise([3]), 999, 499)
    step_noise = ((seen[0] - mean) / std).flatten()[:3]
    assert step_noise.tolist() == pytest.approx([0.4076397, 1.7634312, 0.6344476], abs=1e-5)


@pytest.mark.parametrize("wrong, message", [
    (dict(labels=LABELS[:2]), "2 rows of labels for 3 seeds"),
    (dict(labels=LABELS[:4], batch_size=1), "4 rows of labels for 3 seeds"),
    (dict(x_T=torch.zeros(1, 3, SIZE, SIZE)), "1 rows of x_T for 3 seeds"),
])
def test_wrong_lengths_are_refused(net, wrong, message):
    with pytest.raises(ValueError) as error:
        draw(net, SEEDS[:3], **wrong)
    assert str(error.value) == message


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(net, capsys):
    def cramped(x_t, t, *labels):
        if len(x_t) > 16:  # including the rows of the padding
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x_t, t, *labels)

    def too_small(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    seeds = SEEDS[:50]
    assert draw(cramped, seeds, batch_size=50).equal(draw(net, seeds, batch_size=50))
    printed = capsys.readouterr().out
    assert "50 images at a time; continuing with 25" in printed and "25 images at a time; continuing with 12" in printed
    with pytest.raises(torch.OutOfMemoryError):
        draw(too_small, seeds)


# ---------------------------------------------------------------------------------------------------------------------
# samplers


@pytest.mark.parametrize("settings, expected", [
    ({}, ("ddpm", 1000)),  # of a checkpoint without these settings
    (dict(sampler="ddim", sample_steps=50), ("ddpm", 1000)),  # of a training that kept the defaults
    (dict(sampler="ddim", sample_steps=20), ("ddim", 20)),
    (dict(sampler="dpm++", sample_steps=50), ("dpm++", 50)),
    (dict(sampler="sde-dpm++", sample_steps=20), ("sde-dpm++", 20)),
    (dict(sampler="ddpm", sample_steps=4000), ("ddpm", 1000)),
])
def test_the_default_sampler(net, settings, expected):
    """The whole reverse process, unless the training chose another sampler; the same on every device."""
    pipeline = make_pipeline(net, **settings)
    assert pipeline.default_sampler == expected
    assert pipeline.choose_sampler() == expected
    assert pipeline.choose_sampler(steps=7) == (expected[0], 7)
    pipeline.device = torch.device("meta")  # no device of another name changes it
    assert pipeline.default_sampler == expected


def test_sample_uses_the_default_sampler():
    scheduler, numbers = NoiseScheduler(60), []
    for settings, options in (({}, {}), (dict(sampler="dpm++", sample_steps=9), {}), ({}, dict(sampler="ddim"))):
        pipeline = make_pipeline(lambda x_t, t: 0 * x_t, scheduler=scheduler, **settings)
        pipeline.sample([1], callback=lambda i, x_t, x_0: numbers.append(i), **options)
    assert numbers == [*range(60), *range(9), *range(50)]


def test_fewer_steps_from_less_noise(net):
    pipeline = make_pipeline(net, scheduler=NoiseScheduler(100))
    assert pipeline.choose_sampler(start=49) == ("ddpm", 50)
    assert pipeline.choose_sampler("dpm++", start=0) == ("dpm++", 1)
    assert pipeline.choose_sampler(steps=30, start=49) == ("ddpm", 30)
    calls = []
    pipeline.sample([1], start=49, x_T=torch.zeros(1, 3, SIZE, SIZE), callback=lambda *_: calls.append(1))
    assert len(calls) == 50


def test_a_sampler_without_steps_takes_its_own_number(net):
    pipeline = make_pipeline(net)
    assert [pipeline.choose_sampler(name) for name in SAMPLERS if not SAMPLERS[name].tuned] == [
        ("ddpm", 1000), ("ddim", 50), ("dpm++", 20), ("sde-dpm++", 20)]
    tuned = make_pipeline(net, objective="consistency", sampler="consistency", sample_steps=4)
    assert tuned.choose_sampler("consistency") == ("consistency", 4) == tuned.default_sampler  # what it was tuned to
    short = make_pipeline(net, scheduler=NoiseScheduler(30), sampler="ddpm", sample_steps=9)
    assert short.choose_sampler("ddim") == ("ddim", 30) and short.choose_sampler("ddpm") == ("ddpm", 30)
    assert short.grid_sampler == ("ddpm", 9) and make_pipeline(net).grid_sampler == ("ddim", 50)


@pytest.mark.parametrize("wrong, message", [
    (dict(sampler="euler"), "unknown sampler 'euler': choose one of ddpm, ddim, dpm++, sde-dpm++, consistency"),
    (dict(steps=1001), "--steps must be 1 ... 1000 for this checkpoint, not 1001"),
    (dict(sampler="ddim", steps=0), "--steps must be 1 ... 1000 for this checkpoint, not 0"),
    (dict(steps=-1), "--steps must be 1 ... 1000 for this checkpoint, not -1"),
])
def test_a_sampler_that_cannot_be_used(net, wrong, message):
    pipeline = make_pipeline(net)
    for function in (pipeline.choose_sampler, lambda **options: pipeline.sample([1], **options)):
        with pytest.raises(ValueError) as error:
            function(**wrong)
        assert str(error.value) == message


def test_a_sampler_of_a_checkpoint_that_is_unknown_here(net):
    with pytest.raises(ValueError, match="unknown sampler 'euler'"):
        make_pipeline(net, sampler="euler", sample_steps=3).sample([1])


def test_options_of_the_sampler_are_passed_on(net):
    plain = draw(net, [1, 2], sampler="ddim")
    assert plain.equal(draw(net, [1, 2], sampler="ddim", eta=0.0))
    assert not plain.equal(draw(net, [1, 2], sampler="ddim", eta=1.0))
    assert not draw(net, [1, 2]).equal(draw(net, [1, 2], variance="beta"))
    assert not draw(net, [1, 2], clip=0.1).equal(draw(net, [1, 2]))
    with pytest.raises(ValueError, match="sampler dpm.. has no option eta"):
        draw(net, [1], sampler="dpm++", eta=0.5)


def test_a_new_sampler_needs_no_change_elsewhere(net, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(ddim_step, 3, True))
    pipeline = make_pipeline(net, sampler="mine", sample_steps=2)
    assert pipeline.choose_sampler("mine") == ("mine", 3) and pipeline.default_sampler == ("mine", 2)
    assert pipeline.sample([1, 2], sampler="mine").equal(draw(net, [1, 2], sampler="ddim"))


# ---------------------------------------------------------------------------------------------------------------------
# labels and guidance


def test_guidance_changes_the_image(net):
    labels = make_pipeline(net).class_labels([("fire", "water")] * 2)
    images = {guidance: draw(net, [1, 2], labels=labels, guidance=guidance) for guidance in (1.0, 3.0, 0.0)}
    assert images[1.0].equal(draw(net, [1, 2], labels=labels))
    assert images[0.0].equal(draw(net, [1, 2])) and not images[1.0].equal(images[0.0])
    assert not images[3.0].equal(images[1.0])


@pytest.mark.parametrize("options, settings, message", [
    (dict(guidance=3.0), {}, "none is given: add --types, with one or more of fire, flying, water"),
    (dict(guidance=3.0), dict(class_names=()), "this checkpoint knows none"),
    (dict(guidance=3.0, labels=LABELS[:2]), dict(label_dropout=0.0), "--label_dropout 0"),
    (dict(guidance=0.0, labels=LABELS[:2]), dict(label_dropout=0.0), "--label_dropout 0"),
    (dict(guidance=float("nan"), labels=LABELS[:2]), {}, "guidance must be a finite number"),
])
def test_guidance_that_cannot_be_followed_is_refused(net, options, settings, message):
    """Instead of being ignored, or of comparing with an output that was never trained."""
    with pytest.raises(ValueError) as error:
        make_pipeline(net, **settings).sample([1, 2], steps=2, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [dict(label_dropout=0.0), {}, dict(label_dropout=0.3)])
def test_guidance_1_is_never_refused(net, settings):
    pipeline = make_pipeline(net, **settings)
    assert ("types" in pipeline.guides) == (settings.get("label_dropout") != 0)
    for labels in (None, LABELS[:1]):
        assert pipeline.sample([1], labels=labels, sampler="ddim", steps=1).isfinite().all()


def test_class_labels(net):
    pipeline = make_pipeline(net)
    labels = pipeline.class_labels([("water",), (), ("fire", "water")])
    assert labels.dtype == torch.float32 and labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert make_pipeline(net, class_names=()).class_labels([()]).shape == (1, 0)
    with pytest.raises(ValueError):
        pipeline.class_labels([("rock",)])


# ---------------------------------------------------------------------------------------------------------------------
# spaces and files


def test_images_are_encoded_and_decoded_in_batches():
    torch.manual_seed(0)
    space = LatentSpace(Autoencoder(AutoencoderConfig(width=8, groups=4)).eval())
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    space.measure([images], "fp32")
    pipeline = make_pipeline(lambda x_t, t: 0 * x_t, space=space, image_size=16, prediction="x0")
    x_0 = pipeline.encode(images)
    assert x_0.shape == (20, *space.shape(16)) and x_0.dtype == torch.float32
    assert x_0[19:].equal(pipeline.encode(images[19:])) and x_0[[3, 5]].equal(pipeline.encode(images[[3, 5]]))
    decoded = pipeline.decode(x_0)
    assert decoded.shape == images.shape and decoded[[17]].equal(pipeline.decode(x_0[[17]]))
    drawn = pipeline.sample([1, 2], sampler="ddim", steps=2)  # x_0 = 0
    assert drawn.equal(pipeline.decode(torch.zeros(2, *space.shape(16))))


def test_latents_are_clipped_to_their_own_range():
    torch.manual_seed(0)
    space, seen = LatentSpace(Autoencoder(AutoencoderConfig(width=8, groups=4)).eval()), []
    space.measure([torch.rand(20, 3, 16, 16) * 2 - 1], "fp32")
    assert space.latent_range > 1
    pipeline = make_pipeline(lambda x_t, t: 100 * x_t, space=space, image_size=16, prediction="x0")
    pipeline.sample([1], sampler="ddim", steps=2, callback=lambda i, x_t, x_0: seen.append(x_0))
    assert seen[0].abs().max().item() == pytest.approx(space.latent_range)


def test_denoise_is_one_pass_of_the_network(net):
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([1, 500, 999])
    pipeline = make_pipeline(net)
    torch.testing.assert_close(pipeline.denoise(x_t, t, LABELS[:3]), net(x_t, t, LABELS[:3]), rtol=0, atol=1e-4)
    torch.testing.assert_close(pipeline.denoise(x_t, t), net(x_t, t), rtol=0, atol=1e-4)
    assert not pipeline.denoise(x_t, t).requires_grad


def test_a_checkpoint_is_all_that_is_needed(tmp_path, net):
    pipeline = Pipeline.load(save_model(tmp_path / "model.pt", sampler="dpm++", sample_steps=5))
    assert pipeline.class_names == CLASSES and pipeline.device == CPU and pipeline.precision in ("fp32", "bf16")
    assert (pipeline.image_size, pipeline.prediction) == (SIZE, "v") and pipeline.default_sampler == ("dpm++", 5)
    assert pipeline.scheduler.num_timesteps == 60 and not pipeline.net.training
    again = make_pipeline(net, scheduler=NoiseScheduler(60))
    fp32 = Pipeline.load(tmp_path / "model.pt", precision="fp32")
    assert fp32.sample([4], labels=LABELS[:1]).equal(again.sample([4], labels=LABELS[:1], sampler="dpm++", steps=5))


def test_the_newest_checkpoint_is_a_diffusion_model(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in .*train.py"):
        newest_checkpoint(tmp_path)
    save_model(tmp_path / "a/old.pt")
    save_checkpoint(tmp_path / "autoencoder.pt", ema={}, autoencoder={})
    (tmp_path / ".half.tmp.pt").write_bytes(b"")
    for written, name in enumerate(("a/old.pt", "autoencoder.pt", ".half.tmp.pt"), 100):
        os.utime(tmp_path / name, (written, written))
    assert newest_checkpoint(tmp_path) == tmp_path / "a/old.pt"
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path) == tmp_path / "damaged.pt"  # loading it names the problem


def test_bundled_models_are_drawn_only_where_there_is_no_other(tmp_path):
    for name in ("mine.pt", *reversed(BUNDLED)):  # the last one written is the newest
        save_model(tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "mine.pt"
    (tmp_path / "mine.pt").unlink()
    for name in BUNDLED:
        assert newest_checkpoint(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()
