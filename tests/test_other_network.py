"""Another network than the U-Net, as contributing.md describes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from forward_diffusion import NoiseScheduler
from models.pipeline import NETWORKS, Pipeline
from utils.checkpoint import save_checkpoint


@dataclass(frozen=True)
class PointwiseConfig:
    channels: int = 3
    num_types: int = 0
    size_multiple: int = 1
    least_tensors: int = 2


class Pointwise(torch.nn.Module):
    """A network that looks at each pixel alone."""

    def __init__(self, config: PointwiseConfig):
        super().__init__()
        self.config, self.conv = config, torch.nn.Conv2d(config.channels, config.channels, 1)

    def forward(self, x_t, t, labels=None):
        return self.conv(x_t)


def test_another_kind_of_network_is_loaded_and_drawn_with(monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "pointwise", (PointwiseConfig, Pointwise))
    net = Pointwise(PointwiseConfig())
    save_checkpoint(tmp_path / "other.pt", ema=net.state_dict(), types=(), scheduler=NoiseScheduler(60).config(),
                    network=dict(kind="pointwise", config=asdict(net.config)),
                    config=dict(image_size=10, prediction="v"))
    pipeline = Pipeline.load(tmp_path / "other.pt", precision="fp32")
    assert type(pipeline.net) is Pointwise
    assert pipeline.sample(range(2), sampler="ddim", steps=2).shape == (2, 3, 10, 10)
