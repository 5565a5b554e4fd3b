"""From a checkpoint to pictures.

    python generate.py                                                # the newest checkpoint, 64 images
    python generate.py --checkpoint checkpoints/final_model.pt --num_images 64
    python generate.py --types "fire flying" --guidance 3             # what they are to show
    python generate.py --types all                                    # a row a type
    python generate.py --gif                                          # also how they came out of the noise
    python generate.py --interpolate 3 8                              # from the image of one seed to that of another
    python generate.py --init_image drawing.png --strength 0.6        # from a picture of yours

The grid goes to outputs/generated.png. Image i depends on seed + i alone, whatever the number or the batch size.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_model, newest_checkpoint
from dataset import decode_image, reason
from devices import describe, pick_device, pick_precision
from flags import Parser, finite, fraction, natural, positive, strength
from forward_diffusion import NoiseScheduler
from labels import multi_hot, parse_types
from latents import Autoencoder, Pixels
from pictures import LONGEST_SIDE, enlarge, grid, save_animation, save_picture, to_image, to_pixels
from reverse_diffusion import DEFAULT_GUIDANCE, SAMPLERS, VARIANCES, sample_seeds, seeded_noise, slerp

DEFAULT_STEPS = {"ddim": 50, "dpm++": 20, "sde-dpm++": 20}  # and all of them for ddpm
GIF_FRAMES = 48


@dataclass
class Plan:
    """Which pictures to draw, a seed and a set of types each, and how they stand in the grid."""

    seeds: list[int]
    types: list[tuple[str, ...]]  # () for any
    columns: int
    row_names: Sequence[str] = ()
    x_T: torch.Tensor | None = None  # what to start from, [N, 3, S, S]; None: the seeds' own noise
    start: int | None = None  # the timestep of x_T; None: the last


def main() -> None:
    args = parse_flags()
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        checkpoint = args.checkpoint or newest_checkpoint()
        model, scheduler, codec, config = load_model(checkpoint, device)
        plan = make_plan(args, scheduler, codec, config)
        sampler, steps = choose_sampler(args, config, device, scheduler.num_timesteps)
        settings = dict(checkpoint=Path(checkpoint).name, sampler=sampler, steps=steps)
        if args.init_image:  # the part of the steps that is left from there
            settings |= dict(init_image=args.init_image.name, strength=args.strength)
            steps = max(1, round(args.strength * steps))
        if args.interpolate:
            settings |= dict(interpolate=args.interpolate)
        options = {name: value for name in ("eta", "variance") if (value := getattr(args, name)) is not None}
        guidance = choose_guidance(args, plan, config)
        settings |= dict(guidance=guidance, **options)
        prepare_output(args, plan, config["image_size"])
        print(f"{checkpoint}: {len(plan.seeds)} images of {config['image_size']} x {config['image_size']}, "
              f"{sampler} in {steps} steps" + (f", guidance {guidance:g}" if any(plan.types) else "")
              + f", on {describe(device)}, {precision}")

        frames: dict[int, list[torch.Tensor]] = {}  # of the animation: step -> the x_t of each batch
        with tqdm(total=steps * math.ceil(len(plan.seeds) / args.batch_size), unit="step", dynamic_ncols=True) as bar:
            def after_step(i: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
                bar.update()
                if args.gif and (i % math.ceil(steps / GIF_FRAMES) == 0 or i == steps - 1):
                    frames.setdefault(i, []).append(to_pixels(codec.decode(x_t)).cpu())

            images = sample_seeds(
                model, scheduler, plan.seeds, config["image_size"], device, precision, codec=codec,
                batch_size=args.batch_size,
                types=torch.from_numpy(multi_hot(plan.types, config["types"])).float() if any(plan.types) else None,
                x_T=plan.x_T, sampler=sampler, steps=steps, prediction=config["prediction"], guidance=guidance,
                start=plan.start, callback=after_step, **options,
            )
        write(to_pixels(images), plan, args, settings)
        if args.gif:
            sheets = [grid(torch.cat(batches), plan.columns, args.scale, plan.row_names) for batches in frames.values()]
            write_animation(sheets, args.output)
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"error: out of memory; give a --batch_size smaller than {args.batch_size}, or a smaller --num_images")
    except KeyboardInterrupt:
        sys.exit(130)


def make_plan(args: argparse.Namespace, scheduler: NoiseScheduler, codec: Pixels | Autoencoder, config: dict) -> Plan:
    """The pictures that the flags ask for."""
    known, size = config["types"], config["image_size"]
    if args.types is not None and not known:
        raise ValueError("this checkpoint knows no types, since it was trained without labels; leave out --types")
    if args.types == "all":
        columns = args.num_images or 8
        seeds = list(range(args.seed, args.seed + columns))
        plan = Plan(seeds * len(known), [(name,) for name in known for _ in seeds], columns, known)
    else:
        types = () if args.types is None else parse_types(args.types, known)
        if args.interpolate:
            # The two ends' noise and what lies between them on the arc; the ends are these seeds' own images.
            first, last = seeded_noise(args.interpolate, codec.shape(size))
            count = args.num_images or 16
            weights = [i / max(1, count - 1) for i in range(count)]
            return Plan([args.interpolate[0]] * count, [types] * count, count,
                        x_T=torch.stack([slerp(first, last, weight) for weight in weights]))
        count = args.num_images or 64
        plan = Plan(list(range(args.seed, args.seed + count)), [types] * count, math.ceil(math.sqrt(count)))
    if args.init_image:
        # SDEdit: the picture with the noise of a timestep on it, from which the reverse process goes on.
        plan.start = max(0, round(args.strength * scheduler.num_timesteps) - 1)
        try:
            picture = torch.from_numpy(decode_image(args.init_image, size)).float() / 127.5 - 1
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            raise ValueError(f"cannot read --init_image {args.init_image}: {reason(error)}") from error
        t, noise = torch.full((len(plan.seeds),), plan.start), seeded_noise(plan.seeds, codec.shape(size))
        plan.x_T = scheduler.add_noise(codec.encode(picture[None]).cpu().expand_as(noise), t, noise)
    return plan


def choose_sampler(args: argparse.Namespace, config: dict, device: torch.device, num_timesteps: int) -> tuple[str, int]:
    """The sampler and its steps: the whole reverse process, but on a CPU, where it takes minutes, that of the grids
    which training drew. For a walk between two seeds one without noise of its own, or its ends would not be theirs."""
    sampler, steps = args.sampler, args.steps
    if args.interpolate:
        sampler = sampler or "dpm++"
        if sampler in ("ddpm", "sde-dpm++") or args.eta:
            raise ValueError("--interpolate needs a sampler that adds no noise: --sampler dpm++, or ddim with --eta 0")
    if sampler is None and device.type == "cpu":
        sampler, steps = config.get("sampler", "ddim"), steps or min(config.get("sample_steps", 50), num_timesteps)
    sampler = sampler or "ddpm"
    steps = steps or (num_timesteps if sampler == "ddpm" else min(DEFAULT_STEPS[sampler], num_timesteps))
    if steps > num_timesteps:
        raise ValueError(f"--steps must be in 1 ... {num_timesteps} for this checkpoint, not {steps}")
    for name, of in (("eta", "ddim"), ("variance", "ddpm")):
        if getattr(args, name) is not None and sampler != of:
            raise ValueError(f"--{name} belongs to the sampler {of}, and this is {sampler}: add --sampler {of}, or "
                             f"leave --{name} out")
    return sampler, steps


def choose_guidance(args: argparse.Namespace, plan: Plan, config: dict) -> float:
    known, learned_without = config["types"], config.get("label_dropout", 0.1) > 0
    if any(plan.types):
        if args.guidance not in (None, 1) and not learned_without:
            raise ValueError("--guidance compares with pictures of any type, which this checkpoint was never shown: it "
                             "was trained with --label_dropout 0; leave --guidance out")
        return args.guidance if args.guidance is not None else DEFAULT_GUIDANCE if learned_without else 1.0
    if args.guidance is not None:
        raise ValueError("--guidance strengthens types and there are none: " + (
            f"add --types, with one or more of {', '.join(known)}" if known else "this checkpoint knows none"))
    return 1.0


def prepare_output(args: argparse.Namespace, plan: Plan, image_size: int) -> None:
    """Make the folders and look at what is to be written, before minutes of sampling: what cannot be written should be
    known at once."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    written = [args.output] + ([args.output.with_suffix(".gif")] if args.gif or args.interpolate else [])
    rows = math.ceil(len(plan.seeds) / plan.columns)
    for path in written:
        if path.is_dir():
            raise ValueError(f"--output {path} is a folder; name a file in it")
        if args.init_image and path.exists() and path.samefile(args.init_image):
            raise ValueError(f"--output {path} would take the place of --init_image; give it another name")
        if max(rows, plan.columns) * (image_size + 2) * args.scale + 200 > LONGEST_SIDE[path.suffix.lower()]:
            raise ValueError(f"{path} would be larger than a {path.suffix} can be; give a smaller --scale or "
                             f"--num_images")
    if args.individual:
        folder = args.output.with_suffix("")
        folder.mkdir(exist_ok=True)
        others = len(list(folder.glob("*.png")))
        if others:
            print(f"note: {folder}/ has {others} pictures already; those of other names stay there")


def write(pixels: torch.Tensor, plan: Plan, args: argparse.Namespace, settings: dict) -> None:
    """The grid, and one PNG an image where --individual asks for them, in a folder beside it named after it."""
    types = [" ".join(names) for names in plan.types]
    seeds = {} if args.interpolate else dict(seeds=plan.seeds)
    save_picture(grid(pixels, plan.columns, args.scale, plan.row_names), args.output, **seeds,
                 types=list(dict.fromkeys(types)), **settings)
    print(f"wrote {args.output}")
    if args.interpolate:
        steps = [to_image(enlarge(picture, args.scale)) for picture in pixels]
        write_animation(steps + steps[-2:0:-1], args.output, hold=0.0)  # there and back again
    if args.individual:
        folder = args.output.with_suffix("")
        for i, (picture, seed, names) in enumerate(zip(pixels, plan.seeds, types)):
            name = f"step_{i:03d}" if args.interpolate else "_".join([f"seed_{seed:06d}", *names.split()])
            made = dict(step=i) if args.interpolate else dict(seed=seed)
            name = re.sub(r"[^\w.-]", "-", name)  # a type can be called what no file can
            image = to_image(enlarge(picture, args.scale))
            save_picture(image, folder / f"{name}.png", **made, types=names, **settings)
        print(f"wrote {len(pixels)} images to {folder}/")


def write_animation(frames: list, output: Path, **timing: float) -> None:
    path = output.with_suffix(".gif")
    save_animation(frames, path, **timing)
    print(f"wrote {path}")


def parse_flags() -> argparse.Namespace:
    parser = Parser(description="Generate images from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="file of weights (default: the newest in checkpoints/)")
    parser.add_argument("--num_images", type=positive, help="how many images (default: 64; 8 a type for --types all; "
                        "16 for --interpolate)")
    parser.add_argument("--types", help="what they are to show: one or more of the checkpoint's types, as in \"fire "
                        "flying\"; or all, for a row a type (default: anything)")
    parser.add_argument("--guidance", type=finite, help="how strongly they are pushed towards their types; 1: not "
                        f"beyond what the network says of them (default: {DEFAULT_GUIDANCE:g})")
    parser.add_argument("--sampler", choices=SAMPLERS, help="ddpm and sde-dpm++ draw noise at each step, ddim and "
                        "dpm++ none (default: ddpm; on a CPU what training used for its grids)")
    parser.add_argument("--steps", type=positive, help="network passes an image, 1 to the checkpoint's timesteps "
                        "(default: all for ddpm, 50 for ddim, 20 for the others; on a CPU without --sampler, as many "
                        "as training used)")
    parser.add_argument("--eta", type=fraction, help="noise that ddim adds, 0 to 1 (default: 0)")
    parser.add_argument("--variance", choices=VARIANCES, help="of the noise that ddpm adds "
                        "(default: beta_tilde)")
    parser.add_argument("--seed", type=natural, default=0, help="image i is drawn from seed + i (default: 0)")
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time; less needs less memory "
                        "(default: 64)")
    parser.add_argument("--interpolate", type=natural, nargs=2, metavar=("A", "B"), help="walk from the image of seed "
                        "A to that of seed B, as dpm++ draws them unless --sampler says ddim: a strip and a GIF")
    parser.add_argument("--init_image", type=Path, metavar="FILE", help="start from this picture, cut to a centred "
                        "square, and not from noise alone; only that part of the steps is made which --strength says")
    parser.add_argument("--strength", type=strength, help="how much of --init_image is to change, from above 0 to 1, "
                        "where nothing of it is left (default: 0.6)")
    parser.add_argument("--gif", action="store_true", help="also animate how the grid comes out of the noise")
    parser.add_argument("--output", type=Path, default=Path("outputs/generated.png"), help="the grid; a GIF has the "
                        "same name (default: outputs/generated.png)")
    parser.add_argument("--individual", action="store_true", help="also write one PNG an image")
    parser.add_argument("--scale", type=positive, default=1, help="enlarge each pixel so many times (default: 1)")
    parser.add_device_flags()
    args = parser.parse_args()
    if args.output.suffix.lower() not in LONGEST_SIDE.keys() - {".gif"}:
        parser.error(f"--output must end in .png, .jpg or .webp, not {args.output}")
    if args.interpolate and (args.init_image or args.gif or args.types == "all"):
        parser.error("--interpolate goes without --init_image, --gif and --types all: it writes a GIF of its own")
    if args.strength is not None and not args.init_image:
        parser.error("--strength needs --init_image FILE, the picture to start from")
    args.strength = args.strength or 0.6
    return args


if __name__ == "__main__":
    main()
