"""generate.py as people use it: its command line, checkpoints, sampler, grid and files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import FEW_STEPS, ROOT, assert_one_line, call, pictures

import generate
from forward_diffusion import NoiseScheduler
from reverse_diffusion import SAMPLERS, Sampler, ddim_step
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")


def save_with_settings(path: str, final: Path, **settings) -> None:
    """Write `final` as of an older version, with only these settings beside the needed ones, and 20 timesteps."""
    content = load_checkpoint(final)
    needed = {name: content["config"][name] for name in ("prediction", "image_size")}
    save_checkpoint(path, **{**content, "config": needed | settings, "scheduler": NoiseScheduler(20).config()})


def test_the_same_command_writes_the_same_bytes(final):
    for name in ("a.png", "b.png"):
        assert call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 2, "--output", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("scale", [1, 3])
def test_the_grid_is_made_of_the_images(final, scale):
    assert call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 5, "--individual", "--scale", scale) == 0
    grid = np.asarray(Image.open("outputs/generated.png")).astype(int)
    side, gap = 16 * scale, 2 * scale
    assert grid.shape == (2 * side + 3 * gap, 3 * side + 4 * gap, 3)  # five in rows of three
    for i, image in enumerate(pictures("outputs/generated").values()):
        top, left = (gap + i // 3 * (side + gap)), (gap + i % 3 * (side + gap))
        np.testing.assert_array_equal(grid[top : top + side, left : left + side], image)
        np.testing.assert_array_equal(image, image[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
    assert (grid[:gap] == 255).all()


def test_without_a_checkpoint_the_newest_is_taken(final, capsys):
    for name, written in ("a/old.pt", 100), ("b/new.pt", 300), ("middle.pt", 200):
        path = Path("checkpoints", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(final.read_bytes())
        os.utime(path, (written, written))
    assert call(generate, *FEW_STEPS, "--num_images", 1) == 0
    assert f"{Path('checkpoints/b/new.pt')}:" in capsys.readouterr().out


def test_the_ema_weights_are_sampled(final):
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


def test_an_impossible_output_is_refused(final, capsys):
    Path("good.pt").write_bytes(final.read_bytes())
    flags = [*FEW_STEPS, "--checkpoint", "good.pt", "--num_images", 1, "--output", "good.pt/grid.png"]
    assert_one_line(call(generate, *flags), capsys, "good.pt")


def test_a_seed_too_large_for_torch_is_refused_by_name(final, capsys):
    assert_one_line(call(generate, *FEW_STEPS, "--checkpoint", final, "--seed", 2**70), capsys, "--seed")


def test_a_failed_write_leaves_the_old_grid(final, capsys, monkeypatch):
    def fail(self, path, **_):
        Path(path).write_bytes(b"half a grid")
        raise OSError("No space left on device")

    Path("grid.png").write_bytes(b"an older grid")
    monkeypatch.setattr(Image.Image, "save", fail)
    code = call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 1, "--output", "grid.png")
    assert code == "error: No space left on device"
    assert Path("grid.png").read_bytes() == b"an older grid"
    assert [path.name for path in Path().iterdir()] == ["grid.png"]


# ---------------------------------------------------------------------------------------------------------------------
# the sampler


@pytest.mark.parametrize("flags, expected", [
    ([], "ddim in 2 steps"),  # as the training's flag --sample_steps 2 said
    (["--steps", 3], "ddim in 3 steps"), (["--sampler", "ddpm"], "ddpm in 50 steps"),
    (["--sampler", "ddim", "--steps", 4], "ddim in 4 steps"),
])
def test_the_sampler_of_the_checkpoint(final, flags, expected, capsys):
    assert call(generate, "--device", "cpu", "--checkpoint", final, "--num_images", 1, *flags) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("settings, expected", [
    ({}, "ddpm in 20 steps"), (dict(sampler="ddim", sample_steps=50), "ddpm in 20 steps"),
    (dict(sampler="dpm++", sample_steps=4), "dpm++ in 4 steps"),
])
def test_without_a_choice_of_the_training_it_is_the_whole_reverse_process(final, settings, expected, capsys):
    """Also on a CPU: the same command draws the same images on every device."""
    save_with_settings("model.pt", final, **settings)
    assert call(generate, "--device", "cpu", "--checkpoint", "model.pt", "--num_images", 1) == 0
    assert expected in capsys.readouterr().out
    assert Image.open("outputs/generated.png").size == (16, 16)  # a single image has no gaps around it


@pytest.mark.parametrize("flags, hint", [
    ([], True), (["--steps", 10], True), (["--steps", 9], False), (["--sampler", "ddpm"], False),
    (["--interpolate", 1, 2, "--steps", 10], False),
])
def test_a_hint_names_the_faster_sampler(final, flags, hint, capsys, monkeypatch):
    save_with_settings("model.pt", final)
    monkeypatch.setattr(generate, "MANY_STEPS", 10)
    assert call(generate, "--device", "cpu", "--checkpoint", "model.pt", "--num_images", 1, *flags) == 0
    assert ("hint: --sampler sde-dpm++ takes 20 steps" in capsys.readouterr().out) == hint


@pytest.mark.parametrize("flags", [["--eta", "0.5"], ["--variance", "beta"]])
def test_options_of_the_steps_are_no_flags(flags, capsys):
    assert call(generate, "--sampler", "ddim", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unrecognized arguments: ") and flags[0] in line


def test_a_new_sampler_is_a_choice_of_the_flag(final, capsys, monkeypatch):
    """Choices are read when generate.py is imported; here it is a second time, as a module of its own."""
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(ddim_step, 3, True, about="a sampler of this test"))
    spec = importlib.util.spec_from_file_location("generate_again", ROOT / "generate.py")
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "generate_again", again)
    spec.loader.exec_module(again)
    for module, sampler in ((again, "mine"), (generate, "ddim")):
        flags = ["--device", "cpu", "--checkpoint", final, "--num_images", 2, "--output", f"{sampler}.png"]
        assert call(module, *flags, "--sampler", sampler, *(["--steps", 3] if sampler == "ddim" else [])) == 0
    assert "mine in 3 steps" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open("mine.png")), np.asarray(Image.open("ddim.png")))
    assert call(again, "--help") == 0 and "mine: a sampler of this test" in " ".join(capsys.readouterr().out.split())


def test_fast_kernels_are_switched_on(final, monkeypatch):
    calls = []
    monkeypatch.setattr(generate, "use_fast_kernels", lambda: calls.append("on"))
    load = generate.Pipeline.load

    def load_after_that(*args):
        calls.append("load")
        return load(*args)

    monkeypatch.setattr(generate.Pipeline, "load", load_after_that)
    assert call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 1) == 0
    assert calls == ["on", "load"]


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def test_the_real_command_prints_the_line_and_fails():
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--checkpoint", "nowhere é.pt"], capture_output=True,
                          text=True, timeout=120, env=os.environ | dict(PYTHONIOENCODING="ascii:strict"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no checkpoint at nowhere \\xe9.pt") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], ["--steps", "more than 0"]), (["--num_images", "0"], ["--num_images", "more than 0"]),
    (["--seed", "-1"], ["--seed", "at least 0"]), (["--output", "image.txt"], ["--output", ".png", "image.txt"]),
    (["--output", "image.gif"], ["--output", ".png"]), (["--batch_size", "0"], ["--batch_size"]),
    (["--scale", "-2"], ["--scale"]), (["--strength", "0"], ["--strength", "more than 0"]),
    (["--strength", "1.5"], ["at most 1"]), (["--strength", "nan"], ["--strength", "finite"]),
    (["--strength", "0.5"], ["--init_image"]), (["--guidance", "inf"], ["--guidance", "finite"]),
    (["--interpolate", "1", "-2"], ["--interpolate", "at least 0"]),
    (["--interpolate", "1", "2", "--gif"], ["--interpolate", "--gif"]),
    (["--interpolate", "1", "2", "--types", "all"], ["--interpolate", "--types all"]),
    (["--interpolate", "1", "2", "--init_image", "a.png"], ["--interpolate", "--init_image"]),
])
def test_a_value_out_of_range_is_one_line(flags, words, capsys):
    assert_one_line(call(generate, *flags), capsys, *words)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--sampler", "euler"], ["--sampler", "dpm++"]), (["--interpolate", "1"], ["--interpolate"]),
    (["--steps", "many"], ["--steps", "many"]), (["--precision", "fp8"], ["--precision", "bf16"]),
    (["--num_image", "3"], ["--num_image"]),
])
def test_a_flag_that_cannot_be_parsed_is_one_line(flags, words, capsys):
    assert call(generate, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "generate.py --help" in line and all(word in line for word in words), line
