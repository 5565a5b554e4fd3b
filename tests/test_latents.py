"""Diffusion on the latents of an autoencoder: the codec itself, and every script with it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import generate
import train
from augmentation import augment
from checkpoint import CheckpointError, load_checkpoint, load_codec, load_model, newest_checkpoint, save_checkpoint
from dataset import ImageFolder
from forward_diffusion import NoiseScheduler
from latents import Autoencoder, AutoencoderConfig, Pixels, make_codec
from reverse_diffusion import sample, sample_seeds
from scripts import FEW_STEPS, TINY, assert_one_line, assert_same_run, call, pictures, same
from unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("own_folder")
CPU = torch.device("cpu")
FLIP = [*TINY, "--augment", "flip"]


@pytest.fixture(scope="module")
def weights(trained_autoencoder) -> Path:
    return trained_autoencoder / "checkpoints/autoencoder/final_model.pt"


@pytest.fixture(scope="module")
def trained_on_latents(weights, tmp_path_factory) -> Path:
    """The folder in which a tiny model of latents was trained. Not to be written to."""
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


# ---------------------------------------------------------------------------------------------------------------------
# the codec


def test_latents_are_normalised_and_within_the_limit(weights, dataset, capsys):
    codec = load_codec(weights)
    codec.measure(dataset, "fp32")
    assert "4 x 4 x 4 for 3 x 16 x 16" in capsys.readouterr().out
    x_0 = codec.encode(dataset.images / 127.5 - 1)
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert x_0.std(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 4, rel=1e-4)
    assert x_0.abs().max().item() == pytest.approx(codec.limit, rel=1e-5) and codec.limit > 1


def test_what_is_saved_builds_the_same_codec(weights, dataset):
    codec = load_codec(weights)
    codec.measure(dataset, "fp32")
    again = make_codec(codec.saved())
    images = dataset.images / 127.5 - 1
    assert again.encode(images).equal(codec.encode(images)) and again.limit == codec.limit
    assert again.decode(codec.encode(images)).equal(codec.decode(codec.encode(images)))
    assert again.fingerprint() == codec.fingerprint() != Autoencoder(codec.config).fingerprint()
    assert isinstance(make_codec(None), Pixels)


@pytest.mark.parametrize("mode", ["none", "flip", "full"])
def test_latents_that_are_kept_are_those_of_the_augmented_pictures(weights, dataset, mode):
    codec = load_codec(weights)
    codec.measure(dataset, "fp32")
    prepared, to_x_0 = codec.prepare(dataset, mode, "fp32")
    assert (prepared is dataset) == (mode == "full") and len(prepared) == 10 and dataset.images.dtype == torch.uint8
    chosen, u = [7, 2, 2, 9], torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    u[:, 0] = torch.tensor([0.2, 0.7, 0.2, 0.7])  # picture 2 as it is, and mirrored
    x_0, told = to_x_0(prepared.__getitems__(chosen)[0], u)
    x, its_told = augment(dataset.images[chosen], mode=mode, u=u)
    assert told.equal(its_told)
    assert torch.allclose(x_0, codec.encode(x), atol=1e-5)
    if mode == "flip":
        assert not x_0[1].equal(x_0[2])


def test_pictures_that_are_not_in_memory_are_encoded_as_they_come(weights):
    Path("mine").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(f"mine/{i}.png")
    on_disk, codec = ImageFolder("mine", 16, memory_limit=0), load_codec(weights)
    codec.measure(on_disk, "fp32")
    prepared, to_x_0 = codec.prepare(on_disk, "flip", "fp32")
    assert prepared is on_disk
    images = prepared.__getitems__([1, 2])[0]
    x_0, _ = to_x_0(images, torch.ones(2, 8))
    assert torch.allclose(x_0, codec.encode(images / 127.5 - 1), atol=1e-6)


def test_the_samplers_work_in_the_codecs_space(weights, dataset):
    """A network that knows one latent leads to that latent's picture, whatever the sampler."""
    codec = load_codec(weights)
    codec.measure(dataset, "fp32")
    x_0 = codec.encode(dataset.images[:1] / 127.5 - 1)
    for sampler in ("ddpm", "ddim", "dpm++", "sde-dpm++"):
        images = sample_seeds(lambda x_t, t: x_0.expand_as(x_t), NoiseScheduler(50), [3, 4], 16, CPU, "fp32",
                              codec=codec, sampler=sampler, steps=5, prediction="x0")
        assert torch.allclose(images, codec.decode(x_0).expand(2, -1, -1, -1), atol=1e-5)


def test_clip_can_be_a_number():
    scheduler, x_T = NoiseScheduler(50), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for clip, largest in ((True, 1), (2.5, 2.5), (False, 9)):
        x_0 = sample(lambda x_t, t: torch.full_like(x_t, 9), scheduler, x_T, sampler="ddim", steps=2, prediction="x0",
                     clip=clip)
        assert x_0.max().item() == pytest.approx(largest)


def test_a_sample_at_256_costs_less_than_an_eighth():
    """Of what one costs in pixels with the same widths, in 50 steps, decoding included; counted without computing."""
    def flop(make_codec) -> int:
        with torch.device("meta"):
            codec = make_codec()
            model = UNet(UNetConfig(channels=codec.channels))
            x_t, t = torch.empty(1, *codec.shape(256)), torch.zeros(1, dtype=torch.long)
            with FlopCounterMode(display=False) as step:
                model(x_t, t)
            with FlopCounterMode(display=False) as decoding:
                assert codec.decode(x_t).shape == (1, 3, 256, 256)
        return 50 * step.get_total_flops() + decoding.get_total_flops()

    assert 16 * flop(Autoencoder) < 1.01 * flop(Pixels)  # a sixteenth, and the decoder, less what attention saves


# ---------------------------------------------------------------------------------------------------------------------
# the scripts


def test_generate_needs_the_one_checkpoint_only(final):
    shutil.copy(final, "model.pt")
    assert call(generate, "--checkpoint", "model.pt", *FEW_STEPS, "--num_images", 5, "--individual") == 0
    found = pictures("outputs/generated")
    assert len(found) == 5 and all(picture.shape == (16, 16, 3) for picture in found.values())
    assert len(np.unique([picture.tobytes() for picture in found.values()])) == 5
    for batch_size in (1, 3):  # a seed is its picture in any batch, decoding included
        flags = ["--num_images", 5, "--batch_size", batch_size, "--individual", "--output", f"by_{batch_size}.png"]
        assert call(generate, "--checkpoint", "model.pt", *FEW_STEPS, *flags) == 0
        again = pictures(f"by_{batch_size}")
        assert all(np.array_equal(again[name], picture) for name, picture in found.items())


def test_generate_can_do_all_it_can(final):
    content, generator = load_checkpoint(final), torch.Generator().manual_seed(3)
    for weight in content["ema"].values():  # so that its answer depends on all that it is given
        weight.normal_(std=0.15, generator=generator)
    save_checkpoint("loud.pt", **content)
    final = "loud.pt"

    def draw(*flags):
        assert call(generate, "--checkpoint", final, *FEW_STEPS, "--num_images", 3, *flags) == 0
        return np.asarray(Image.open("outputs/generated.png")).astype(int)

    plain = draw("--sampler", "ddim", "--gif")
    film = Image.open("outputs/generated.gif")
    assert film.n_frames == 3 and film.size == plain.shape[1::-1]
    assert not np.array_equal(plain, draw("--sampler", "ddim", "--types", "fire", "--guidance", 2))
    walk = draw("--interpolate", 0, 2, "--sampler", "ddim")
    assert np.abs(walk[2:18, 2:18] - plain[2:18, 2:18]).max() <= 1  # it begins at the picture of seed 0

    codec = load_model(final)[2]
    Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8)[:, None, None], (1, 16, 3))).save("ramp.png")
    ramp = torch.from_numpy(np.asarray(Image.open("ramp.png")).astype(np.float32).transpose(2, 0, 1)[None]) / 127.5 - 1
    back = ((codec.decode(codec.encode(ramp))[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    near = draw("--init_image", "ramp.png", "--strength", 0.02, "--sampler", "ddim")[2:18, 2:18]
    far = draw("--init_image", "ramp.png", "--strength", 1, "--sampler", "ddim")[2:18, 2:18]
    assert np.abs(near - back).mean() < 15 and np.abs(near - back).mean() < np.abs(far - back).mean()


def test_evaluate(final, capsys):
    flags = ["--num_samples", 50, "--steps", 2, "--num_likelihood", 4, "--likelihood_steps", 2, "--device", "cpu"]
    assert call(evaluate, "--checkpoint", final, *flags) == 0
    text = Path("outputs/evaluation/report.html").read_text()
    assert "bits, unseen" in capsys.readouterr().out and "those of latents" in text


def test_a_resumed_training_is_the_same(weights, trained_on_latents):
    shutil.copy(weights, "autoencoder.pt")
    assert call(train, *FLIP, "--autoencoder", "autoencoder.pt", "--max_steps", 2) == 0
    Path("autoencoder.pt").unlink()  # it travels in the checkpoint
    assert call(train, "--resume", "--max_steps", 0) == 0
    ours, theirs = (load_checkpoint(folder / "checkpoints/latest.pt") for folder in (Path(), trained_on_latents))
    theirs["config"]["autoencoder"] = ours["config"]["autoencoder"]
    assert_same_run(ours, theirs)


def test_pictures_encoded_as_they_come_and_parts_of_a_batch(weights):
    found = {}
    for parts in (1, 2):
        flags = ["--run_name", f"in_{parts}", "--grad_accum", parts, "--max_steps", 2, "--augment", "full"]
        assert call(train, *TINY, "--autoencoder", weights, *flags) == 0
        found[parts] = load_checkpoint(f"checkpoints/in_{parts}/latest.pt")["ema"]
    for name, ours in found[1].items():
        assert torch.allclose(ours, found[2][name], atol=1e-5), name


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


def test_files_that_are_something_else(weights, final, trained, capsys):
    pixels = trained / "checkpoints/final_model.pt"
    assert_one_line(call(train, *TINY, "--autoencoder", pixels), capsys, "no autoencoder", str(pixels))
    assert_one_line(call(train, *TINY, "--autoencoder", "none.pt"), capsys, "none.pt", "autoencoder.py")
    for script in (generate, evaluate):
        assert_one_line(call(script, "--checkpoint", weights), capsys, "no diffusion model", str(weights))
    line = call(train, *FLIP, "--init", pixels, "--autoencoder", weights)
    capsys.readouterr()
    assert_one_line(line, capsys, "--init", "its autoencoder")
    size = [*TINY, "--image_size", 20, "--autoencoder", weights]
    assert_one_line(call(train, *size), capsys, "multiple of 8", "20")


def test_the_newest_checkpoint_is_no_autoencoder(weights, final):
    Path("checkpoints").mkdir()
    shutil.copy(final, "checkpoints/model.pt")
    shutil.copy(weights, "checkpoints/newer.pt")
    assert newest_checkpoint() == Path("checkpoints/model.pt")
    Path("checkpoints/model.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        newest_checkpoint()
    Path("checkpoints/damaged.pt").write_bytes(b"x")  # which is for its reader to say
    assert newest_checkpoint() == Path("checkpoints/damaged.pt")
