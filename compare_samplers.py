"""Quality for time: how far are the samples from the data, for each sampler and number of steps?

    python compare_samplers.py --checkpoint checkpoints/critters.pt       # an hour on two cores, minutes on a GPU

For a model of critters, since fresh ones, which it never saw, can be drawn to compare with. Sample i is asked for the
types of fresh critter i and has the same seed with every sampler: so the difference between two samplers is known
better than either's distance, most of whose error is the luck of these critters. The plot, the table and every figure
go to outputs/samplers.png, .md and .json; a run that was stopped goes on with what is missing in the .json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_model
from critters import TYPES, draw_critter, draw_critters
from devices import describe, pick_device, pick_precision
from distances import sliced_wasserstein
from flags import Parser, natural, positive
from labels import multi_hot
from pictures import to_pixels
from reverse_diffusion import sample_seeds

HELD_OUT_SEED = 2_000_003  # of critters that no model was trained on
RUNS = {  # name -> (options of `sample`, steps)
    "ddpm": (dict(sampler="ddpm"), (20, 50, 100, 1000)),
    "ddpm, beta": (dict(sampler="ddpm", variance="beta"), (50, 100)),
    "ddim": (dict(sampler="ddim"), (5, 10, 20, 50, 100)),
    "dpm++": (dict(sampler="dpm++"), (5, 10, 20, 50)),
    "sde-dpm++": (dict(sampler="sde-dpm++"), (10, 20, 50)),
}
YARDSTICK = ("ddpm", 1000)  # what the others are compared with
GROUPS = 8  # of the jackknife
BATCH_SIZE = 64


def main() -> None:
    parser = Parser(description="Measure the distance of samples to unseen critters, for each sampler and steps.")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/critters.pt"), help="of a model of "
                        "critters (default: checkpoints/critters.pt)")
    parser.add_argument("--num_images", type=positive, default=192, help="samples for each setting (default: 192)")
    parser.add_argument("--seed", type=natural, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/samplers"), help="what the files' names begin "
                        "with (default: outputs/samplers)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, cpu, ... (default: auto)")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        precision = pick_precision("auto", device)
        model, scheduler, codec, config = load_model(args.checkpoint, device)
        if config["types"] != TYPES:
            raise ValueError(f"{args.checkpoint} is not a model of critters with their types; train one: "
                             f"python train.py --preset quick")
        if args.num_images < 64:
            raise ValueError(f"--num_images must be at least 64 for a distance to say something, not {args.num_images}")
        if max(max(steps) for _, steps in RUNS.values()) > scheduler.num_timesteps:
            raise ValueError(f"{args.checkpoint} has {scheduler.num_timesteps} timesteps, and more steps are wanted")
        args.output.parent.mkdir(parents=True, exist_ok=True)

        # Real pictures: a set to compare all with, and another of the same types, the least distance to hope for.
        drawn, labels = draw_critters(args.num_images, config["image_size"], HELD_OUT_SEED)
        reference = torch.from_numpy(drawn).permute(0, 3, 1, 2)
        other = np.stack([draw_critter(i, config["image_size"], HELD_OUT_SEED + 1, names)[0]
                          for i, names in enumerate(labels)])
        other = torch.from_numpy(other).permute(0, 3, 1, 2)
        types = torch.from_numpy(multi_hot(labels, TYPES)).float()

        path = args.output.with_suffix(".json")
        made_with = dict(checkpoint=args.checkpoint.name, num_images=args.num_images, seed=args.seed,
                         sha256=hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16], precision=precision)
        results = json.loads(path.read_text()) if path.exists() else {}
        if results.get("made_with", made_with) != made_with:
            raise ValueError(f"{path} is of {results['made_with']}; remove it, or give another --output")
        results = dict(made_with=made_with, device=f"{describe(device)}, {precision}", rows=results.get("rows", []))
        results["real"] = leave_one_out(other, reference)
        done = {(row["sampler"], row["steps"]) for row in results["rows"]}
        for name, (options, all_steps) in RUNS.items():
            for steps in all_steps:
                if (name, steps) in done:
                    continue
                began = time.monotonic()
                passes = steps * math.ceil(args.num_images / BATCH_SIZE)
                with tqdm(total=passes, desc=f"{name} {steps}", leave=False) as bar:
                    images = sample_seeds(
                        model, scheduler, range(args.seed, args.seed + args.num_images), config["image_size"], device,
                        precision, codec=codec, batch_size=BATCH_SIZE, types=types, steps=steps,
                        prediction=config["prediction"],
                        callback=lambda *_: bar.update(), **options,
                    )
                seconds = round(time.monotonic() - began, 1)
                results["rows"].append(dict(sampler=name, steps=steps, seconds=seconds,
                                            distances=leave_one_out(to_pixels(images), reference)))
                path.with_suffix(".tmp").write_text(json.dumps(results, indent=1))
                os.replace(path.with_suffix(".tmp"), path)
        table = as_table(results)
        args.output.with_suffix(".md").write_text(table + "\n")
        draw(results, args.output.with_suffix(".png"))
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; give a smaller --num_images")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{table}\nwrote {path}, .md and .png")


def leave_one_out(samples: torch.Tensor, pictures: torch.Tensor) -> list[float]:
    """The distance of samples and pictures, then without each of GROUPS parts; sample i leaves with picture i."""
    part = torch.arange(len(samples)) * GROUPS // len(samples)
    kept = [part >= 0, *(part != group for group in range(GROUPS))]
    return [sliced_wasserstein(samples[keep], pictures[keep])["wasserstein"].value for keep in kept]


def with_error(distances: Sequence[float]) -> tuple[float, float]:
    """The first, and its standard error from the others (the jackknife, Efron & Stein 1981)."""
    others = np.array(distances[1:])
    return distances[0], math.sqrt((GROUPS - 1) / GROUPS * ((others - others.mean()) ** 2).sum())


def as_table(results: dict) -> str:
    """A row for each setting, in Markdown."""
    rows = {(row["sampler"], row["steps"]): row["distances"] for row in results["rows"]}
    lines = ["| sampler | steps | distance to unseen critters | more than `ddpm` in 1000 steps |",
             "| --- | --- | --- | --- |"]
    for name, (_, all_steps) in RUNS.items():
        for steps in all_steps:
            value, error = with_error(rows[name, steps])
            more, its_error = with_error(np.subtract(rows[name, steps], rows[YARDSTICK]))
            lines.append(f"| `{name}` | {steps} | {value:.4f} ± {error:.4f} | {more:+.4f} ± {its_error:.4f} |")
    value, error = with_error(results["real"])
    return "\n".join([*lines, f"| other unseen critters | | {value:.4f} ± {error:.4f} | |"])


def draw(results: dict, path: Path) -> None:
    """Distance against steps, a curve for each sampler, with its standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in RUNS:
        rows = sorted((row for row in results["rows"] if row["sampler"] == name), key=lambda row: row["steps"])
        values, errors = zip(*(with_error(row["distances"]) for row in rows))
        axis.errorbar([row["steps"] for row in rows], values, errors, marker="o", capsize=3, label=name)
    axis.axhline(with_error(results["real"])[0], color="black", linestyle=":", label="other unseen critters")
    axis.set_xscale("log")
    axis.set_xlabel("steps (network passes an image)")
    axis.set_ylabel("sliced Wasserstein distance of patches")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
