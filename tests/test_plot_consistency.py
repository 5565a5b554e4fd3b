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
TUNED = dict(objective="consistency", sampler="consistency", sample_steps=2, init="before.pt")


@pytest.mark.parametrize("latent", [False, True])
def test_the_rows_are_what_both_models_predict_on_one_path(latent):
    save_tiny_model(Path("before.pt"), ("fire", "water"), latent=latent)
    save_tiny_model(Path("tuned.pt"), ("fire", "water"), latent=latent, **TUNED)
    before, tuned = (Pipeline.load(name, precision="fp32") for name in ("before.pt", "tuned.pt"))
    with torch.no_grad():
        for weight in tuned.net.parameters():
            weight.add_(0.05)
    labels = before.class_labels([("fire",)])
    settings = Settings(columns=5, steps=20)
    (path, ours, theirs), timesteps = predictions(before, tuned, labels, settings)
    assert timesteps == [99, 74, 49, 29, 4]
    assert path.shape == ours.shape == theirs.shape == (5, 3, 16, 16) and path.dtype == torch.uint8
    assert not ours.equal(theirs)
    # The last prediction before tuning is the image that the path ends at; the first is that of pure noise.
    image = before.sample([0], labels=labels, sampler="ddim", steps=20)
    assert (ours[-1].int() - ((image[0] + 1) * 127.5).round().clamp(0, 255).int()).abs().max() <= 1
    noise = before.noise([0])
    x_0 = before.scheduler.to_x_0("v", before.denoise(noise, torch.tensor([99]), labels), noise, torch.tensor([99]))
    x_0 = x_0.clamp(-before.space.latent_range, before.space.latent_range)
    assert (ours[0].int() - ((before.decode(x_0)[0] + 1) * 127.5).round().clamp(0, 255).int()).abs().max() <= 1


def test_the_command_and_what_it_refuses(capsys):
    save_tiny_model(Path("before.pt"), ("fire", "water"))
    save_tiny_model(Path("other.pt"), ("fire",))
    save_tiny_model(Path("tuned.pt"), ("fire", "water"), **TUNED)
    flags = ["--device", "cpu", "--columns", 3, "--steps", 4, "--types", "fire"]
    assert call(plot_consistency, "--tuned", "tuned.pt", *flags) == 0
    assert Image.open("outputs/consistency.png").width > 300
    assert "wrote outputs/consistency.png" in capsys.readouterr().out
    assert_one_line(call(plot_consistency, "--tuned", "before.pt", *flags), capsys, "before.pt is not tuned")
    for other, words in (("tuned.pt", "tuned as well"), ("other.pt", "different models")):
        code = call(plot_consistency, "--tuned", "tuned.pt", "--checkpoint", other, *flags)
        assert_one_line(code, capsys, words)
