"""Diffusion in the latents of an autoencoder: the space itself, and every command with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import FEW_STEPS, TINY, assert_one_line, assert_same_run, call, pictures, same
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import generate
import train
from forward_diffusion import NoiseScheduler
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.pipeline import Pipeline, newest_checkpoint
from models.space import LatentSpace, PixelSpace, load_space, space_from_state
from reverse_diffusion import SAMPLERS, sample
from training.dataset import ImageFolder
from training.run_images import plain_batches
from unet import UNet, UNetConfig
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")
CPU = torch.device("cpu")
FLIP = [*TINY, "--augment", "flip"]


@pytest.fixture(scope="module")
def weights(trained_autoencoder) -> Path:
    return trained_autoencoder / "checkpoints/autoencoder/final_model.pt"


@pytest.fixture(scope="module")
def trained_on_latents(weights, tmp_path_factory) -> Path:
    """Return a folder in which a tiny model of latents was trained. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained_on_latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(train, *FLIP, "--autoencoder", weights) == 0
    return folder


@pytest.fixture
def final(trained_on_latents) -> Path:
    return trained_on_latents / "checkpoints/final_model.pt"


@pytest.fixture
def dataset() -> ImageFolder:
    images = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageFolder.from_array(images)


@pytest.fixture
def space(weights, dataset) -> LatentSpace:
    """The space of the trained autoencoder, measured on the data set."""
    space = load_space(weights)
    space.measure(plain_batches(dataset), "fp32")
    return space


# ---------------------------------------------------------------------------------------------------------------------
# the space


def test_latents_are_normalised_and_within_their_range(space, dataset):
    x_0 = space.encode(dataset.images / 127.5 - 1)
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert x_0.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5], rel=1e-4)
    assert x_0.abs().max().item() == pytest.approx(space.latent_range, rel=1e-5) and space.latent_range > 1


def test_measuring_announces_the_size_and_the_psnr(weights, dataset, capsys):
    space = load_space(weights)
    train.measure_latents(space, train.Config(image_size=16), plain_batches(dataset), "fp32")
    images = dataset.images / 127.5 - 1
    db = -10 * ((space.decode(space.encode(images)) - images) / 2).square().mean(dim=(1, 2, 3)).log10().mean()
    assert f"6 x 4 x 4 for 3 x 16 x 16; reconstructions have a PSNR of {db:.1f} dB" in capsys.readouterr().out


def test_a_space_is_rebuilt_from_its_state(space, dataset):
    again = space_from_state(space.state())
    images = dataset.images / 127.5 - 1
    assert again.encode(images).equal(space.encode(images)) and again.latent_range == space.latent_range
    assert again.decode(space.encode(images)).equal(space.decode(space.encode(images)))
    other = LatentSpace(Autoencoder(space.autoencoder.config))
    assert again.fingerprint() == space.fingerprint() != other.fingerprint()
    assert isinstance(space_from_state(None), PixelSpace)


def test_the_samplers_work_in_latent_space(space, dataset):
    """A network that knows one latent leads to that latent's image, with any sampler."""
    x_0 = space.encode(dataset.images[:1] / 127.5 - 1)
    pipeline = Pipeline(lambda x_t, t: x_0.expand_as(x_t), NoiseScheduler(50), space,
                        dict(image_size=16, prediction="x0"), (), CPU, "fp32")
    for sampler in SAMPLERS:
        pipeline.settings["objective"] = "consistency" if SAMPLERS[sampler].tuned else "denoising"
        images = pipeline.sample([3, 4], sampler=sampler, steps=5)
        assert torch.allclose(images, space.decode(x_0).expand(2, -1, -1, -1), atol=1e-5)


def test_clip_can_be_a_number():
    scheduler, x_T = NoiseScheduler(50), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for clip, largest in ((True, 1), (2.5, 2.5), (False, 9)):
        x_0 = sample(lambda x_t, t: torch.full_like(x_t, 9), scheduler, x_T, sampler="ddim", steps=2, prediction="x0",
                     clip=clip)
        assert x_0.max().item() == pytest.approx(largest)


def test_a_sample_at_256_costs_less_than_an_eighth():
    """Of its cost in pixels with the same widths, in 50 steps, decoding included; counted without computing."""
    def flop(make_space) -> int:
        with torch.device("meta"):
            space = make_space()
            net = UNet(UNetConfig(channels=space.channels))
            x_t, t = torch.empty(1, *space.shape(256)), torch.zeros(1, dtype=torch.long)
            with FlopCounterMode(display=False) as step:
                net(x_t, t)
            with FlopCounterMode(display=False) as decoding:
                assert space.decode(x_t).shape == (1, 3, 256, 256)
        return 50 * step.get_total_flops() + decoding.get_total_flops()

    in_latents = flop(lambda: LatentSpace(Autoencoder()))
    assert 16 * in_latents < 1.01 * flop(PixelSpace)  # a sixteenth, and the decoder, less what attention saves


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def test_generate_needs_no_file_but_the_checkpoint(final):
    shutil.copy(final, "model.pt")
    assert call(generate, "--checkpoint", "model.pt", *FEW_STEPS, "--num_images", 5, "--individual") == 0
    drawn = pictures("outputs/generated")
    assert len(drawn) == 5 and all(image.shape == (16, 16, 3) for image in drawn.values())
    assert len(np.unique([image.tobytes() for image in drawn.values()])) == 5
    for batch_size in (1, 3):  # a seed gives the same image in any batch, decoding included
        flags = ["--num_images", 5, "--batch_size", batch_size, "--individual", "--output", f"by_{batch_size}.png"]
        assert call(generate, "--checkpoint", "model.pt", *FEW_STEPS, *flags) == 0
        again = pictures(f"by_{batch_size}")
        assert all(np.array_equal(again[name], image) for name, image in drawn.items())


def test_every_mode_of_generate(final):
    content, generator = load_checkpoint(final), torch.Generator().manual_seed(3)
    for weight in content["ema"].values():  # so that the output depends on all inputs
        weight.normal_(std=0.15, generator=generator)
    save_checkpoint("loud.pt", **content)
    final = "loud.pt"

    def draw(*flags):
        assert call(generate, "--checkpoint", final, *FEW_STEPS, "--num_images", 3, *flags) == 0
        return np.asarray(Image.open("outputs/generated.png")).astype(int)

    plain = draw("--sampler", "ddim", "--gif")
    animation = Image.open("outputs/generated.gif")
    assert animation.n_frames == 3 and animation.size == plain.shape[1::-1]
    assert not np.array_equal(plain, draw("--sampler", "ddim", "--types", "fire", "--guidance", 2))
    walk = draw("--interpolate", 0, 2, "--sampler", "ddim")
    assert np.abs(walk[2:18, 2:18] - plain[2:18, 2:18]).max() <= 1  # it begins at the image of seed 0

    space = Pipeline.load(final).space
    Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8)[:, None, None], (1, 16, 3))).save("ramp.png")
    ramp = torch.from_numpy(np.asarray(Image.open("ramp.png")).astype(np.float32).transpose(2, 0, 1)[None]) / 127.5 - 1
    back = ((space.decode(space.encode(ramp))[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    near = draw("--init_image", "ramp.png", "--strength", 0.02, "--sampler", "ddim")[2:18, 2:18]
    far = draw("--init_image", "ramp.png", "--strength", 1, "--sampler", "ddim")[2:18, 2:18]
    assert np.abs(near - back).mean() < 15 and np.abs(near - back).mean() < np.abs(far - back).mean()


def test_evaluate(final, capsys):
    flags = ["--num_samples", 50, "--steps", 2, "--num_likelihood", 4, "--likelihood_steps", 2, "--device", "cpu"]
    assert call(evaluate, "--checkpoint", final, *flags) == 0
    text = Path("outputs/evaluation/report.html").read_text()
    assert "bits, unseen images" in capsys.readouterr().out and "per latent value" in text


def test_a_resumed_training_is_the_same(weights, trained_on_latents):
    shutil.copy(weights, "autoencoder.pt")
    assert call(train, *FLIP, "--autoencoder", "autoencoder.pt", "--max_steps", 2) == 0
    Path("autoencoder.pt").unlink()  # the checkpoint contains it
    assert call(train, "--resume", "--max_steps", 0) == 0
    ours, theirs = (load_checkpoint(folder / "checkpoints/latest.pt") for folder in (Path(), trained_on_latents))
    theirs["config"]["autoencoder"] = ours["config"]["autoencoder"]
    assert_same_run(ours, theirs)


def test_images_encoded_as_they_come_and_parts_of_a_batch(weights):
    networks = {}
    for parts in (1, 2):
        flags = ["--run_name", f"in_{parts}", "--grad_accum", parts, "--max_steps", 2, "--augment", "full"]
        assert call(train, *TINY, "--autoencoder", weights, *flags) == 0
        networks[parts] = load_checkpoint(f"checkpoints/in_{parts}/latest.pt")["ema"]
    for name, ours in networks[1].items():
        assert torch.allclose(ours, networks[2][name], atol=1e-5), name


def test_the_autoencoder_of_a_model_can_be_used_again(final, trained_on_latents):
    """Training from its checkpoint alone, with its weights to start from, and with others."""
    flags = ["--autoencoder", final, "--init", final, "--lr", "1e-12", "--max_steps", 1]
    assert call(train, *FLIP, *flags) == 0
    ours, theirs = load_checkpoint("checkpoints/final_model.pt"), load_checkpoint(final)
    assert same(ours["autoencoder"], theirs["autoencoder"])
    assert all(torch.allclose(ours["ema"][name], value, atol=1e-6) for name, value in theirs["ema"].items())


def damaged(final: Path, path: str, **changes) -> str:
    content = load_checkpoint(final)
    content["autoencoder"] = {**content["autoencoder"], **changes}
    save_checkpoint(path, **content)
    return path


def test_a_latent_model_with_an_autoencoder_that_does_not_fit(final, capsys):
    weights = load_checkpoint(final)["autoencoder"]["weights"]
    spoiled = {**weights, "mean": torch.full_like(weights["mean"], torch.nan)}
    other = Autoencoder(AutoencoderConfig(width=8, channels=3))
    for changes in (dict(weights=spoiled), dict(weights={}), dict(config={}), dict(weights=None),
                    dict(config=dict(vars(other.config)), weights=other.state_dict())):
        path = damaged(final, "damaged.pt", **changes)
        assert_one_line(call(generate, "--checkpoint", path, *FEW_STEPS), capsys, "damaged.pt")
        assert_one_line(call(evaluate, "--checkpoint", path), capsys, "damaged.pt")
    content = load_checkpoint(final)
    for changes in (dict(config={**content["config"], "image_size": 20}), dict(autoencoder=None)):
        save_checkpoint("odd.pt", **{**content, **changes})
        assert_one_line(call(generate, "--checkpoint", "odd.pt", *FEW_STEPS), capsys, "odd.pt")


def test_checkpoints_of_another_kind(weights, final, trained, capsys):
    pixels = trained / "checkpoints/final_model.pt"
    assert_one_line(call(train, *TINY, "--autoencoder", pixels), capsys, "no autoencoder", str(pixels))
    assert_one_line(call(train, *TINY, "--autoencoder", "none.pt"), capsys, "none.pt", "tools.train_autoencoder")
    for script in (generate, evaluate):
        assert_one_line(call(script, "--checkpoint", weights), capsys, "no diffusion model", str(weights))
    line = call(train, *FLIP, "--init", pixels, "--autoencoder", weights)
    capsys.readouterr()
    assert_one_line(line, capsys, "--init", "differs in its size and autoencoder")
    line = call(train, *TINY, "--labels", "none", "--init", pixels)
    capsys.readouterr()
    assert_one_line(line, capsys, "--init", "differs in its types; give images with the same types")
    size = [*TINY, "--image_size", 20, "--autoencoder", weights]
    assert_one_line(call(train, *size), capsys, "multiple of 8", "20")


def test_the_newest_checkpoint_is_not_an_autoencoder(weights, final):
    Path("checkpoints").mkdir()
    shutil.copy(final, "checkpoints/model.pt")
    shutil.copy(weights, "checkpoints/newer.pt")
    assert newest_checkpoint() == Path("checkpoints/model.pt")
    Path("checkpoints/model.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        newest_checkpoint()
    Path("checkpoints/damaged.pt").write_bytes(b"x")  # the reader of it will say so
    assert newest_checkpoint() == Path("checkpoints/damaged.pt")
