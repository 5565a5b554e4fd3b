"""generate.py's types, guidance, seeds, animations, interpolation and image-to-image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import assert_one_line, pictures
from scripts import call as call_command

import generate
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from unet import UNet, UNetConfig
from utils.checkpoint import save_checkpoint
from utils.images import read_settings

pytestmark = pytest.mark.usefixtures("own_folder")
TYPES = ["fire", "flying", "water"]


def make_checkpoint(path: Path, class_names: list[str], **settings) -> Path:
    """Write an untrained network whose output depends on all of its inputs."""
    torch.manual_seed(3)
    net = UNet(UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=len(class_names)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_checkpoint(path, ema=net.state_dict(), network=dict(kind="unet", config=asdict(net.config)),
                    types=class_names, held_out=[], scheduler=NoiseScheduler(60, schedule="cosine").config(),
                    config=dict(prediction="v", image_size=16, sampler="ddpm", sample_steps=4) | settings)
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("conditional") / "model.pt", TYPES)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("unconditional") / "model.pt", [])


@pytest.fixture(scope="module")
def always_labelled(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("always_labelled") / "model.pt", TYPES, label_dropout=0.0)


def call(checkpoint: Path, *flags) -> int | str | None:
    return call_command(generate, "--checkpoint", checkpoint, "--device", "cpu", *flags)


def individual(checkpoint: Path, name: str, *flags) -> dict[str, np.ndarray]:
    assert call(checkpoint, *flags, "--individual", "--output", f"{name}.png") == 0
    return pictures(name)


# ---------------------------------------------------------------------------------------------------------------------
# seeds, types, guidance


@pytest.mark.parametrize("sampler, precision", [
    ("ddpm", "fp32"), ("ddpm", "bf16"), ("ddim", "fp32"), ("dpm++", "bf16"), ("sde-dpm++", "fp32")])
def test_a_seed_gives_its_image_whatever_the_batch(conditional, sampler, precision):
    """To the last bit: among 64, and with batches of 1 and 7. test_pipeline.py tests every combination."""
    flags = ["--sampler", sampler, "--steps", 3, "--precision", precision, "--types", "fire water"]
    together = individual(conditional, "all", *flags, "--num_images", 64)
    assert len(np.unique([image.tobytes() for image in together.values()])) == 64
    for batch_size in (1, 7):
        images = individual(conditional, f"by_{batch_size}", *flags, "--num_images", 9, "--seed", 40, "--batch_size",
                            batch_size)
        assert len(images) == 9 and "seed_000044_fire_water.png" in images
        assert all(np.array_equal(image, together[name]) for name, image in images.items())


def test_types_all_has_a_row_per_type(conditional):
    flags = ["--steps", 3, "--seed", 5]
    rows = individual(conditional, "rows", *flags, "--num_images", 12, "--types", "all")
    assert len(rows) == 12
    for name in TYPES:  # each row is what --types NAME alone gives
        alone = individual(conditional, name, *flags, "--num_images", 4, "--types", name)
        assert list(alone) == [f"seed_{seed:06d}_{name}.png" for seed in range(5, 9)]
        assert all(np.array_equal(image, rows[key]) for key, image in alone.items())
    sheet = np.asarray(Image.open("rows.png")).astype(int)
    assert sheet.shape[0] == 3 * 18 + 2 and sheet.shape[1] > 4 * 18 + 2 + 20  # the names have room at the side
    margin = sheet[:, : sheet.shape[1] - (4 * 18 + 2)]
    assert all((margin[18 * row + 2 : 18 * row + 18] < 128).any() for row in range(3))  # and are there
    assert np.array_equal(sheet[2:18, -18:-2], rows["seed_000008_fire.png"])
    assert read_settings("rows.png")["types"] == TYPES


def test_types_all_draws_8_per_type_by_default(conditional, capsys):
    assert call(conditional, "--steps", 1, "--types", "all") == 0
    assert "24 images" in capsys.readouterr().out


@pytest.mark.parametrize("num_images, nearest", [(10, 9), (11, 12), (1, 3), (2, 3)])
def test_a_number_that_cannot_be_divided_among_the_types_is_refused(conditional, num_images, nearest, capsys):
    line = call(conditional, "--types", "all", "--num_images", num_images)
    assert_one_line(line, capsys, f"--num_images {num_images}", "3 types", f"such as {nearest}")
    assert list(Path().iterdir()) == []


def test_guidance(conditional):
    def image(suffix, *flags):
        name = f"seed_000001{suffix}.png"
        return individual(conditional, "images", "--steps", 3, "--num_images", 2, *flags)[name]

    strong, plain, unconditional = (image("_water", "--types", "water", "--guidance", scale) for scale in (8, 1, 0))
    default = image("_water", "--types", "water")
    assert np.array_equal(unconditional, image(""))
    assert not np.array_equal(strong, default) and not np.array_equal(default, plain)
    assert not np.array_equal(plain, unconditional)


def test_guidance_of_a_model_that_always_had_labels(always_labelled, capsys):
    """1 by default; any other scale would compare with an output that was never trained."""
    flags = ["--types", "water", "--steps", 2, "--num_images", 1]
    assert call(always_labelled, *flags) == 0 and read_settings("outputs/generated.png")["guidance"] == 1.0
    assert "guidance 1, on" in capsys.readouterr().out
    assert call(always_labelled, *flags, "--guidance", 1) == 0
    capsys.readouterr()
    code = call(always_labelled, *flags, "--guidance", 2, "--output", "other/grid.png")
    assert_one_line(code, capsys, "--label_dropout 0", "leave --guidance out")
    assert not Path("other").exists()


def test_types_of_an_unconditional_checkpoint(unconditional):
    assert "knows no types" in call(unconditional, "--types", "fire")
    assert "knows none" in call(unconditional, "--guidance", 2)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_pngs_record_how_they_were_drawn(conditional, unconditional):
    flags = ["--num_images", 2, "--seed", 7, "--types", "Flying fire", "--sampler", "ddim", "--steps", 3]
    individual(conditional, "p", *flags, "--scale", 2)
    assert read_settings("p/seed_000008_flying_fire.png") == dict(
        seed=8, types="flying fire", checkpoint="model.pt", sampler="ddim", steps=3, guidance=3.0, guide="types",
        image_size=16, scale=2)
    assert read_settings("p.png") == dict(
        seeds=[7, 8], types=["flying fire"], checkpoint="model.pt", sampler="ddim", steps=3, guidance=3.0,
        guide="types", image_size=16, scale=2)
    individual(unconditional, "q", "--num_images", 1)
    assert read_settings("q/seed_000000.png") == dict(
        seed=0, types="", checkpoint="model.pt", sampler="ddpm", steps=4, guidance=1.0, image_size=16, scale=1)
    assert call(unconditional, "--num_images", 1, "--output", "r.jpg") == 0 and read_settings("r.jpg") == {}


def test_other_images_in_the_folder_are_kept(unconditional, capsys):
    individual(unconditional, "p", "--num_images", 1, "--steps", 1)
    assert "already has" not in capsys.readouterr().out
    images = individual(unconditional, "p", "--num_images", 1, "--steps", 1, "--seed", 5)
    assert list(images) == ["seed_000000.png", "seed_000005.png"]
    assert "p/ already has 1 images; those with other names stay there" in capsys.readouterr().out


def test_a_type_that_cannot_be_a_file_name(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model.pt", ["a/b", "c:d"])
    images = individual(checkpoint, "p", "--types", "all", "--num_images", 2, "--steps", 1)
    assert list(images) == ["seed_000000_a-b.png", "seed_000000_c-d.png"]


def test_a_gif_ends_with_the_grid(conditional):
    assert call(conditional, "--num_images", 4, "--sampler", "ddim", "--steps", 50, "--types", "fire", "--gif") == 0
    grid, film = Image.open("outputs/generated.png"), Image.open("outputs/generated.gif")
    assert film.size == grid.size and 20 <= film.n_frames <= 50 and film.info["loop"] == 0
    film.seek(film.n_frames - 1)
    assert film.info["duration"] >= 2000
    difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(grid)
    assert np.abs(difference).mean() < 12  # 256 colours for the whole animation


def test_the_frames_of_a_gif_hold_all_batches(conditional):
    flags = ["--num_images", 4, "--sampler", "ddim", "--steps", 2, "--gif", "--seed", 3]
    for name, batch_size in (("a.png", 64), ("b.png", 3)):
        assert call(conditional, *flags, "--batch_size", batch_size, "--output", name) == 0
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# interpolation


def test_an_interpolation_ends_at_the_images_of_the_two_seeds(conditional):
    flags = ["--sampler", "dpm++", "--steps", 4, "--types", "water"]
    walk = individual(conditional, "walk", *flags, "--interpolate", 30, 2, "--num_images", 5)
    first = individual(conditional, "first", *flags, "--seed", 30, "--num_images", 1)["seed_000030_water.png"]
    last = individual(conditional, "last", *flags, "--seed", 2, "--num_images", 1)["seed_000002_water.png"]
    steps = list(walk.values())
    assert list(walk) == [f"step_{i:03d}.png" for i in range(5)]
    # The weights of the two noises, sin(0) and sin(angle) / sin(angle), are 0 and 1 up to rounding.
    assert np.abs(steps[0] - first).max() <= 1 and np.abs(steps[-1] - last).max() <= 1
    assert Image.open("walk.png").size == (5 * 18 + 2, 20)
    assert Image.open("walk.gif").n_frames == 8  # there and back again, without its ends twice
    assert read_settings("walk/step_003.png") == dict(
        step=3, types="water", checkpoint="model.pt", sampler="dpm++", steps=4, interpolate=[30, 2], guidance=3.0,
        guide="types", image_size=16, scale=1)
    assert read_settings("walk.png")["interpolate"] == [30, 2] and "seeds" not in read_settings("walk.png")


def test_an_interpolation_takes_dpm_solver_unless_told_otherwise(conditional, capsys):
    for flags, expected in (([], "16 images of 16 x 16, dpm++ in 20 steps"),
                            (["--sampler", "ddim", "--num_images", 2], "2 images of 16 x 16, ddim in 50 steps")):
        assert call(conditional, "--interpolate", 1, 2, *flags) == 0
        assert expected in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# image-to-image


def test_init_image(unconditional):
    drawing = np.full((40, 40, 3), 255, np.uint8)
    drawing[10:30, 10:30] = (255, 0, 0)
    Image.fromarray(drawing).save("drawing.png")
    small = np.asarray(Image.open("drawing.png").resize((16, 16), Image.Resampling.LANCZOS)).astype(int)

    def distance(*strength):
        images = individual(unconditional, "p", "--init_image", "drawing.png", *strength, "--num_images", 4,
                            "--sampler", "ddim", "--steps", 20)
        return np.mean([np.abs(image - small).mean() for image in images.values()])

    distances = [distance("--strength", strength) for strength in (0.02, 0.3, 1)]
    assert distances == sorted(distances) and distances[0] < 15 < 40 < distances[-1]
    settings = read_settings("p/seed_000000.png")
    assert settings["init_image"] == "drawing.png" and settings["strength"] == 1 and settings["steps"] == 20
    distance("--strength", 0.3)
    assert read_settings("p/seed_000000.png")["steps"] == 20  # as given, though only 6 of them were run
    distance()
    assert read_settings("p/seed_000000.png")["strength"] == 0.6


def test_the_image_to_start_from_is_not_overwritten(unconditional, capsys):
    Image.new("RGB", (20, 20), "red").save("mine.png")
    before = Path("mine.png").read_bytes()
    line = call(unconditional, "--init_image", "mine.png", "--output", "mine.png")
    assert_one_line(line, capsys, "would overwrite --init_image")
    assert Path("mine.png").read_bytes() == before
    Path("generated").mkdir()
    Path("mine.png").rename("generated/seed_000000.png")
    line = call(unconditional, "--init_image", "generated/seed_000000.png", "--individual", "--output", "generated.png")
    assert_one_line(line, capsys, "--individual", "--init_image", "might overwrite")
    assert Path("generated/seed_000000.png").read_bytes() == before


def test_an_animation_has_no_frames_of_a_batch_that_was_too_large(unconditional, monkeypatch):
    size = []

    def cramped(denoise):
        def cramped_denoise(self, x_t, t, *labels):
            if len(x_t) > 2 and t[0] < 30:
                raise torch.OutOfMemoryError("CUDA out of memory")
            size.append(len(x_t))
            return denoise(self, x_t, t, *labels)
        return cramped_denoise

    flags = ["--num_images", 4, "--sampler", "ddim", "--steps", 6, "--gif"]
    assert call(unconditional, *flags, "--output", "whole.png") == 0
    monkeypatch.setattr(Pipeline, "denoise", cramped(Pipeline.denoise))
    assert call(unconditional, *flags, "--output", "halved.png") == 0
    assert set(size) == {4, 2}
    assert Path("halved.gif").read_bytes() == Path("whole.gif").read_bytes()


def test_an_unreadable_image_to_start_from(unconditional, capsys):
    Path("text.png").write_text("not an image")
    assert_one_line(call(unconditional, "--init_image", "text.png"), capsys, "cannot read --init_image text.png")


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("flags, words", [
    (["--types", "rock"], ["'rock'", "fire, flying, water"]),
    (["--types", ""], ["fire, flying, water"]),
    (["--types", "fire all"], ["'all'", "fire, flying, water"]),
    (["--guidance", "2"], ["guidance", "--types", "fire, flying, water"]),
    (["--steps", "61"], ["1 ... 60", "61"]),
    (["--interpolate", "1", "2", "--steps", "61"], ["1 ... 60", "61"]),
    (["--interpolate", "1", "2", "--sampler", "sde-dpm++"], ["--sampler dpm++ or ddim"]),
    (["--interpolate", "1", "2", "--sampler", "ddpm"], ["--sampler dpm++ or ddim"]),
    (["--init_image", "missing.png"], ["missing.png"]),
    (["--scale", "4000", "--output", "a.webp"], ["a.webp", "--scale"]),
])
def test_one_clear_line(conditional, capsys, flags, words):
    assert_one_line(call(conditional, *flags), capsys, *words)
    assert not list(Path().rglob("*.png"))
