"""Inpainting: the law of what is drawn given what is kept, the bits of what is kept, and the flags of generate.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from critter_model import save_critter_model
from gaussian import MEAN, STD, exact, exact_of_covariance, start
from PIL import Image
from scripts import assert_one_line, call, pictures

import generate
from forward_diffusion import NoiseScheduler
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.pipeline import Pipeline
from models.space import LatentSpace, PixelSpace
from reverse_diffusion import SAMPLERS, Inpainting, repeat_parts, sample
from unet import UNet, UNetConfig
from utils.images import decode_image, read_settings

pytestmark = pytest.mark.usefixtures("own_folder")
TOP = torch.tensor([[True, True], [False, False]])
UNTUNED = [name for name in SAMPLERS if not SAMPLERS[name].tuned]  # jumps leave no steps to repeat


# ---------------------------------------------------------------------------------------------------------------------
# the law: four pixels with correlations of one half, the lower two of which are kept, two deviations above their means


N = 1500
CORRELATED = STD.flatten()[:, None] * (0.5 + 0.5 * torch.eye(4, dtype=torch.float64)) * STD.flatten()
KEPT = (MEAN + 2 * STD)[None, None]


def standardised(scheduler: NoiseScheduler, sampler: str, steps: int, resample: int) -> torch.Tensor:
    """Draw the upper pixels N times; return them [N, 2] as the known conditional law makes them standard normal.

    For a Gaussian, E[u | k] = E[u] + C_uk C_kk^-1 (k - E[k]), with the covariance C_uu - C_uk C_kk^-1 C_ku.
    """
    torch.manual_seed(0)
    images = sample(exact_of_covariance(scheduler, CORRELATED), scheduler, start(N), sampler=sampler, steps=steps,
                    prediction="x0", clip=False, inpainting=Inpainting(KEPT, TOP, resample))
    assert images[:, :, 1].equal(KEPT[:, :, 1].expand(N, 1, 2))
    gain = torch.linalg.solve(CORRELATED[2:, 2:], CORRELATED[2:, :2])
    mean = MEAN[0] + 2 * STD[1] @ gain
    covariance = CORRELATED[:2, :2] - CORRELATED[:2, 2:] @ gain
    return torch.linalg.solve(torch.linalg.cholesky(covariance), (images[:, 0, 0] - mean).T).T


def errors(drawn: torch.Tensor) -> tuple[float, float]:
    """Return the largest errors of mean and covariance, in their standard errors for N images."""
    mean, covariance = drawn.mean(dim=0), torch.cov(drawn.T)
    spread = (1 + torch.eye(2)) ** 0.5  # sqrt(2 / N) for a variance, sqrt(1 / N) for a covariance
    return mean.abs().max().item() * N**0.5, ((covariance - torch.eye(2)).abs() / spread).max().item() * N**0.5


def test_with_resampling_the_redrawn_part_has_the_law_given_the_kept_part():
    """And plain replacement has not: it underestimates how much the kept part says."""
    scheduler = NoiseScheduler(schedule="cosine")
    mean_error, covariance_error = errors(standardised(scheduler, "sde-dpm++", steps=100, resample=20))
    assert mean_error < 4 and covariance_error < 4
    plain = standardised(scheduler, "sde-dpm++", steps=100, resample=1)
    assert errors(plain)[0] > 8
    assert 0.3 < plain.mean(dim=0).norm() < 0.5  # standard deviations, as DIFFUSION_THEORY.md has it


@pytest.mark.parametrize("sampler", UNTUNED)
def test_every_sampler_gains_by_resampling(sampler):
    scheduler = NoiseScheduler(schedule="cosine")
    plain, repeated = (standardised(scheduler, sampler, steps=20, resample=number).mean(dim=0).norm()
                       for number in (1, 10))
    assert repeated < 0.55 * plain


@pytest.mark.parametrize("sampler", UNTUNED)
def test_at_every_step_the_kept_pixels_have_that_noise(sampler):
    """Mean and deviation of q(x_t | x_0), whatever the network says; and in the end the pixels themselves."""
    scheduler, seen = NoiseScheduler(schedule="cosine"), []
    kept = torch.tensor([0.3, -0.8], dtype=torch.float64)
    sample(lambda x_t, t: -x_t, scheduler, start(1000), sampler=sampler, steps=4, prediction="v",
           inpainting=Inpainting(kept.expand(1, 1, 2, 2), TOP, resample=1), callback=lambda *a: seen.append(a[1]))
    assert len(seen) == 4 and seen[-1][:, 0, 1].equal(kept.expand(1000, 2))
    for t, x_t in zip((749, 499, 249), seen):
        abar = scheduler.alpha_bar(t)
        noise = (x_t[:, 0, 1] - abar**0.5 * kept) / (1 - abar) ** 0.5
        assert noise.mean(dim=0).abs().max() < 4 / 1000**0.5 and (noise.std(dim=0) - 1).abs().max() < 4 / 2000**0.5


@pytest.mark.parametrize("steps, resample, jump", [(20, 10, None), (7, 3, 2), (6, 2, 2), (250, 10, None), (1, 9, None),
                                                   (2, 5, 1), (5, 4, 99)])
def test_the_parts_of_the_path(steps, resample, jump):
    """Each repetition begins where its part does; all steps are made, in order; the last one once."""
    path = [(t, t - 1) for t in range(steps - 1, -1, -1)]
    assert repeat_parts(path, 1, jump) == path
    repeated = repeat_parts(path, resample, jump)
    size = jump or {20: 2, 250: 10, 1: 2}[steps]  # 10 of 250 steps are the paper's
    assert len(repeated) == steps + (resample - 1) * ((steps - 1) // size) * size
    assert list(dict.fromkeys(repeated)) == path and repeated[-1] == (0, -1)
    now, ups = steps - 1, 0
    for t, t_next in repeated:
        assert t == now or t == now + size
        ups += t > now
        now = t_next
    assert ups == (resample - 1) * ((steps - 1) // size)


@pytest.mark.parametrize("wrong", [dict(resample=0), dict(jump=0), dict(resample=-1)])
def test_impossible_repetitions_are_refused(wrong):
    scheduler = NoiseScheduler(10)
    with pytest.raises(ValueError, match="resample and jump must be at least 1"):
        sample(exact(scheduler), scheduler, start(2), inpainting=Inpainting(KEPT, TOP, **wrong))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_more_noise_on_noise_is_the_noise_of_the_later_timestep(zero_terminal_snr):
    """The signal's factors multiply and the variances add up, to those of one jump."""
    scheduler = NoiseScheduler(zero_terminal_snr=zero_terminal_snr)
    one, none = start(1, seed=1), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for s, t in ((0, 1), (3, 600), (700, 999)):
        signal = scheduler.add_more_noise(scheduler.add_noise(one, s, none), s, t, none)
        early = scheduler.add_more_noise(scheduler.add_noise(none, s, one), s, t, none)
        late = scheduler.add_more_noise(none, s, t, one)
        torch.testing.assert_close(signal, scheduler.add_noise(one, t, none))
        torch.testing.assert_close(early**2 + late**2, scheduler.add_noise(none, t, one) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# the pipeline


def make_pipeline(space: PixelSpace | LatentSpace) -> Pipeline:
    """Return a pipeline of 16x16 images with random weights, whose output depends on all of its input."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=space.channels, width=8, multipliers=(1,), blocks=1, groups=4, num_types=2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(net.eval(), NoiseScheduler(schedule="cosine"), space, dict(image_size=16, prediction="v"),
                    ("fire", "water"), torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def latents() -> LatentSpace:
    torch.manual_seed(0)
    space = LatentSpace(Autoencoder(AutoencoderConfig(width=8, groups=4)).eval())
    space.measure([torch.rand(20, 3, 16, 16) * 2 - 1], "fp32")
    return space


IMAGE = (torch.arange(256).remainder(251) / 127.5 - 1).view(1, 16, 16).expand(3, 16, 16)  # most values of 8 bits
BLOB = torch.zeros(16, 16, dtype=torch.bool)
BLOB[3:9, 5] = True
BLOB[8, 2:7] = True


@pytest.mark.parametrize("is_latent", [False, True])
def test_what_is_kept_is_kept_to_the_bit_and_an_image_depends_on_its_own_seed_alone(is_latent, latents):
    pipeline = make_pipeline(latents if is_latent else PixelSpace())
    labels = pipeline.class_labels([("fire",), ("water",), ()] * 3)
    flags = dict(sampler="sde-dpm++", steps=4, guidance=2.0, resample=2)
    images = pipeline.inpaint(range(9), IMAGE, BLOB, labels=labels, **flags)
    assert images.shape == (9, 3, 16, 16)
    assert images[:, :, ~BLOB].equal(IMAGE[:, ~BLOB].expand(9, -1, -1))
    drawn = images[:, :, BLOB]
    assert (drawn != IMAGE[:, BLOB]).float().mean() > 0.9 and not drawn[0].equal(drawn[3])
    some = pipeline.inpaint([7, 2], IMAGE, BLOB, labels=labels[[7, 2]], batch_size=1, **flags)
    assert some.equal(images[[7, 2]])


def test_a_latent_cell_is_drawn_anew_if_one_of_its_pixels_is(latents, monkeypatch):
    pipeline, seen = make_pipeline(latents), {}
    monkeypatch.setattr(pipeline, "sample", lambda seeds, **options: seen.update(options) or IMAGE[None])
    pipeline.inpaint([1], IMAGE, BLOB)
    expected = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert seen["inpainting"].redraw.equal(expected[None])
    assert seen["inpainting"].x_0.equal(pipeline.encode(IMAGE[None]))


# ---------------------------------------------------------------------------------------------------------------------
# generate.py


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of 16x16 images with 20 timesteps and random weights."""
    return save_critter_model(tmp_path_factory.mktemp("model") / "model.pt")


def run(model: Path, *flags) -> int | str | None:
    return call(generate, "--checkpoint", model, "--device", "cpu", "--steps", 3, "--num_images", 2, *flags)


def write_inputs(white: tuple[int, int, int, int] = (10, 0, 30, 20), size: tuple[int, int] = (40, 32)) -> None:
    """Write image.png, 40 x 32 in random colours, and mask.png, white within these pixels."""
    noise = np.random.default_rng(0).integers(256, size=(32, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save("image.png")
    mask = Image.new("L", size)
    mask.paste(255, white)
    mask.save("mask.png")


INPAINT = ("--init_image", "image.png", "--mask", "mask.png", "--resample", 2)


def test_the_kept_pixels_of_the_png_are_those_of_the_image(model, capsys):
    """Of the image as it is read: its middle, scaled; the mask goes with it."""
    write_inputs()
    small = decode_image("image.png", 16).transpose(1, 2, 0)
    redraw = np.zeros((16, 16), dtype=bool)
    redraw[:10, 3:13] = True
    assert run(model, *INPAINT, "--types", "fire", "--individual", "--output", "p.png", "--gif") == 0
    assert "3 steps, repeated in 5 passes, guidance 3" in capsys.readouterr().out
    drawn = pictures("p")
    assert list(drawn) == ["seed_000000_fire.png", "seed_000001_fire.png"]
    for image in drawn.values():
        assert np.array_equal(image[~redraw], small[~redraw]) and (image[redraw] != small[redraw]).mean() > 0.9
    settings = read_settings("p.png")
    assert (settings["mask"], settings["resample"], settings["strength"]) == ("mask.png", 2, 1.0)
    film = Image.open("p.gif")
    film.seek(film.n_frames - 1)
    difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(Image.open("p.png"))
    assert film.n_frames == 5 and np.abs(difference).mean() < 12
    assert run(model, *INPAINT, "--types", "fire", "--individual", "--output", "q.png", "--seed", 1) == 0
    assert np.array_equal(pictures("q")["seed_000001_fire.png"], drawn["seed_000001_fire.png"])


def test_decode_image_runs_once_for_each_file(model, monkeypatch):
    read = []
    monkeypatch.setattr(generate, "decode_image", lambda path, size: read.append(str(path)) or decode_image(path, size))
    write_inputs()
    assert run(model, *INPAINT) == 0 and read == ["image.png", "mask.png"]


def test_strength_below_1_keeps_something_of_the_redrawn_part(model):
    """With pure noise, another image there changes nothing; below 1 it does."""
    def drawn(*flags):
        assert run(model, *INPAINT, *flags) == 0
        return np.asarray(Image.open("outputs/generated.png"))

    write_inputs()
    images = drawn("--strength", 0.5), drawn(), drawn("--strength", 1)
    painted = Image.open("image.png")
    painted.paste("white", (17, 2, 23, 13))  # within the mask, and beyond the reach of the scaling
    painted.save("image.png")
    painted = drawn("--strength", 0.5), drawn(), drawn("--strength", 1)
    same = [np.array_equal(*pair) for pair in zip(images, painted)]
    assert same == [False, True, True] and np.array_equal(images[1], images[2])


@pytest.mark.parametrize("grey, white, rows, columns", [
    (255, (10, 0, 30, 20), (0, 10), (3, 13)), (128, (10, 0, 30, 20), (0, 10), (3, 13)),
    (255, (11, 1, 29, 19), (0, 10), (3, 13)),  # squares of 2 x 2 that are half white, at the edges
    (255, (12, 2, 28, 18), (1, 9), (4, 12)), (255, (0, 0, 20, 32), (0, 16), (0, 8)),
])
def test_a_mask_is_scaled_as_the_image_and_grey_is_white_from_half_on(grey, white, rows, columns):
    write_inputs(white)
    Image.open("mask.png").point(lambda value: grey if value else 127).save("mask.png")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    if white == (11, 1, 29, 19):  # a quarter of each corner is white
        expected[[0, 0, 9, 9], [3, 12, 3, 12]] = False
    redraw = generate.read_mask(Path("mask.png"), (40, 32), 16)
    assert redraw.equal(expected)


@pytest.mark.parametrize("flags, words", [
    (["--mask", "mask.png"], ["--mask needs --init_image"]),
    (["--init_image", "image.png", "--resample", 3], ["--resample needs --mask"]),
    ([*INPAINT[:4], "--resample", 0], ["--resample", "more than 0"]),
    (["--init_image", "image.png", "--mask", "missing.png"], ["cannot read --mask missing.png"]),
    (["--init_image", "image.png", "--mask", "text.png"], ["cannot read --mask text.png", "not an image"]),
    ([*INPAINT, "--output", "mask.png"], ["would overwrite --mask"]),
    ([*INPAINT, "--interpolate", 1, 2], ["--interpolate goes without --init_image"]),
])
def test_one_clear_line(model, capsys, flags, words):
    write_inputs()
    Path("text.png").write_text("no image")
    before = Path("mask.png").read_bytes()
    assert_one_line(run(model, *flags), capsys, *words)
    assert Path("mask.png").read_bytes() == before and not Path("outputs").exists()


@pytest.mark.parametrize("white, size, words", [
    ((10, 0, 30, 20), (32, 40), ["32 x 40 pixels", "40 x 32", "of the image's size"]),
    ((10, 0, 30, 20), (80, 64), ["80 x 64 pixels", "40 x 32"]),
    ((0, 0, 0, 0), (40, 32), ["mask.png is black", "nothing would be drawn"]),
    ((0, 0, 3, 32), (40, 32), ["mask.png is black wherever the image is used"]),  # which is cropped
    ((0, 0, 40, 32), (40, 32), ["mask.png is white", "nothing would be kept"]),
])
def test_a_mask_that_does_not_fit(model, capsys, white, size, words):
    write_inputs(white, size)
    assert_one_line(run(model, *INPAINT), capsys, *words)
    assert not Path("outputs").exists()
