"""Quality for time: how far are the samples from the data, for each sampler and number of steps?

    python compare_samplers.py --checkpoint checkpoints/critters.pt       # an hour on two cores, minutes on a GPU

For a model of critters, since fresh ones, which it never saw, can be drawn to compare with. All samplers get the same
seeds and types, so that their differences are theirs alone. The plot, the table and every figure go to
outputs/samplers.png, .md and .json; a run that was stopped goes on with the settings that are missing in the .json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_model
from critters import TYPES, draw_critters
from devices import describe, memory_format, pick_device, pick_precision
from distances import sliced_wasserstein
from flags import Parser, natural, positive
from labels import multi_hot
from pictures import to_pixels
from reverse_diffusion import sample_seeds

HELD_OUT_SEED = 2_000_003  # of critters that no model was trained on
RUNS = {  # name -> (options of `sample`, steps)
    "ddpm": (dict(sampler="ddpm"), (20, 50, 100, 250, 1000)),
    "ddpm, beta": (dict(sampler="ddpm", variance="beta"), (50, 250, 1000)),
    "ddim": (dict(sampler="ddim"), (5, 10, 20, 50, 100)),
    "dpm++": (dict(sampler="dpm++"), (5, 10, 20, 50)),
}


def main() -> None:
    parser = Parser(description="Measure the distance of samples to unseen critters, for each sampler and steps.")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/critters.pt"), help="of a model of critters "
                        "(default: checkpoints/critters.pt)")
    parser.add_argument("--num_images", type=positive, default=256, help="samples for each setting (default: 256)")
    parser.add_argument("--seed", type=natural, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/samplers"), help="what the files' names begin with "
                        "(default: outputs/samplers)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, cpu, ... (default: auto)")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        precision = pick_precision("auto", device)
        model, scheduler, config = load_model(args.checkpoint, device)
        model.to(memory_format=memory_format(device))
        if config["types"] not in ((), TYPES):
            raise ValueError(f"{args.checkpoint} is not a model of critters; train one: python train.py --preset quick")
        args.output.parent.mkdir(parents=True, exist_ok=True)

        # Three sets of real pictures: one to compare all with, and another of the same size as the yardstick.
        drawn, labels = draw_critters(2 * args.num_images, config["image_size"], HELD_OUT_SEED)
        drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2)
        reference, other = drawn[: args.num_images], drawn[args.num_images :]
        types = torch.from_numpy(multi_hot(labels[: args.num_images], TYPES)).float() if config["types"] else None

        path = args.output.with_suffix(".json")
        made_with = dict(checkpoint=args.checkpoint.name, num_images=args.num_images, seed=args.seed)
        results = json.loads(path.read_text()) if path.exists() else {}
        if results.get("made_with", made_with) != made_with:
            raise ValueError(f"{path} is of {results['made_with']}; remove it, or give another --output")
        results = {"made_with": made_with, "device": f"{describe(device)}, {precision}", "rows": results.get("rows", [])}
        score = sliced_wasserstein(other, reference)["wasserstein"]
        results["yardstick"] = dict(distance=score.value, error=score.error)
        done = {(row["sampler"], row["steps"]) for row in results["rows"]}
        for name, (options, all_steps) in RUNS.items():
            for steps in all_steps:
                if (name, steps) in done:
                    continue
                began = time.monotonic()
                with tqdm(total=steps * -(-args.num_images // 64), desc=f"{name} {steps}", leave=False) as bar:
                    images = sample_seeds(
                        model, scheduler, range(args.seed, args.seed + args.num_images), config["image_size"], device,
                        precision, types=types, steps=steps, prediction=config["prediction"],
                        callback=lambda *_: bar.update(), **options,
                    )
                score = sliced_wasserstein(to_pixels(images), reference)["wasserstein"]
                results["rows"].append(dict(sampler=name, steps=steps, distance=score.value, error=score.error,
                                            seconds=round(time.monotonic() - began, 1)))
                path.write_text(json.dumps(results, indent=1))
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    table = as_table(results)
    args.output.with_suffix(".md").write_text(table + "\n")
    draw(results, args.output.with_suffix(".png"))
    print(f"{table}\nwrote {args.output}.json, .md and .png")


def as_table(results: dict) -> str:
    """A row for each setting, in Markdown."""
    lines = ["| sampler | steps | distance to unseen critters |", "| --- | --- | --- |"]
    for row in sorted(results["rows"], key=lambda row: (list(RUNS).index(row["sampler"]), row["steps"])):
        lines.append(f"| `{row['sampler']}` | {row['steps']} | {row['distance']:.4f} ± {row['error']:.4f} |")
    yardstick = results["yardstick"]
    return "\n".join([*lines, f"| other unseen critters | | {yardstick['distance']:.4f} ± {yardstick['error']:.4f} |"])


def draw(results: dict, path: Path) -> None:
    """Distance against steps, a curve for each sampler, with its standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in RUNS:
        rows = sorted((row for row in results["rows"] if row["sampler"] == name), key=lambda row: row["steps"])
        axis.errorbar([row["steps"] for row in rows], [row["distance"] for row in rows],
                      [row["error"] for row in rows], marker="o", capsize=3, label=name)
    axis.axhline(results["yardstick"]["distance"], color="black", linestyle=":", label="other unseen critters")
    axis.set_xscale("log")
    axis.set_xlabel("steps (network passes an image)")
    axis.set_ylabel("sliced Wasserstein distance of patches")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
