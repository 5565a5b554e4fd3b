"""generate.py's types, guidance, seeds, animations, interpolation and image-to-image, through its command line."""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate  # noqa: E402
from checkpoint import save_checkpoint  # noqa: E402
from forward_diffusion import NoiseScheduler  # noqa: E402
from pictures import grid, read_settings, save_animation, to_pixels  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402

TYPES = ["fire", "flying", "water"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_checkpoint(path: Path, types: list[str]) -> Path:
    """A network that was not trained, whose answer depends on all that it is given."""
    torch.manual_seed(3)
    model = UNet(UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=len(types)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_checkpoint(path, ema=model.state_dict(), unet=asdict(model.config), types=types, held_out=[],
                    scheduler=NoiseScheduler(60, schedule="cosine").config(),
                    config=dict(prediction="v", image_size=16, sampler="ddpm", sample_steps=4))
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("conditional") / "model.pt", TYPES)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("unconditional") / "model.pt", [])


def call(checkpoint: Path, *flags) -> int | str | None:
    """What `python generate.py FLAGS` exits with: a status, or the line that Python prints to stderr for status 1."""
    with pytest.MonkeyPatch.context() as patch:
        command = ["generate.py", "--checkpoint", checkpoint, "--device", "cpu", *flags]
        patch.setattr(sys, "argv", [str(word) for word in command])
        try:
            generate.main()
        except SystemExit as stopped:
            return stopped.code
    return 0


def individual(checkpoint: Path, name: str, *flags) -> dict[str, np.ndarray]:
    assert call(checkpoint, *flags, "--individual", "--output", f"{name}.png") == 0
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(Path(name).iterdir())}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "sde-dpm++"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_seed_gives_its_picture_whatever_the_batch(conditional, sampler, precision):
    """To the last bit: alone, among 64, and with batches of 1, 7 and 64."""
    eta = ["--eta", 1] if sampler == "ddim" else []
    flags = ["--sampler", sampler, "--steps", 3, "--precision", precision, "--types", "fire water", *eta]
    all_of_them = individual(conditional, "all", *flags, "--num_images", 64)
    assert len(np.unique([picture.tobytes() for picture in all_of_them.values()])) == 64
    for batch_size in (1, 7):
        pictures = individual(conditional, f"by_{batch_size}", *flags, "--num_images", 9, "--seed", 40,
                              "--batch_size", batch_size)
        assert len(pictures) == 9 and "seed_000044_fire_water.png" in pictures
        assert all(np.array_equal(picture, all_of_them[name]) for name, picture in pictures.items())


def test_types_all_has_a_row_a_type(conditional):
    flags = ["--steps", 3, "--num_images", 4, "--seed", 5]
    rows = individual(conditional, "rows", *flags, "--types", "all")
    assert len(rows) == 12
    for name in TYPES:  # each row is what --types NAME alone gives
        alone = individual(conditional, name, *flags, "--types", name)
        assert list(alone) == [f"seed_{seed:06d}_{name}.png" for seed in range(5, 9)]
        assert all(np.array_equal(picture, rows[key]) for key, picture in alone.items())
    sheet = np.asarray(Image.open("rows.png")).astype(int)
    assert sheet.shape[0] == 3 * 18 + 2 and sheet.shape[1] > 4 * 18 + 2 + 20  # the names have room at the side
    margin = sheet[:, : sheet.shape[1] - (4 * 18 + 2)]
    assert all((margin[18 * row + 2 : 18 * row + 18] < 128).any() for row in range(3))  # and are there
    assert np.array_equal(sheet[2:18, -18:-2], rows["seed_000008_fire.png"])
    assert read_settings("rows.png")["types"] == TYPES


def test_guidance(conditional):
    def pictures(*flags):
        return individual(conditional, "p", "--steps", 3, "--num_images", 2, *flags)["seed_000001" + suffix + ".png"]

    suffix = "_water"
    strong, plain, anything = (pictures("--types", "water", "--guidance", guidance) for guidance in (8, 1, 0))
    default = pictures("--types", "water")
    suffix = ""
    assert np.array_equal(anything, pictures())
    assert not np.array_equal(strong, default) and not np.array_equal(default, plain)
    assert not np.array_equal(plain, anything)


def test_pngs_say_how_they_were_made(conditional, unconditional):
    flags = ["--num_images", 2, "--seed", 7, "--types", "Flying fire", "--sampler", "ddim", "--steps", 3]
    individual(conditional, "p", *flags)
    assert read_settings("p/seed_000008_flying_fire.png") == dict(
        seed=8, types="flying fire", checkpoint="model.pt", sampler="ddim", steps=3, guidance=3.0)
    assert read_settings("p.png")["seeds"] == [7, 8]
    individual(unconditional, "q", "--num_images", 1)
    assert read_settings("q/seed_000000.png") == dict(
        seed=0, types="", checkpoint="model.pt", sampler="ddpm", steps=4, guidance=1.0)
    individual(unconditional, "q", "--num_images", 1, "--variance", "beta")
    assert read_settings("q/seed_000000.png")["variance"] == "beta"
    assert call(unconditional, "--num_images", 1, "--output", "r.jpg") == 0 and read_settings("r.jpg") == {}


def test_gif_ends_with_the_grid(conditional):
    assert call(conditional, "--num_images", 4, "--sampler", "ddim", "--steps", 50, "--types", "fire", "--gif") == 0
    grid, film = Image.open("outputs/generated.png"), Image.open("outputs/generated.gif")
    assert film.size == grid.size and 20 <= film.n_frames <= 50 and film.info["loop"] == 0
    film.seek(film.n_frames - 1)
    assert film.info["duration"] >= 2000
    difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(grid)
    assert np.abs(difference).mean() < 12  # 256 colours of its own for the whole animation


def test_interpolate_ends_at_the_images_of_the_two_seeds(conditional):
    flags = ["--sampler", "dpm++", "--steps", 4, "--types", "water"]
    walk = individual(conditional, "walk", *flags, "--interpolate", 30, 2, "--num_images", 5)
    first = individual(conditional, "first", *flags, "--seed", 30, "--num_images", 1)["seed_000030_water.png"]
    last = individual(conditional, "last", *flags, "--seed", 2, "--num_images", 1)["seed_000002_water.png"]
    steps = list(walk.values())
    assert list(walk) == [f"step_{i:03d}.png" for i in range(5)]
    # To rounding: the weights of the two noises, sin(0) and sin(angle) / sin(angle), are 0 and 1 to rounding.
    assert np.abs(steps[0] - first).max() <= 1 and np.abs(steps[-1] - last).max() <= 1
    assert Image.open("walk.png").size == (5 * 18 + 2, 20)
    assert Image.open("walk.gif").n_frames == 8  # there and back again, without its ends twice
    assert read_settings("walk/step_003.png")["interpolate"] == [30, 2]
    assert read_settings("walk.png")["interpolate"] == [30, 2] and "seeds" not in read_settings("walk.png")


def test_init_image(unconditional):
    drawing = np.full((40, 40, 3), 255, np.uint8)
    drawing[10:30, 10:30] = (255, 0, 0)
    Image.fromarray(drawing).save("drawing.png")
    small = np.asarray(Image.open("drawing.png").resize((16, 16), Image.Resampling.LANCZOS)).astype(int)

    def distance(strength):
        made = individual(unconditional, "p", "--init_image", "drawing.png", "--strength", strength, "--num_images", 4,
                          "--sampler", "ddim", "--steps", 20)
        return np.mean([np.abs(picture - small).mean() for picture in made.values()])

    distances = [distance(strength) for strength in (0.02, 0.3, 1)]
    assert distances == sorted(distances) and distances[0] < 15 < 40 < distances[-1]
    settings = read_settings("p/seed_000000.png")
    assert settings["init_image"] == "drawing.png" and settings["strength"] == 1 and settings["steps"] == 20
    distance(0.3)
    assert read_settings("p/seed_000000.png")["steps"] == 20  # as given, though only 6 of them were made


@pytest.mark.parametrize("flags, words", [
    (["--types", "rock"], ["'rock'", "fire, flying, water"]),
    (["--types", ""], ["fire, flying, water"]),
    (["--types", "fire all"], ["'all'", "fire, flying, water"]),
    (["--guidance", "2"], ["--guidance", "--types", "fire, flying, water"]),
    (["--steps", "61"], ["1 ... 60", "61"]),
    (["--interpolate", "1", "2", "--sampler", "sde-dpm++"], ["--sampler dpm++"]),
    (["--interpolate", "1", "2", "--sampler", "ddim", "--eta", "0.5"], ["--eta 0"]),
    (["--init_image", "missing.png"], ["missing.png"]),
    (["--eta", "0.5", "--sampler", "dpm++"], ["--eta", "--sampler ddim"]),
    (["--variance", "beta", "--sampler", "ddim"], ["--variance", "--sampler ddpm"]),
    (["--scale", "4000", "--output", "a.webp"], ["a.webp", "--scale"]),
])
def test_one_clear_line(conditional, capsys, flags, words):
    line = call(conditional, *flags)
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    assert all(word in line for word in words), line
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize("flags, words", [
    (["--strength", "0"], ["--strength", "above 0"]), (["--strength", "1.5"], ["at most 1"]),
    (["--strength", "nan"], ["--strength"]), (["--strength", "0.5"], ["--init_image"]),
    (["--steps", "0"], ["--steps", "1 or more"]), (["--eta", "-1"], ["--eta"]), (["--guidance", "inf"], ["--guidance"]),
    (["--interpolate", "1"], ["--interpolate"]), (["--interpolate", "1", "2", "--gif"], ["--interpolate"]),
    (["--sampler", "euler"], ["dpm++"]), (["--variance", "x"], ["beta_tilde"]), (["--output", "a.txt"], [".png"]),
])
def test_one_clear_line_for_flags(conditional, capsys, flags, words):
    assert call(conditional, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_types_of_an_unconditional_checkpoint(unconditional):
    assert "knows no types" in call(unconditional, "--types", "fire")
    assert "knows none" in call(unconditional, "--guidance", 2)


def test_the_picture_to_start_from_is_not_overwritten(unconditional):
    Image.new("RGB", (20, 20), "red").save("mine.png")
    before = Path("mine.png").read_bytes()
    line = call(unconditional, "--init_image", "mine.png", "--output", "mine.png")
    assert "would take the place of --init_image" in line
    assert Path("mine.png").read_bytes() == before


def test_the_colours_of_a_walk(tmp_path):
    """Both ends keep their colours in the animation, though it has one palette."""
    ramp = torch.linspace(0, 1, 12).view(-1, 1, 1, 1)
    red, blue = (torch.tensor(color).view(1, 3, 1, 1) for color in ((240.0, 30, 20), (20.0, 60, 220)))
    shade = torch.linspace(0.5, 1, 64).view(1, 1, 8, 8)
    frames = [grid(frame[None].to(torch.uint8), columns=1) for frame in (red + ramp * (blue - red)) * shade]
    walk = frames + frames[-2:0:-1]
    save_animation(walk, tmp_path / "walk.gif")
    film = Image.open(tmp_path / "walk.gif")
    for i in range(film.n_frames):
        film.seek(i)
        difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(walk[i])
        assert np.abs(difference).mean() < 12, i


def test_an_unreadable_picture_to_start_from(unconditional):
    Path("text.png").write_text("not a picture")
    line = call(unconditional, "--init_image", "text.png")
    assert line.startswith("error: cannot read --init_image text.png") and "\n" not in line


def test_pixels_round_to_the_nearest():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(to_pixels(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_animation_times(tmp_path):
    ramp = torch.arange(0, 192, 3, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, -1, -1)
    frames = [grid(ramp.roll(turn, dims=-1), columns=1) for turn in range(3)]  # in one palette, but not the same
    save_animation(frames, tmp_path / "a.gif", seconds=0.6, hold=1.0)
    film, durations = Image.open(tmp_path / "a.gif"), []
    for i in range(film.n_frames):
        film.seek(i)
        durations.append(film.info["duration"])
    assert durations == [200, 200, 1200]
