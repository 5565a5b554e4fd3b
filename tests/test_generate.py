"""generate.py as people use it: through its command line, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from checkpoint import load_checkpoint, save_checkpoint
from scripts import FEW_STEPS, ROOT, assert_one_line, call, pictures

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_same_command_writes_the_same_bytes(final):
    for name in ("a.png", "b.png"):
        assert call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 2, "--output", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("scale", [1, 3])
def test_the_grid_is_made_of_the_pictures(final, scale):
    assert call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 5, "--individual", "--scale", scale) == 0
    grid = np.asarray(Image.open("outputs/generated.png")).astype(int)
    side, gap = 16 * scale, 2 * scale
    assert grid.shape == (2 * side + 3 * gap, 3 * side + 4 * gap, 3)  # five in rows of three
    for i, picture in enumerate(pictures("outputs/generated").values()):
        top, left = (gap + i // 3 * (side + gap)), (gap + i % 3 * (side + gap))
        np.testing.assert_array_equal(grid[top : top + side, left : left + side], picture)
        np.testing.assert_array_equal(picture, picture[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
    assert (grid[:gap] == 255).all()


def test_without_a_checkpoint_the_newest_is_taken(final, capsys):
    for name, written in ("a/old.pt", 100), ("b/new.pt", 300), ("middle.pt", 200):
        path = Path("checkpoints", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(final.read_bytes())
        os.utime(path, (written, written))
    assert call(generate, *FEW_STEPS, "--num_images", 1) == 0
    assert f"{Path('checkpoints/b/new.pt')}:" in capsys.readouterr().out


def test_the_average_is_what_is_sampled(final):
    """Other plain weights change nothing; another average does."""
    content = load_checkpoint(final)
    save_checkpoint("model.pt", **{**content, "model": {}})
    save_checkpoint("ema.pt", **{**content, "ema": {name: 2 * p for name, p in content["ema"].items()}})
    for path in (final, "model.pt", "ema.pt"):
        call(generate, *FEW_STEPS, "--checkpoint", path, "--num_images", 1, "--output", f"{Path(path).stem}.png")
    ours, model, ema = (np.asarray(Image.open(f"{name}.png")) for name in ("final_model", "model", "ema"))
    assert np.array_equal(ours, model) and not np.array_equal(ours, ema)


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint", "missing.pt"], ["missing.pt"]),
    (["--checkpoint", "cut.pt"], ["cut.pt"]),
    (["--checkpoint", "theirs.pt"], ["theirs.pt"]),
    ([], ["checkpoints"]),
    (["--checkpoint", "good.pt", "--steps", "5000"], ["--steps", "50", "5000"]),
    (["--checkpoint", "good.pt", "--device", "nosuch"], ["nosuch"]),
])
def test_generate_refuses_in_one_line(final, flags, words, capsys):
    whole = final.read_bytes()
    Path("good.pt").write_bytes(whole)
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {"w": torch.ones(2)}}, "theirs.pt")
    assert_one_line(call(generate, *flags), capsys, *words)
    assert not Path("outputs").exists()


def test_an_output_that_cannot_be_is_refused(final, capsys):
    Path("good.pt").write_bytes(final.read_bytes())
    code = call(generate, *FEW_STEPS, "--checkpoint", "good.pt", "--num_images", 1, "--output", "good.pt/grid.png")
    assert isinstance(code, str) and code.startswith("error: ") and "good.pt" in code and "\n" not in code


def test_a_seed_too_large_for_torch_is_refused_by_name(final, capsys):
    code = call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 1, "--seed", 2**70)
    line = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and "seed" in line


@pytest.mark.parametrize("flags, said", [
    ([], "ddim in 2 steps"),  # that of the training's own grids
    (["--steps", 3], "ddim in 3 steps"), (["--sampler", "ddpm"], "ddpm in 50 steps"),
    (["--sampler", "ddim", "--steps", 4], "ddim in 4 steps"),
])
def test_the_sampler_that_is_used(final, flags, said, capsys):
    assert call(generate, "--device", "cpu", "--checkpoint", final, "--num_images", 1, *flags) == 0
    assert said in capsys.readouterr().out


def test_a_checkpoint_from_before_a_flag_existed(final, capsys):
    """It has no value for that flag: it must work, or be refused in one line, but not end in a KeyError."""
    content = load_checkpoint(final)
    needed = {"prediction", "image_size"}  # all that load_model promises
    save_checkpoint("old.pt", **{**content, "config": {name: content["config"][name] for name in needed}})
    code = call(generate, "--device", "cpu", "--checkpoint", "old.pt", "--num_images", 1, "--output", "grid.png")
    if code == 0:
        assert Image.open("grid.png").size == (16, 16)  # a single picture has no gaps around it
    else:
        assert_one_line(code, capsys, "old.pt")


def test_the_real_command_prints_the_line_and_fails():
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--checkpoint", "nowhere.pt"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--num_images", "0"], ["--seed", "-1"], ["--sampler", "foo"], ["--output", "picture.txt"],
    ["--eta", "2"],
])
def test_a_value_that_no_flag_takes(flags, capsys):
    assert call(generate, *flags) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and flags[0] in line and "generate.py --help" in line
