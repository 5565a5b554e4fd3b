"""From a checkpoint to pictures.

    python generate.py                                                       # the newest checkpoint, 64 images
    python generate.py --checkpoint checkpoints/final_model.pt --num_images 64
    python generate.py --seed 7 --num_images 4 --individual                  # also one PNG each

The grid goes to outputs/generated.png. Image i depends on seed + i alone, whatever the number or the batch size.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

from checkpoint import CheckpointError, load_model, newest_checkpoint
from devices import DEVICES, PRECISIONS, describe, memory_format, pick_device, pick_precision
from reverse_diffusion import SAMPLERS, sample_seeds


def main() -> None:
    args = parse_flags()
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        checkpoint = args.checkpoint or newest_checkpoint()
        model, scheduler, config = load_model(checkpoint, device)
        sampler, steps = choose_sampler(args, config, device, scheduler.num_timesteps)
        print(f"{checkpoint}: {args.num_images} images of {config['image_size']} x {config['image_size']}, "
              f"{sampler} in {steps} steps, on {describe(device)}, {precision}")
        prepare_output(args)
        seeds = range(args.seed, args.seed + args.num_images)
        model.to(memory_format=memory_format(device))
        with tqdm(total=steps * math.ceil(len(seeds) / args.batch_size), unit="step", dynamic_ncols=True) as bar:
            images = sample_seeds(
                model, scheduler, seeds, config["image_size"], device, precision, batch_size=args.batch_size,
                sampler=sampler, steps=steps, prediction=config["prediction"], eta=args.eta,
                callback=lambda *_: bar.update(),
            )
        write(images, args)
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory; give a --batch_size smaller than {args.batch_size}")
    except KeyboardInterrupt:
        sys.exit(130)


def choose_sampler(args: argparse.Namespace, config: dict, device: torch.device, num_timesteps: int) -> tuple[str, int]:
    """The sampler and its steps: the whole reverse process, but on a CPU, where it takes minutes, that of the grids
    which training drew."""
    sampler, steps = args.sampler, args.steps
    if sampler is None and steps is None and device.type == "cpu":
        sampler, steps = config.get("sampler", "ddim"), min(config.get("sample_steps", 50), num_timesteps)
    sampler = sampler or "ddpm"
    steps = steps or (num_timesteps if sampler == "ddpm" else min(50, num_timesteps))
    if steps > num_timesteps:
        raise ValueError(f"--steps must be in 1 ... {num_timesteps} for this checkpoint, not {steps}")
    return sampler, steps


def prepare_output(args: argparse.Namespace) -> None:
    """Make the folders, before minutes of sampling: what cannot be written should be known at once."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; name a file in it")
    if args.individual:
        args.output.with_suffix("").mkdir(exist_ok=True)


def write(images: torch.Tensor, args: argparse.Namespace) -> None:
    """The grid, and one PNG an image where --individual asks for them, in a folder beside it named after it."""
    show = dict(normalize=True, value_range=(-1, 1))
    larger = F.interpolate(images, scale_factor=args.scale, mode="nearest") if args.scale > 1 else images
    save_image(larger, args.output, nrow=math.ceil(math.sqrt(len(images))), padding=2 * args.scale, pad_value=1, **show)
    print(f"wrote {args.output}")
    if args.individual:
        folder = args.output.with_suffix("")
        for i, image in enumerate(larger):
            save_image(image, folder / f"seed_{args.seed + i:06d}.png", **show)
        print(f"wrote {len(images)} images to {folder}/")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate images from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="file of weights (default: the newest in checkpoints/)")
    parser.add_argument("--num_images", type=positive, default=64, help="how many images (default: 64)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="ddpm draws noise at each step, ddim none "
                        "(default: ddpm; on a CPU without --steps, what training used for its grids)")
    parser.add_argument("--steps", type=positive, help="network passes an image, 1 to the checkpoint's timesteps "
                        "(default: all for ddpm, 50 for ddim; on a CPU without --sampler, as many as training used)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise that ddim adds, 0 to 1 (default: 0)")
    parser.add_argument("--seed", type=natural, default=0, help="image i is drawn from seed + i (default: 0)")
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time; less needs less memory "
                        "(default: 64)")
    parser.add_argument("--output", type=Path, default=Path("outputs/generated.png"), help="the grid "
                        "(default: outputs/generated.png)")
    parser.add_argument("--individual", action="store_true", help="also write one PNG an image")
    parser.add_argument("--scale", type=positive, default=1, help="enlarge each pixel so many times (default: 1)")
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)}, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the network's arithmetic; auto is "
                        "bf16 where the device has it (default: auto)")
    args = parser.parse_args()
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--output must end in .png, .jpg or .webp, not {args.output}")
    return args


def natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**62:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^62 - 1, not {text}")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


if __name__ == "__main__":
    main()
