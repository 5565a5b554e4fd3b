"""From the files of a study to its tables: results.md for people, results.json for programs.

    write_results("study")        # in outputs/study/; also stages.png and training.gif of each long run

Every number is read from what train.py, generate.py and evaluate.py wrote. What has not been run yet is a dash.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.artifacts import find_artifacts
from evaluation.meanings import MEANINGS, format_figure
from reverse_diffusion import SAMPLERS
from tools.study.plan import ABLATIONS, LONG_RUNS, RUNS, milestone_epochs
from tools.study.plots import draw_plots
from training.run_dir import run_folder
from utils.files import read_json, write_json, write_text
from utils.tables import markdown_table

OVER_TIME = ("bits_train", "bits_held_out", "bits_gap", "copies", "precision", "recall", "coverage", "wasserstein",
             "wasserstein_fine")  # columns of a long run's table
COMPARED = ("bits_gap", "copies", "precision", "recall", "wasserstein", "wasserstein_fine", "tilt", "saturation",
            "clean")  # columns of the ablations' table
WITH_INTERVAL = ("bits_gap", "copies", "wasserstein", "tilt")  # results.json has the intervals of all
ARTIFACTS = {"black_corner": "black corners", "collapsed": "collapsed to black", "clean": "clean white background"}
PLOTS = {"stages.png": "the same noise after more and more epochs", "training.gif": "the training",
         "loss.png": "the loss", "ddpm.png": "ddpm, all steps", "types.png": "one row per type"}
NONE = "–"


def write_results(name: str) -> Path:
    """Read what a study has left so far, draw its plots, write results.json and results.md; return the latter's path.

    Raises:
        ValueError: for a damaged file.
    """
    folder = run_folder("outputs", name)
    results = {run: collect(folder / run) for run in RUNS if (folder / run).is_dir()}
    settings, progress = read_json(folder / "settings.json"), read_json(folder / "progress.json")
    for run, result in results.items():
        for sampler, counts in result["samples"].items():
            counts["seconds"] = progress.get(f"sample {run} {sampler}")
        if run in LONG_RUNS:
            draw_plots(folder / run, milestone_epochs(settings.get("epochs", 0)))
    write_json(folder / "results.json", dict(settings=settings, seconds=progress, runs=results))
    write_text(folder / "results.md", markdown(settings, results, folder))
    return folder / "results.md"


def collect(folder: Path) -> dict[str, Any]:
    """Return what a run's folder holds: cost, epochs, loss, the figures of each checkpoint, artifacts in samples."""
    # Training.
    rows = []
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["skipped"]]  # a kill can leave half a line

    # Samples.
    samples = {}
    for sampler in SAMPLERS:
        images = [np.asarray(Image.open(path)).copy() for path in sorted((folder / sampler).glob("*.png"))]
        if images:
            found = find_artifacts(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
            samples[sampler] = dict(number=len(images), **{name: int(has.sum()) for name, has in found.items()})

    report = read_json(folder / "evaluation/report.json")
    return dict(
        cost=read_json(folder / "cost.json"), epochs=int(rows[-1]["epoch"]) if rows else 0,
        loss=float(rows[-1]["loss"]) if rows else None, skipped=sum(int(row["skipped"]) for row in rows),
        evaluation=[{key: run[key] for key in ("epoch", "figures", "verdict")} for run in report.get("runs", [])],
        epoch_to_keep=report.get("epoch_to_keep", ""), samples=samples,
    )


# ---------------------------------------------------------------------------------------------------------------------
# tables


def markdown(settings: dict[str, Any], results: dict[str, dict], folder: Path) -> str:
    """Return the content of results.md."""
    flags = [f"`--{key} {value}`" for key, value in settings.items() if value != ""]
    sections = ["# Results of the study",
                f"Written by `python -m tools.study` with {', '.join(flags) or 'no settings'}.",
                "## Cost", cost_table(results)]
    if any(result["samples"] for result in results.values()):
        sections += ["## Final models, by sampler", sampler_table(results)]
    for run in LONG_RUNS:
        if run in results and results[run]["evaluation"]:
            sections += [f"## {run}: {RUNS[run]}", over_time_table(results[run]), results[run]["epoch_to_keep"],
                         "\n".join(f"- {line}" for line in results[run]["evaluation"][-1]["verdict"])]
    if any(run in results for run in ABLATIONS):
        sections += ["## Ablations", ablation_table(results)]
    for run in LONG_RUNS:
        sections += [f"![{run}: {caption}]({run}/{name})" for name, caption in PLOTS.items()
                     if (folder / run / name).exists()]
    return "\n\n".join(section for section in sections if section) + "\n"


def cost_table(results: dict[str, dict]) -> str:
    rows = []
    for run, about in RUNS.items():
        result = results.get(run, {})
        cost, cells = result.get("cost"), [NONE] * 3
        if cost:
            cells = [f"{cost['seconds'] / 60:.1f} min", f"{cost['images'] / cost['seconds']:,.0f}",
                     f"{cost['peak_memory'] / 2**30:.2f} GiB"]
        rows.append([run, about, str(result.get("epochs") or NONE), *cells])
    head = ["run", "configuration", "epochs", "time, with grids and saves", "images/s", "peak memory"]
    return markdown_table(head, rows)


def sampler_table(results: dict[str, dict]) -> str:
    rows = []
    for run, result in results.items():
        for sampler, counts in result["samples"].items():
            seconds = NONE if counts["seconds"] is None else f"{counts['seconds']:.0f} s"
            rows.append([run, f"`{sampler}`", *(str(counts[key]) for key in ("number", *ARTIFACTS)), seconds])
    return markdown_table(["run", "sampler", "samples", *ARTIFACTS.values(), "time, with start-up"], rows)


def over_time_table(result: dict[str, Any]) -> str:
    rows = [[str(checkpoint["epoch"]), *(cell(checkpoint["figures"], name) for name in OVER_TIME)]
            for checkpoint in result["evaluation"]]
    last = result["evaluation"][-1]["figures"]
    rows.append(["real images", *(cell(last, name, real=True) for name in OVER_TIME)])
    return markdown_table(["epoch", *(MEANINGS[name].heading for name in OVER_TIME)], rows)


def ablation_table(results: dict[str, dict]) -> str:
    rows = []
    for run in ABLATIONS:
        evaluation = results.get(run, {}).get("evaluation")
        figures = evaluation[-1]["figures"] if evaluation else {}
        rows.append([RUNS[run], *(cell(figures, name) for name in COMPARED)])
    return markdown_table(["change", *(MEANINGS[name].heading for name in COMPARED)], rows)


def cell(figures: dict[str, dict], name: str, real: bool = False) -> str:
    """Return a figure as "4.1 %" or "4.1 % (3.0 to 5.5)"; with `real`, that of real images in the samples' place."""
    figure = figures.get(name, {}).get("real") if real else figures.get(name)
    value, interval = format_figure(figure, MEANINGS[name].style)
    if not value:
        return NONE
    return f"{value} ({interval})" if interval and name in WITH_INTERVAL else value
