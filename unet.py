"""U-Net that predicts eps, v or x_0 from a noisy image, its timestep and, optionally, labels.

    python unet.py                                                    # the reference network: 54,195,523 parameters
    python unet.py --image_size 256                                   # with the levels for images of that size
    python unet.py --width 32 --multipliers 1 2 4 --image_size 32     # any other size of the same class

The architecture follows Ho et al. (2020), appendix B, with attention at the deepest level alone, average pooling and
nearest-neighbour upsampling, and with the timestep entering each block as a scale and a shift (Dhariwal & Nichol 2021,
"adaptive group normalisation").
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Multipliers of the width, one a level, by the side of the image in pixels; other sizes take those of 64. The deepest
# level of each is 8x8, where attention sees the whole image at the price of 64 positions: at 16x16 there would be 256,
# and 16 times as many pairs. FLOP are those of one pass of one image through two blocks a level, multiply and add
# counted as two (torch.utils.flop_counter).
LEVELS: dict[int, tuple[int, ...]] = {
    # The reference network: 54,195,523 parameters, 18.0 GFLOP.
    64: (1, 2, 4, 8),
    # The reference network below one more level, for the edges and texture that only the larger image shows. That level
    # has the narrowest width, since it costs four times what it would at half the size. 54,866,115 parameters, 34.6
    # GFLOP; the four levels of 64 would take 72.1, and attention at 16x16.
    128: (1, 1, 2, 4, 8),
    # One more, for the same reasons. 55,536,707 parameters, 101.0 GFLOP; with four levels 289.8.
    256: (1, 1, 1, 2, 4, 8),
}


def default_multipliers(image_size: int) -> tuple[int, ...]:
    """Return the multipliers of LEVELS for images of this size."""
    return LEVELS.get(image_size, LEVELS[64])


@dataclass
class UNetConfig:
    """The size of the network; the defaults are the reference network."""

    channels: int = 3  # of the image
    width: int = 64  # channels at the first level
    multipliers: tuple[int, ...] = (1, 2, 4, 8)  # of the width, one per level; each but the last halves the resolution
    blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    head_width: int | None = None  # channels per attention head; None: gcd(64, width of the deepest level)
    groups: int = 32  # of the group normalisations
    dropout: float = 0.0  # in the residual blocks, during training
    augment_dim: int = 5  # numbers that describe how an image was augmented; they cost no parameters
    num_types: int = 0  # number of classes; 0: unconditional

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)
        if not self.multipliers:
            raise ValueError("multipliers must name at least one level, and there are none")
        if self.head_width is None:
            self.head_width = math.gcd(64, self.widths[-1])
        if min(self.channels, self.width, self.blocks, self.head_width, self.groups, *self.multipliers) < 1:
            raise ValueError(f"every size of the network must be at least 1: {self}")
        if self.num_types < 0:
            raise ValueError(f"num_types must be 0 or more, not {self.num_types}")
        for width in {self.width, *self.widths}:
            if width % self.groups:
                raise ValueError(f"a level of {width} channels cannot be normalised in {self.groups} groups; "
                                 f"choose a width that is a multiple of {self.groups}")
        if self.width % 2:
            raise ValueError(f"width must be even, not {self.width}")
        if self.widths[-1] % self.head_width:
            raise ValueError(f"the deepest level's {self.widths[-1]} channels do not divide into attention heads of "
                             f"{self.head_width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the finest."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def least_tensors(self) -> int:
        """A number of tensors that such a network has at least: a damaged file may ask for a network without end."""
        return self.blocks * len(self.multipliers)

    @property
    def size_multiple(self) -> int:
        """An image's side must be a multiple of this: each level but the last halves it."""
        return 2 ** (len(self.multipliers) - 1)


class UNet(nn.Module):
    """U-Net: `model(x_t, t[, labels])` returns eps, v or x_0 (whichever it was trained for) in the shape of x_t.

    Args:
        config: the sizes. None: the reference network, 54,195,523 parameters; 18.0 GFLOP an image at 64x64.

    Shapes:
        x_t: [B, channels, H, W], float; H and W multiples of `config.size_multiple` (8 for the reference network).
        t: [B], integers in 0 ... T-1.
        labels: multi-hot [B, num_types], or None. A row of zeros, or None, is unconditional.
        augment_labels: [B, augment_dim], each in [-1, 1], or None: how the images were augmented (see
            training/augment.py). None, or zeros, means that they were not, which is how to sample.

    Attributes:
        grad_checkpoint: keep only the blocks' inputs for the backward pass, which then computes each block a second
            time (Chen et al. 2016): the same gradients, for less memory and a fifth more arithmetic.
    """

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = config = config or UNetConfig()
        self.grad_checkpoint = False
        widths, emb_width = config.widths, 4 * config.width

        self.time_mlp = nn.Sequential(nn.Linear(config.width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        # Augmentation labels enter as fixed waves added to the timestep embedding, not through learned weights as in
        # Karras et al. (2022), appendix F.2: they cost no parameters, the zero vector changes nothing, and the rows are
        # orthogonal, with the norm of the timestep embedding itself, sqrt(width / 2).
        row, column = torch.arange(config.augment_dim)[:, None] + 1, torch.arange(config.width)[None] + 0.5
        self.register_buffer("augment_waves", torch.cos(math.pi * row * column / config.width), persistent=False)

        if config.num_types:
            # One vector per class, summed over an image's classes: a set has no order. Without a class nothing is
            # added, so the unconditional output needs no vector of its own.
            self.type_vectors = nn.Linear(config.num_types, emb_width, bias=False)
            nn.init.normal_(self.type_vectors.weight, std=0.02)

        def block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, emb_width, config)

        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        skips, c = [config.width], config.width  # widths of the skip connections
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(block(c, width))
                c = width
                skips.append(c)
            self.down.append(blocks)
            if level < len(widths) - 1:
                skips.append(c)  # the pooled tensor

        self.middle = nn.ModuleList([block(c, c), Attention(c, config), block(c, c)])

        self.up = nn.ModuleList()
        for width in reversed(widths):
            blocks = nn.ModuleList()
            for _ in range(config.blocks + 1):
                blocks.append(block(c + skips.pop(), width))
                c = width
            self.up.append(blocks)

        self.norm_out = nn.GroupNorm(config.groups, c)
        self.conv_out = nn.Conv2d(c, config.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # zero-init: the initial prediction is the target's mean
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None, *,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        # Embedding of timestep, augmentation and classes.
        emb = timestep_embedding(t, self.config.width)
        if augment_labels is not None:
            emb = emb + augment_labels @ self.augment_waves
        emb = self.time_mlp(emb.to(self.conv_in.weight.dtype))
        if labels is not None and labels.shape[1] != self.config.num_types:
            raise ValueError(f"labels of {labels.shape[1]} classes for a network of {self.config.num_types}")
        if labels is not None and self.config.num_types:
            emb = emb + self.type_vectors(labels.to(emb.dtype))
        emb = F.silu(emb)

        # Encoder.
        h = self.conv_in(x_t)
        skips = [h]
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = F.avg_pool2d(h, 2)
                skips.append(h)
            for block in blocks:
                h = self.run(block, h, emb)
                skips.append(h)

        # Middle, at the lowest resolution.
        block_1, attention, block_2 = self.middle
        h = self.run(block_2, self.run(attention, self.run(block_1, h, emb)), emb)

        # Decoder: each block also gets the skip connection of its encoder counterpart.
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            for block in blocks:
                h = self.run(block, h, emb, skips.pop())

        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def load_shallower(self, other: UNet) -> None:
        """Take over the function of a network that has the same sizes, and at most as many blocks per level.

        In each level the blocks that it lacks come after its own in the encoder, and after its first in the decoder,
        and start as shortcuts: what they get, less the skip connection, they pass on.
        """
        added, weights = self.config.blocks - other.config.blocks, self.state_dict()
        for name, weight in other.state_dict().items():
            part, *place = name.split(".")
            if part == "up" and int(place[1]) > 0:
                place[1] = str(int(place[1]) + added)
            weights[".".join([part, *place])] = weight
        self.load_state_dict(weights)
        for down, up in zip(self.down, self.up):
            for block in [*down[len(down) - added:], *up[1:1 + added]]:
                nn.init.zeros_(block.conv_2.weight)
                nn.init.zeros_(block.conv_2.bias)
                if isinstance(block.shortcut, nn.Conv2d):
                    nn.init.dirac_(block.shortcut.weight)

    def run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Return block(*inputs), keeping only the inputs for the backward pass if `grad_checkpoint` is set."""
        if not (self.grad_checkpoint and self.training):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)


class ResBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, conv; then the same with the timestep's scale and shift.

    In the decoder the input is x concatenated with the skip connection.
    """

    def __init__(self, c_in: int, c_out: int, emb_width: int, config: UNetConfig):
        super().__init__()
        self.norm_1 = nn.GroupNorm(config.groups, c_in)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb_width, 2 * c_out)
        self.norm_2 = nn.GroupNorm(config.groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)
        nn.init.zeros_(self.conv_2.weight)  # zero-init: each block starts as its shortcut
        nn.init.zeros_(self.conv_2.bias)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over all positions of the deepest level (Vaswani et al. 2017)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.heads = channels // config.head_width
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each [B, heads, positions, head width]
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(2, 3).reshape(b, c, h, w))


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding of t at 10000^(-2 i / width): [B] -> float32 [B, width] (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def network_table(model: UNet, image_size: int) -> str:
    """Format the network as a table: resolution, width, blocks and parameters of each level, then the total."""
    config, levels = model.config, len(model.config.widths)
    side = [image_size // 2**level for level in range(levels)]
    rows = [("timestep", "", 4 * config.width, "", model.time_mlp)]
    if config.num_types:
        rows.append(("classes", "", 4 * config.width, "", model.type_vectors))
    rows.append(("in", side[0], config.width, "", model.conv_in))
    for level, blocks in enumerate(model.down):
        rows.append((f"down {level + 1}", side[level], config.widths[level], len(blocks), blocks))
    rows.append(("middle", side[-1], config.widths[-1], "2 + attention", model.middle))
    for level, blocks in zip(reversed(range(levels)), model.up):
        rows.append((f"up {level + 1}", side[level], config.widths[level], len(blocks), blocks))
    rows.append(("out", side[0], config.channels, "", nn.ModuleList([model.norm_out, model.conv_out])))

    lines = [f"{'level':<10}{'resolution':>12}{'width':>8}{'blocks':>16}{'parameters':>14}"]
    for name, resolution, width, blocks, module in rows:
        resolution = f"{resolution} x {resolution}" if resolution else ""
        lines.append(f"{name:<10}{resolution:>12}{width:>8}{blocks:>16}{count_parameters(module):>14,}")
    lines.append(f"{'total':<10}{count_parameters(model):>50,}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python unet.py", description="Print the network as a table.")
    parser.add_argument("--width", type=int, default=64, help="channels at the first level (default: 64)")
    parser.add_argument("--multipliers", type=int, nargs="+", help="of the width, one per level (default: those for "
                        "the image size)")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks per level (default: 2)")
    parser.add_argument("--groups", type=int, default=32, help="groups of the normalisations (default: 32)")
    parser.add_argument("--num_types", type=int, default=0, help="number of classes (default: 0)")
    parser.add_argument("--image_size", type=int, default=64, help="side of the image, in pixels (default: 64)")
    args = parser.parse_args()
    try:
        multipliers = args.multipliers or default_multipliers(args.image_size)
        config = UNetConfig(width=args.width, multipliers=multipliers, blocks=args.blocks, groups=args.groups,
                            num_types=args.num_types)
        with torch.device("meta"):  # shapes without memory
            model = UNet(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.image_size < 1 or args.image_size % model.config.size_multiple:
        sys.exit(f"error: --image_size must be a multiple of {model.config.size_multiple}, not {args.image_size}")
    print(network_table(model, args.image_size))


if __name__ == "__main__":
    main()
