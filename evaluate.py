"""What did the model learn? So far: which marks have augmentation and sampling left on its pictures?

    python generate.py --checkpoint checkpoints/final_model.pt --num_images 64 --individual
    python evaluate.py outputs/generated

Counts, among the pictures of a folder, those with black corners (rotations filled with black), those that have
collapsed to near-black, and those with a clean white background, for data that has one.
"""

from __future__ import annotations

import argparse
import sys

import torch

from dataset import DataError, ImageFolder


def marks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which pictures, uint8 [N, 3, S, S], show which mark: bool tensors [N].

    A corner is a square with sides of S/16 pixels; values are means over the channels, from 0 (black) to 1 (white).
        black_corner: some corner has a mean below 0.25.
        collapsed: the whole picture has a mean below 0.25.
        clean: the median of the outermost pixels is above 0.95 and every corner has a mean above 0.9.
    """
    x = images.float().mean(dim=1) / 255
    k = max(1, x.shape[-1] // 16)
    corners = torch.stack([x[:, rows, columns].mean(dim=(1, 2)) for rows in (slice(k), slice(-k, None))
                           for columns in (slice(k), slice(-k, None))], dim=1)
    border = torch.cat([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], dim=1)
    return {
        "black_corner": (corners < 0.25).any(dim=1),
        "collapsed": x.mean(dim=(1, 2)) < 0.25,
        "clean": (border.median(dim=1).values > 0.95) & (corners > 0.9).all(dim=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the marks that augmentation and sampling leave on pictures.")
    parser.add_argument("folder", help="pictures of one size, as `generate.py --individual` writes them")
    parser.add_argument("--image_size", type=int, default=64, help="side to scale them to, in pixels (default: 64)")
    args = parser.parse_args()
    try:
        dataset = ImageFolder(args.folder, args.image_size)
    except DataError as error:
        sys.exit(f"error: {error}")
    if dataset.images is None:
        sys.exit(f"error: the {len(dataset)} images in {args.folder} do not fit in memory; "
                 f"give a smaller folder or --image_size")
    print(f"of {len(dataset)} pictures in {args.folder}:")
    for mark, shown in marks(dataset.images).items():
        print(f"{shown.sum().item():6d} {mark.replace('_', ' ')}")


if __name__ == "__main__":
    main()
