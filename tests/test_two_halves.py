"""tools/two_halves.py: disjoint halves, two trainings that begin alike, and what the comparison says of known cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import assert_one_line, call, tree

import train
from critters import draw_critters
from tools import two_halves
from utils.checkpoint import load_checkpoint

TINY = ["--numbers", 12, "--image_size", 16, "--steps", 4, "--num_samples", 3, "--columns", 2, "--device", "cpu",
        "--train=--width 8 --groups 4 --multipliers 1 --precision fp32 --timesteps 50 --num_samples 1 --sample_steps 1"]


@pytest.fixture
def trained_here(monkeypatch):
    """Run train.py in this process, and count how often."""
    commands = []

    def run_here(command):
        assert command[0] == two_halves.ROOT / "train.py"
        commands.append(command)
        return call(train, *command[1:])

    monkeypatch.setattr(two_halves, "run_python", run_here)
    return commands


def test_both_halves_are_trained_alike_on_different_images(own_folder, trained_here, plain_loss_curve, capsys):
    assert call(two_halves, *TINY) == 0 and len(trained_here) == 2
    images = [{Image.open(path).tobytes() for path in Path("outputs/two_halves/images/critters_12", half).glob("*.png")}
              for half in "ab"]
    drawn = {image.tobytes() for image in draw_critters(12, 16)[0]}
    assert len(images[0]) == len(images[1]) == 6 and images[0] | images[1] == drawn
    configs = [load_checkpoint(Path("checkpoints/two_halves/critters_12", half, "final_model.pt"))["config"]
               for half in "ab"]
    different = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert different == {"data", "run_name"} and configs[0]["augment"] == "none" and configs[0]["epochs"] == 4

    (row,) = json.loads(Path("outputs/two_halves/results.json").read_text())
    assert [len(row[name]) for name in two_halves.MEASURES] == [3, 3, 6, 6] and 0 <= row["copies"] <= 1
    assert all(-1.001 < value < 1.001 for name in two_halves.MEASURES for value in row[name])
    assert "| critters, 2 x 6 images |" in capsys.readouterr().out
    assert np.asarray(Image.open("outputs/two_halves/samples.png")).std() > 1
    assert Path("outputs/two_halves/similarity.png").stat().st_size > 1000

    # Once more: nothing is trained again; other settings belong to other trainings.
    before = tree(Path("checkpoints"))
    assert call(two_halves, *TINY) == 0 and len(trained_here) == 2 and tree(Path("checkpoints")) == before
    capsys.readouterr()
    assert_one_line(call(two_halves, *TINY, "--steps", 5), capsys, "--steps 4", "--name")


def test_a_training_that_was_stopped_is_resumed(own_folder, monkeypatch, capsys):
    commands, status = [], 130
    monkeypatch.setattr(two_halves, "run_python", lambda command: commands.append(command) or status)
    assert call(two_halves, *TINY) == 130 and "--preset" in commands[-1]
    latest = Path("checkpoints/two_halves/critters_12/a/latest.pt")
    latest.parent.mkdir(parents=True)
    latest.touch()
    assert call(two_halves, *TINY) == 130 and commands[-1][1:3] == ["--resume", "--run_name"]
    status = 1
    capsys.readouterr()
    code = call(two_halves, *TINY)
    assert code.startswith("error: the training of two_halves/critters_12/a failed")


def test_networks_that_agree_and_networks_that_copy():
    images = torch.from_numpy(draw_critters(60, 16, 0)[0]).permute(0, 3, 1, 2)
    halves, common = (images[:30], images[30:]), torch.from_numpy(draw_critters(10, 16, 1)[0]).permute(0, 3, 1, 2)
    agreeing, _ = two_halves.compare([common, common], halves)
    copying, nearest = two_halves.compare([half[:10] for half in halves], halves)
    assert min(agreeing["agreement"]) > 0.999 and agreeing["copies"] == 0
    assert np.median(agreeing["other_noise"]) < 0.6
    assert min(copying["nearest_own"]) > 0.999 and copying["copies"] == 1
    assert np.median(copying["agreement"]) < 0.6 and max(copying["nearest_other"]) < 0.99
    assert all(found.equal(half[:10]) for found, half in zip(nearest, halves))
