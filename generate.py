"""Generate images from a checkpoint.

    python generate.py                                                # the newest checkpoint, 64 images
    python generate.py --checkpoint checkpoints/final_model.pt --num_images 64
    python generate.py --types "fire flying" --guidance 3             # types, and how typical of them
    python generate.py --types all                                    # a row per type
    python generate.py --checkpoint checkpoints/few_steps/final_model.pt           # a tuned model: in two jumps
    python generate.py --gif                                          # also how the images emerge from the noise
    python generate.py --interpolate 3 8                              # from the image of one seed to that of another
    python generate.py --init_image drawing.png --strength 0.6        # from an image of yours
    python generate.py --init_image photo.png --mask head.png         # draw the white part of the mask anew

The grid goes to outputs/generated.png. Image i depends on seed + i alone, whatever the number or the batch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models.pipeline import BY_EARLIER, DEFAULT_GUIDANCE, Pipeline, newest_checkpoint
from reverse_diffusion import SAMPLERS, repeat_parts, slerp
from training.labels import parse_types
from utils.cli import MAX_SEED, device_setting, parse, precision_setting, seed_setting, setting
from utils.device import describe_device, pick_device, use_fast_kernels
from utils.errors import one_line_errors
from utils.images import (
    LONGEST_SIDE,
    decode_error,
    decode_image,
    enlarge,
    image_grid,
    save_gif,
    save_image,
    to_pil,
    to_uint8,
    upright_size,
)

GIF_FRAMES = 48
DEFAULT_STRENGTH = 0.6
DEFAULT_RESAMPLE = 10
MANY_STEPS = 200  # from here on, a faster sampler is worth a hint


@dataclass
class Settings:
    checkpoint: Path | None = setting(None, "file of weights (default: the newest in checkpoints/)", kind=Path)
    num_images: int | None = setting(None, "number of images, of all types together (default: 64; 8 per type for "
                                           "--types all; 16 for --interpolate)", kind=int, above=0)
    types: str | None = setting(None, "types to show, one or more of the checkpoint's, as in \"fire flying\"; or all, "
                                      "for a row per type (default: any)", kind=str)
    guidance: float | None = setting(None, f"scale of the guidance; 1 is off (default: {DEFAULT_GUIDANCE:g} with "
                                           "--types, or where the checkpoint holds an earlier network)", kind=float)
    guide: str | None = setting(None, "what guidance goes away from; earlier: the network after less training, which "
                                      "train.py --guide_at keeps; types: images of any type; or the file of a "
                                      "checkpoint of less training, as epoch_0060.pt (default: earlier where there is "
                                      "one)", kind=str)
    sampler: str | None = setting(None, "; ".join(f"{name}: {sampler.about}" for name, sampler in SAMPLERS.items())
                                  + " (default: the checkpoint's own, if its training chose one; else ddpm)",
                                  tuple(SAMPLERS), kind=str)
    steps: int | None = setting(None, "network passes per image, up to the checkpoint's timesteps (default: with "
                                      "--sampler, all for ddpm, 50 for ddim, those it was tuned to for consistency, 20 "
                                      "for the others; else the checkpoint's)", kind=int, above=0)
    timesteps: tuple[int, ...] = setting((), "the timesteps to visit, falling, instead of --steps, as 999 430 "
                                             "(default: as the sampler spaces its steps)", least=0)
    seed: int = seed_setting("image i is drawn from seed + i")
    batch_size: int = setting(64, "images at a time; fewer need less memory", above=0)
    interpolate: tuple[int, int] | None = setting(
        None, "walk from the image of seed A to that of seed B, as dpm++ or ddim draws them, or a tuned model: a strip "
        "and a GIF", kind=int, count=2, metavar=("A", "B"), least=0, most=MAX_SEED)
    init_image: Path | None = setting(None, "image-to-image: start from this image (centre-cropped) plus noise; runs "
                                            "the last STRENGTH of the steps", kind=Path, metavar="FILE")
    strength: float | None = setting(None, "how far --init_image may change, above 0 and up to 1 (default: "
                                           f"{DEFAULT_STRENGTH}; 1 with --mask)", kind=float, above=0, most=1)
    mask: Path | None = setting(None, "inpainting: draw the white part of this image anew, which has the size of "
                                      "--init_image, and keep the black part; grey counts from half on", kind=Path,
                                metavar="FILE")
    resample: int | None = setting(None, "how often --mask repeats each part of the reverse process, to fit the new to "
                                         f"the kept; 1 is fastest (default: {DEFAULT_RESAMPLE})", kind=int, above=0)
    gif: bool = setting(False, "also animate how the images emerge from the noise")
    output: Path = setting(Path("outputs/generated.png"), "the grid; a GIF gets the same name")
    individual: bool = setting(False, "also write one PNG per image")
    scale: int = setting(1, "enlarge each pixel by this factor", above=0)
    device: str = device_setting()
    precision: str = precision_setting()


@dataclass
class Plan:
    """The images to draw, a seed and a set of types each, and their place in the grid."""

    seeds: list[int]
    types: list[tuple[str, ...]]  # () for any
    columns: int
    row_names: Sequence[str] = ()
    x_T: torch.Tensor | None = None  # to start from, [N, C, H, W]; None: the seeds' own noise
    start: int | None = None  # the timestep of x_T; None: the last
    inpainting: dict[str, Any] = field(default_factory=dict)  # image, redraw, resample of `Pipeline.inpaint`; or none
    options: dict[str, Any] = field(default_factory=dict)  # further ones of `Pipeline.sample`


def main() -> None:
    with one_line_errors("give a smaller --batch_size or a smaller --num_images"):
        args = parse(Settings, "Generate images from a checkpoint.", "python generate.py")
        check(args)

        # Load the model.
        device = pick_device(args.device)
        use_fast_kernels()
        checkpoint = args.checkpoint or newest_checkpoint()
        pipeline = Pipeline.load(checkpoint, device, args.precision)
        args.guide = pipeline.use_guide(args.guide)

        # Decide what to draw, and how.
        sampler, steps = choose_sampler(args, pipeline)
        plan = make_plan(args, pipeline)
        settings: dict[str, Any] = dict(checkpoint=Path(checkpoint).name, sampler=sampler, steps=steps)
        if args.init_image:
            strength = choose_strength(args)
            settings |= dict(init_image=args.init_image.name, strength=strength)
            steps = max(1, round(strength * steps))
        if args.mask:
            settings |= dict(mask=args.mask.name, resample=plan.inpainting["resample"])
        if args.timesteps:
            settings |= dict(timesteps=list(args.timesteps))
        if args.interpolate:
            settings |= dict(interpolate=list(args.interpolate))
        guidance, guide = choose_guidance(args, plan, pipeline)
        guide_name = pipeline.earlier_name if guide == BY_EARLIER else guide
        settings |= dict(guidance=guidance) | (dict(guide=guide_name) if guide else {})
        settings |= dict(image_size=pipeline.image_size, scale=args.scale)
        passes = count_passes(plan, steps)
        prepare_output(args, plan, pipeline.image_size)
        print(f"{checkpoint}: {len(plan.seeds)} images of {pipeline.image_size} x {pipeline.image_size}, {sampler} in "
              f"{steps} steps" + (f", repeated in {passes} passes" if passes > steps else "")
              + (f", guidance {guidance:g}" if guide or any(plan.types) else "") + (f" ({guide_name})" if guide else "")
              + f", on {describe_device(device)}, {pipeline.precision}")
        if steps >= MANY_STEPS and args.sampler is None and not args.interpolate:
            print("hint: --sampler sde-dpm++ takes 20 steps, for images that are about as good")

        # Draw and write.
        images, frames = draw(pipeline, plan, args, sampler, steps, guidance, guide)
        write(to_uint8(images), plan, args, settings)
        if args.gif:
            write_gif([image_grid(torch.cat(parts), plan.columns, args.scale, plan.row_names)
                       for parts in frames.values()], args.output)


def check(args: Settings) -> None:
    """Raise ValueError for flags that contradict each other."""
    if args.output.suffix.lower() not in LONGEST_SIDE.keys() - {".gif"}:
        raise ValueError(f"--output must end in .png, .jpg or .webp, not {args.output}")
    if args.interpolate and (args.init_image or args.gif or args.types == "all"):
        raise ValueError("--interpolate goes without --init_image, --gif and --types all: it writes a GIF of its own")
    if args.strength is not None and not args.init_image:
        raise ValueError("--strength needs --init_image FILE, the image to start from")
    if args.mask and not args.init_image:
        raise ValueError("--mask needs --init_image FILE, the image of which it shows the part to draw anew")
    if args.timesteps and (args.steps or args.init_image):
        raise ValueError("--timesteps goes without --steps, which it replaces, and without --init_image, whose "
                         "--strength says where to begin")
    if args.resample is not None and not args.mask:
        raise ValueError("--resample needs --mask FILE, the part of --init_image to draw anew")


def make_plan(args: Settings, pipeline: Pipeline) -> Plan:
    """Return the images that the flags describe."""
    known = pipeline.class_names
    if args.types is not None and not known:
        raise ValueError("this checkpoint knows no types, since it was trained without labels; leave out --types")
    if args.types == "all":
        plan = plan_rows(args, known)
    else:
        types = () if args.types is None else parse_types(args.types, known)
        if args.interpolate:
            return plan_interpolation(args, pipeline, types)
        count = args.num_images or 64
        plan = Plan(list(range(args.seed, args.seed + count)), [types] * count, math.ceil(math.sqrt(count)))
    if args.init_image:
        start_from_image(args, plan, pipeline)
    return plan


def plan_rows(args: Settings, known: Sequence[str]) -> Plan:
    """Plan a row of images for each type, with the same seeds in each row."""
    columns = 8
    if args.num_images is not None:
        columns, rest = divmod(args.num_images, len(known))
        if rest or not columns:
            nearest = max(1, round(args.num_images / len(known))) * len(known)
            raise ValueError(f"--num_images {args.num_images} cannot be divided among the {len(known)} types; give a "
                             f"multiple of {len(known)}, such as {nearest}")
    seeds = list(range(args.seed, args.seed + columns))
    return Plan(seeds * len(known), [(name,) for name in known for _ in seeds], columns, known)


def plan_interpolation(args: Settings, pipeline: Pipeline, types: tuple[str, ...]) -> Plan:
    """Plan images from the noise of one seed to that of another, along the arc between them."""
    first, last = pipeline.noise(args.interpolate)
    count = args.num_images or 16
    weights = [i / max(1, count - 1) for i in range(count)]
    x_T = torch.stack([slerp(first, last, weight) for weight in weights])
    return Plan([args.interpolate[0]] * count, [types] * count, count, x_T=x_T,
                options=dict(toward=(args.interpolate[1], weights)))


def start_from_image(args: Settings, plan: Plan, pipeline: Pipeline) -> None:
    """Start from an image with the noise of a timestep on it (SDEdit, Meng et al. 2022), and keep what a mask says."""
    image, shape = read_image("--init_image", args.init_image, pipeline.image_size)
    if args.mask:
        redraw = read_mask(args.mask, shape, pipeline.image_size)
        plan.inpainting = dict(image=image, redraw=redraw, resample=args.resample or DEFAULT_RESAMPLE)
    strength = choose_strength(args)
    if args.mask and strength == 1:
        return  # nothing of the masked part stays: it starts from pure noise
    plan.start = max(0, round(strength * pipeline.scheduler.num_timesteps) - 1)
    t, noise = torch.full((len(plan.seeds),), plan.start), pipeline.noise(plan.seeds)
    plan.x_T = pipeline.scheduler.add_noise(pipeline.encode(image[None]).expand_as(noise), t, noise)


def choose_strength(args: Settings) -> float:
    return args.strength or (1.0 if args.mask else DEFAULT_STRENGTH)


def read_image(flag: str, path: Path, image_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return an image [3, S, S] in [-1, 1], and width and height of its file in pixels.

    Raises:
        ValueError: for a file that cannot be read; names the flag.
    """
    try:
        return torch.from_numpy(decode_image(path, image_size)).float() / 127.5 - 1, upright_size(path)
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        raise ValueError(f"cannot read {flag} {path}: {decode_error(error)}") from error


def read_mask(path: Path, image_shape: tuple[int, int], image_size: int) -> torch.Tensor:
    """Return the part of --init_image to draw anew, boolean [S, S]: squares of the mask that are white for the most.

    Args:
        path: of the mask.
        image_shape: width and height of the file of --init_image in pixels, which the mask must have, too.
        image_size: S, of the model.

    Raises:
        ValueError: for a mask that cannot be read, or does not fit the image.
    """
    mask, size = read_image("--mask", path, min(image_shape))  # cropped as the image is, not scaled yet
    if size != image_shape:
        raise ValueError("--mask {} has {} x {} pixels and --init_image has {} x {}; give a mask of the image's "
                         "size".format(path, *size, *image_shape))
    white = mask.mean(dim=0) > 0
    redraw = F.interpolate(white[None, None].float(), (image_size, image_size), mode="area")[0, 0] >= 0.5
    if not redraw.any():
        raise ValueError(f"--mask {path} is black wherever the image is used, so nothing would be drawn; make "
                         f"white what is to be drawn anew")
    if redraw.all():
        raise ValueError(f"--mask {path} is white wherever the image is used, so nothing would be kept; make "
                         f"black what is to stay, or leave --mask out")
    return redraw


def choose_sampler(args: Settings, pipeline: Pipeline) -> tuple[str, int]:
    """Return the sampler and its steps.

    For --interpolate it is a deterministic one, so that the ends are the images of the two seeds. A tuned model has but
    one sampler; the noise of its few jumps follows the arc between the two seeds'.
    """
    sampler = args.sampler
    if args.interpolate and not pipeline.tuned:
        sampler = sampler or "dpm++"
        if not SAMPLERS[sampler].deterministic:
            raise ValueError("--interpolate needs a sampler that adds no noise: --sampler dpm++ or ddim")
    return pipeline.choose_sampler(sampler, len(args.timesteps) or args.steps)


def choose_guidance(args: Settings, plan: Plan, pipeline: Pipeline) -> tuple[float, str | None]:
    """Return the guidance scale and the guide. Raises ValueError for what cannot be followed."""
    has_types = any(plan.types)
    guidance = pipeline.default_guidance(has_types, args.guide) if args.guidance is None else args.guidance
    return guidance, pipeline.choose_guide(guidance, pipeline.class_labels(plan.types) if has_types else None,
                                           args.guide)


def prepare_output(args: Settings, plan: Plan, image_size: int) -> None:
    """Make the folders and find what cannot be written, before minutes of sampling."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    written = [args.output] + ([args.output.with_suffix(".gif")] if args.gif or args.interpolate else [])
    sources = {flag: path for flag, path in (("--init_image", args.init_image), ("--mask", args.mask)) if path}
    rows = math.ceil(len(plan.seeds) / plan.columns)
    for path in written:
        if path.is_dir():
            raise ValueError(f"--output {path} is a folder; name a file in it")
        for flag, source in sources.items():
            if path.exists() and path.samefile(source):
                raise ValueError(f"--output {path} would overwrite {flag}; give it another name")
        if max(rows, plan.columns) * (image_size + 2) * args.scale + 200 > LONGEST_SIDE[path.suffix.lower()]:
            raise ValueError(f"{path} would be larger than a {path.suffix} can be; give a smaller --scale or "
                             f"--num_images")
    if args.individual:
        folder = args.output.with_suffix("")
        for flag, source in sources.items():
            if source.resolve().parent == folder.resolve():
                raise ValueError(f"--individual writes into {folder}/, where {flag} is, and might overwrite it; give "
                                 f"another --output")
        folder.mkdir(exist_ok=True)
        others = len(list(folder.glob("*.png")))
        if others:
            print(f"note: {folder}/ already has {others} images; those with other names stay there")


def count_passes(plan: Plan, steps: int) -> int:
    """Return the number of network passes for an image, of which inpainting needs several a step."""
    return len(repeat_parts([(0, -1)] * steps, plan.inpainting.get("resample", 1)))


def draw(pipeline: Pipeline, plan: Plan, args: Settings, sampler: str, steps: int, guidance: float,
         guide: str | None) -> tuple[torch.Tensor, dict[float, list[torch.Tensor]]]:
    """Draw the images, and the frames of the animation: for some steps, the x_t of each batch as uint8."""
    frames: dict[float, list[torch.Tensor]] = {}
    batch: dict[float, torch.Tensor] = {}  # frames of the batch that is being drawn
    passes = count_passes(plan, steps)
    every = math.ceil(passes / GIF_FRAMES)
    with tqdm(total=passes * math.ceil(len(plan.seeds) / args.batch_size), unit="step", dynamic_ncols=True) as bar:
        def after_step(i: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
            bar.update()
            if i == 0:
                batch.clear()  # what a batch left that was too large for the memory
            if args.gif and i % every == 0 and i < passes - 1:
                if pipeline.tuned:  # each jump lands on an image
                    batch[i - 0.5] = to_uint8(pipeline.decode(x_0))
                batch[i] = to_uint8(pipeline.decode(x_t))
            if i == passes - 1:
                for step, images in batch.items():
                    frames.setdefault(step, []).append(images)

        images = (pipeline.inpaint if plan.inpainting else pipeline.sample)(
            plan.seeds, **plan.inpainting, labels=pipeline.class_labels(plan.types) if any(plan.types) else None,
            guidance=guidance, guide=guide, sampler=sampler, steps=steps, x_T=plan.x_T, start=plan.start,
            batch_size=args.batch_size, callback=after_step, timesteps=args.timesteps or None, **plan.options,
        )
    frames[passes] = [to_uint8(images)]
    return images, frames


def write(pixels: torch.Tensor, plan: Plan, args: Settings, settings: dict[str, Any]) -> None:
    """Write the grid, and with --individual one PNG per image in a folder named after it."""
    types = [" ".join(names) for names in plan.types]
    seeds = {} if args.interpolate else dict(seeds=plan.seeds)
    save_image(image_grid(pixels, plan.columns, args.scale, plan.row_names), args.output, **seeds,
               types=list(dict.fromkeys(types)), **settings)
    print(f"wrote {args.output}")
    if args.interpolate:
        steps = [to_pil(enlarge(image, args.scale)) for image in pixels]
        write_gif(steps + steps[-2:0:-1], args.output, hold=0.0)  # there and back again
    if args.individual:
        folder = args.output.with_suffix("")
        for i, (image, seed, names) in enumerate(zip(pixels, plan.seeds, types)):
            name = f"step_{i:03d}" if args.interpolate else "_".join([f"seed_{seed:06d}", *names.split()])
            name = re.sub(r"[^\w.-]", "-", name)  # a type can have a name that no file can have
            position = dict(step=i) if args.interpolate else dict(seed=seed)
            save_image(to_pil(enlarge(image, args.scale)), folder / f"{name}.png", **position, types=names, **settings)
        print(f"wrote {len(pixels)} images to {folder}/")


def write_gif(frames: list, output: Path, **timing: float) -> None:
    path = output.with_suffix(".gif")
    save_gif(frames, path, **timing)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
