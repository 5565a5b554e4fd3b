"""Compare samplers: distance of the samples to real images, for each sampler and number of steps.

    python -m tools.compare_samplers --checkpoint checkpoints/critters.pt    # an hour on two cores, minutes on a GPU
    python -m tools.compare_samplers --checkpoint BEFORE.pt --tuned AFTER.pt # few steps, before and after tuning

Needs a model of critters, because critters that it was not trained on can be drawn in any number. Sample i has the
types of unseen critter i and the same seed with every sampler, so that the difference between two samplers has a
smaller error than either distance, most of which comes from the choice of critters. With --tuned, the few steps of a
tuned model are compared with those of the model it was tuned from. Writes outputs/samplers.png (plot), .md (table) and
.json (all values). A run that was stopped continues with what is missing in the .json.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from critters import TYPES, UNSEEN_SEEDS, draw_critter, unseen_critters
from evaluation.distances import sliced_wasserstein
from evaluation.error_bars import jackknife_error
from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS
from utils.cli import device_setting, parse, seed_setting, setting
from utils.device import describe_device, pick_device
from utils.errors import one_line_errors, printable
from utils.files import write_json, write_text
from utils.images import to_uint8
from utils.plots import result_plot
from utils.tables import markdown_table

GROUPS = 8  # of the jackknife
BATCH_SIZE = 64


@dataclass(frozen=True)
class Variant:
    """A curve of the comparison: a sampler with options, and the numbers of steps to measure."""

    name: str
    sampler: str
    steps: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


# Every sampler of the registry is compared, in these numbers of steps ...
DEFAULT_STEPS = (10, 20, 50)
STEPS = {"ddpm": (20, 50, 100, 1000), "ddim": (5, 10, 20, 50, 100), "dpm++": (5, 10, 20, 50)}
# ... and some of them with other options.
VARIANTS = (Variant("ddpm, beta", "ddpm", (50, 100), dict(variance="beta")),)
BASELINE = ("ddpm", 1000)  # the differences in the table are to this one

# With --tuned these curves are compared, and these pairs of their points.
FEW_STEPS = (Variant("consistency", "consistency", (1, 2, 4)), Variant("sde-dpm++", "sde-dpm++", (2, 4, 8, 20)),
             Variant("sde-dpm++, guidance 3", "sde-dpm++", (4, 8, 20), dict(guidance=3.0)))
FEW_STEPS_BASELINE = ("sde-dpm++", 20)
PAIRS = ((("consistency", 2), ("sde-dpm++", 8)), (("consistency", 4), ("sde-dpm++", 20)),
         (("consistency", 4), ("sde-dpm++, guidance 3", 20)))


@dataclass
class Settings:
    """The flags of this command."""

    checkpoint: str = setting("checkpoints/critters.pt", "checkpoint of a model of critters")
    tuned: str = setting("", "checkpoint of the same model tuned to few steps: compare few steps of both (default: "
                             "compare the samplers of an untuned model)")
    num_images: int = setting(192, "samples for each sampler and number of steps", least=64)
    seed: int = seed_setting("seed of the first sample; the others follow")
    output: str = setting("outputs/samplers", "path of the files to write, without suffix")
    device: str = device_setting()


def main() -> None:
    with one_line_errors(out_of_memory="give a smaller --num_images"):
        settings = parse(Settings, "Measure the distance of samples to unseen critters, for each sampler and number of "
                         "steps.", prog="python -m tools.compare_samplers")
        pipeline = Pipeline.load(settings.checkpoint, pick_device(settings.device))
        variants = FEW_STEPS if settings.tuned else compared_variants()
        check(settings.checkpoint, pipeline, variants)
        pipelines = {False: pipeline}  # by whether they are tuned
        if settings.tuned:
            pipelines[True] = Pipeline.load(settings.tuned, pick_device(settings.device))
            check(settings.tuned, pipelines[True], variants, tuned=True)
        output = Path(settings.output)
        results = load_results(output.with_suffix(".json"), settings, pipeline)

        # Real images: a set to compare with, and another of the same types, whose distance is the best to hope for.
        reference, types = unseen_critters("samplers", settings.num_images, pipeline.image_size)
        other = [np.asarray(draw_critter(i, pipeline.image_size, UNSEEN_SEEDS["samplers"] + 1, names)[0])
                 for i, names in enumerate(types)]
        reference = torch.from_numpy(reference).permute(0, 3, 1, 2)
        other = torch.from_numpy(np.stack(other)).permute(0, 3, 1, 2)

        # Measure what is missing.
        results["real"] = paired_distances(other, reference)
        measured = {(row["sampler"], row["steps"]) for row in results["rows"]}
        for variant in variants:
            drawn_by = pipelines[SAMPLERS[variant.sampler].tuned]
            for steps in variant.steps:
                if (variant.name, steps) not in measured:
                    row = measure(drawn_by, variant, steps, settings, drawn_by.class_labels(types), reference)
                    results["rows"].append(row)
                    write_json(output.with_suffix(".json"), results)

        # Report.
        table = as_table(results, variants, FEW_STEPS_BASELINE if settings.tuned else BASELINE)
        if settings.tuned:
            table += "\n\n" + "\n".join(compare_pair(results, *pair) for pair in PAIRS)
        write_text(output.with_suffix(".md"), table + "\n")
        draw_plot(results, variants, output.with_suffix(".png"))
        print(table)
        print(printable(f"wrote {output.with_suffix('.json')}, .md and .png"))


def check(path: str, pipeline: Pipeline, variants: Sequence[Variant], tuned: bool = False) -> None:
    """Raise ValueError for a model of something else, that cannot be drawn so, or tuned where it should not be."""
    if sorted(pipeline.class_names) != sorted(TYPES):
        raise ValueError(f"{path} is not a model of critters with their types; train one: python train.py --preset "
                         f"quick")
    if pipeline.tuned != tuned:
        raise ValueError(f"{path} is {'not ' if tuned else ''}tuned to few steps: --checkpoint takes the model before, "
                         f"--tuned the one after")
    if not tuned and not pipeline.guides and any("guidance" in variant.options for variant in variants):
        raise ValueError(f"{path} cannot be drawn with guidance, which is compared; choose one that was trained with "
                         f"--guide_at or --label_dropout above 0")
    most = max(max(variant.steps) for variant in variants)
    if most > pipeline.scheduler.num_timesteps:
        raise ValueError(f"{path} has {pipeline.scheduler.num_timesteps} timesteps, and {most} steps are compared; "
                         f"choose a model with more")


def compared_variants() -> list[Variant]:
    """Return all curves of the comparison: each sampler of untuned models, followed by its variants."""
    curves = []
    for name in (name for name in SAMPLERS if not SAMPLERS[name].tuned):
        curves.append(Variant(name, name, STEPS.get(name, DEFAULT_STEPS)))
        curves += [variant for variant in VARIANTS if variant.sampler == name]
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# measurements


def load_results(path: Path, settings: Settings, pipeline: Pipeline) -> dict:
    """Read the results of an earlier run, or return empty ones.

    Raises:
        ValueError: if they are of another model or other settings, or the file is damaged.
    """
    made_with = dict(checkpoint=Path(settings.checkpoint).name, num_images=settings.num_images, seed=settings.seed,
                     sha256=sha256_of(settings.checkpoint), precision=pipeline.precision)
    if settings.tuned:
        made_with["tuned"] = sha256_of(settings.tuned)
    rows = []
    if path.exists():
        try:
            earlier = json.loads(path.read_text())
            earlier_made_with = earlier["made_with"]
            rows = [{name: row[name] for name in ("sampler", "steps", "seconds", "distances")}
                    for row in earlier["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; remove it, or give another --output") from error
        if earlier_made_with != made_with:
            raise ValueError(f"{path} is of {earlier_made_with}; remove it, or give another --output")
    return dict(made_with=made_with, device=f"{describe_device(pipeline.device)}, {pipeline.precision}", rows=rows)


def sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def measure(pipeline: Pipeline, variant: Variant, steps: int, settings: Settings, labels: torch.Tensor,
            reference: torch.Tensor) -> dict:
    """Draw samples and measure their distance to the reference: a row of the results."""
    start = time.monotonic()
    seeds = range(settings.seed, settings.seed + settings.num_images)
    passes = steps * math.ceil(len(seeds) / BATCH_SIZE)
    with tqdm(total=passes, desc=f"{variant.name} {steps}", leave=False) as bar:
        images = pipeline.sample(seeds, labels=labels, sampler=variant.sampler, steps=steps, batch_size=BATCH_SIZE,
                                 callback=lambda *_: bar.update(), **variant.options)
    seconds = round(time.monotonic() - start, 1)
    return dict(sampler=variant.name, steps=steps, seconds=seconds,
                distances=paired_distances(to_uint8(images), reference))


def paired_distances(samples: torch.Tensor, images: torch.Tensor) -> list[float]:
    """Return the distance of two sets, uint8 [N, 3, S, S], then without each of GROUPS groups of pairs."""
    group = torch.arange(len(samples)) * GROUPS // len(samples)
    masks = [group >= 0, *(group != left_out for left_out in range(GROUPS))]
    return [sliced_wasserstein(samples[keep], images[keep])["wasserstein"].value for keep in masks]


def with_error(distances: Sequence[float]) -> tuple[float, float]:
    """Return the distance of the whole sets and its standard error, from the result of `paired_distances`."""
    return distances[0], jackknife_error(distances[1:]).item()


# ---------------------------------------------------------------------------------------------------------------------
# report


def distances_of(results: dict) -> dict[tuple[str, int], list[float]]:
    """Return the `paired_distances` of each sampler and number of steps."""
    return {(row["sampler"], row["steps"]): row["distances"] for row in results["rows"]}


def compare_pair(results: dict, ours: tuple[str, int], theirs: tuple[str, int]) -> str:
    """Return a line with the difference of two distances, and its error."""
    distances = distances_of(results)
    difference, error = with_error(np.subtract(distances[ours], distances[theirs]))
    return f"- `{ours[0]}` in {ours[1]} minus `{theirs[0]}` in {theirs[1]}: {difference:+.4f} ± {error:.4f}"


def as_table(results: dict, variants: Sequence[Variant], baseline: tuple[str, int]) -> str:
    """Return a Markdown table with a row for each sampler and number of steps, and its difference to the baseline."""
    distances = distances_of(results)
    sampler, steps = baseline
    head = ["sampler", "steps", "distance to unseen critters", f"difference to `{sampler}` in {steps} steps"]
    rows = []
    for variant in variants:
        for steps in variant.steps:
            measured = distances[variant.name, steps]
            value, error = with_error(measured)
            difference, difference_error = with_error(np.subtract(measured, distances[baseline]))
            rows.append([f"`{variant.name}`", str(steps), f"{value:.4f} ± {error:.4f}",
                         f"{difference:+.4f} ± {difference_error:.4f}"])
    value, error = with_error(results["real"])
    return markdown_table(head, [*rows, ["other unseen critters", "", f"{value:.4f} ± {error:.4f}", ""]])


def draw_plot(results: dict, variants: Sequence[Variant], path: Path) -> None:
    """Plot distance against steps, a curve for each sampler, with standard errors."""
    with result_plot(path, 7, 4) as figure:
        axis = figure.subplots()
        for variant in variants:
            rows = [row for row in results["rows"] if row["sampler"] == variant.name]
            rows.sort(key=lambda row: row["steps"])
            values, errors = zip(*(with_error(row["distances"]) for row in rows))
            axis.errorbar([row["steps"] for row in rows], values, errors, marker="o", capsize=3, label=variant.name)
        axis.axhline(with_error(results["real"])[0], color="black", linestyle=":", label="other unseen critters")
        axis.set_xscale("log")
        axis.set_xlabel("steps (each a network pass for each image; two with guidance)")
        axis.set_ylabel("sliced Wasserstein distance of patches")
        axis.grid(alpha=0.3, which="both")
        axis.legend()


if __name__ == "__main__":
    main()
