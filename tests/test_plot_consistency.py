"""The figure of what a model predicts along a path, before and after tuning; with models that were not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import assert_one_line, call
from tiny_model import save_tiny_model

from models.pipeline import Pipeline
from tools import plot_consistency
from tools.plot_consistency import Settings, predictions

pytestmark = pytest.mark.usefixtures("own_folder")
TUNED = dict(objective="consistency", sampler="consistency", sample_steps=4, init="before.pt",
             teacher_guidance=2.0)


@pytest.mark.parametrize("latent", [False, True])
def test_the_rows_are_what_both_models_predict_on_one_path(latent):
    save_tiny_model(Path("before.pt"), ("fire", "water"), latent=latent)
    save_tiny_model(Path("tuned.pt"), ("fire", "water"), latent=latent, **TUNED)
    before, tuned = (Pipeline.load(name, precision="fp32") for name in ("before.pt", "tuned.pt"))
    with torch.no_grad():
        for weight in tuned.net.parameters():
            weight.add_(0.05)
    labels = before.class_labels([("fire",)])
    settings = Settings(steps=20)
    (path, ours, theirs), timesteps = predictions(before, tuned, labels, settings)
    assert timesteps == [99, 75, 43, 20]
    assert path.shape == ours.shape == theirs.shape == (4, 3, 16, 16) and path.dtype == torch.uint8
    assert not ours.equal(theirs)
    # The path is the guided one, and the images before tuning are those that its steps predict.
    seen = {}
    timesteps = sorted({*range(4, 100, 5), *timesteps}, reverse=True)
    before.sample([0], labels=labels, guidance=2.0, sampler="ddim", steps=len(timesteps), timesteps=timesteps,
                  callback=lambda i, x_t, x_0: seen.update({timesteps[i]: x_0}))
    for row, t in enumerate((99, 75, 43, 20)):
        expected = ((before.decode(seen[t])[0] + 1) * 127.5).round().clamp(0, 255).int()
        assert (ours[row].int() - expected).abs().max() <= 1


def test_the_command_and_what_it_refuses(capsys):
    save_tiny_model(Path("before.pt"), ("fire", "water"))
    save_tiny_model(Path("other.pt"), ("fire",))
    save_tiny_model(Path("tuned.pt"), ("fire", "water"), **TUNED)
    flags = ["--device", "cpu", "--steps", 4, "--types", "fire"]
    assert call(plot_consistency, "--tuned", "tuned.pt", *flags) == 0
    assert Image.open("outputs/consistency.png").width > 300
    save_tiny_model(Path("one.pt"), ("fire", "water"), **TUNED | dict(sample_steps=1))
    assert call(plot_consistency, "--tuned", "one.pt", *flags[:4]) == 0  # of any type, in one jump
    assert "wrote outputs/consistency.png" in capsys.readouterr().out
    assert_one_line(call(plot_consistency, "--tuned", "before.pt", *flags), capsys, "before.pt is not tuned")
    for other, words in (("tuned.pt", "tuned as well"), ("other.pt", "different models")):
        code = call(plot_consistency, "--tuned", "tuned.pt", "--checkpoint", other, *flags)
        assert_one_line(code, capsys, words)
