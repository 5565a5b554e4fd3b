"""From the files of a study to its tables and pictures; `reproduce.py` makes the files.

    write_results("study")        # results.md and results.json in outputs/study/, stages.png and a GIF for long runs

Every figure is read from what train.py, generate.py and evaluate.py wrote. What was not run, or not yet, is a dash.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from marks import marks
from pictures import grid, save_animation, save_picture
from report import MEANINGS, shown
from reverse_diffusion import SAMPLERS
from runs import run_folder

GRID = 64  # pictures in a sample grid, eight in a row
STAGES = (0.05, 0.15, 0.25, 0.5, 1)  # of the epochs, when checkpoints are kept and measured; and the first epoch
FIGURES = ("bits_train", "bits_held_out", "bits_gap", "copies", "precision", "recall", "coverage", "wasserstein",
           "wasserstein_fine")
SIGNS = ("bits_gap", "copies", "precision", "recall", "wasserstein", "wasserstein_fine", "tilt", "saturation", "clean")
WITH_INTERVAL = ("bits_gap", "copies", "wasserstein", "tilt")  # results.json has those of all
NONE = "–"
ABOUT = {  # the runs of a study
    "reference": "ε on the linear schedule, Adam at 1e-4",
    "improved": "v on the cosine schedule, min-SNR, types, a falling rate",
    "reference_holdout": "the reference, a tenth of the pictures kept aside",
    "improved_holdout": "the improved one, a tenth of the pictures kept aside",
    "short": "the improved one, shorter: what the changes below are compared with",
    "flips_alone": "augmentation: flips alone",
    "not_augmented": "no augmentation",
    "not_told": "the network is not told how its pictures were augmented",
    "not_averaged": "no moving average of the weights",
    "dropout": "dropout 0.1",
    "not_weighted": "all timesteps' errors count the same, without min-SNR",
}
LONG = tuple(ABOUT)[:4]
SHORT = tuple(ABOUT)[4:]


def stages(epochs: int) -> list[int]:
    """The epochs at which a long training is looked at, the last among them: of 2000, 1, 100, 300, 500, 1000, 2000."""
    return sorted({1, *(max(1, round(share * epochs)) for share in STAGES)})


def write_results(name: str) -> Path:
    """Read what a study has left so far, draw its pictures, write results.json and results.md; the latter's path."""
    folder = run_folder("outputs", name)
    results = {run: collect(folder / run) for run in ABOUT if (folder / run).is_dir()}
    settings, done = read(folder / "settings.json"), read(folder / "progress.json")
    for run, result in results.items():
        for sampler, of in result["samples"].items():
            of["seconds"] = done.get(f"sample {run} {sampler}")
        if run in LONG:
            draw_pictures(folder / run, stages(settings.get("epochs", 0)))
    folder.mkdir(parents=True, exist_ok=True)
    made = dict(settings=settings, seconds=done, runs=results)
    (folder / "results.json").write_text(json.dumps(made, indent=1) + "\n")
    path = folder / "results.md"
    path.write_text(markdown(settings, results, folder), encoding="utf-8")
    return path


def collect(folder: Path) -> dict:
    """What one run's folder holds: its cost, its epochs, the figures of each checkpoint, the marks of its samples."""
    rows = []
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    report = read(folder / "evaluation/report.json")
    samples = {}
    for sampler in SAMPLERS:
        pictures = [np.asarray(Image.open(path)).copy() for path in sorted((folder / sampler).glob("*.png"))]
        if pictures:
            found = marks(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
            samples[sampler] = dict(number=len(pictures), **{mark: int(has.sum()) for mark, has in found.items()})
    return dict(
        cost=read(folder / "cost.json"), epochs=int(rows[-1]["epoch"]) if rows else 0,
        loss=float(rows[-1]["loss"]) if rows else None, skipped=sum(int(row["skipped"]) for row in rows),
        evaluation=[{key: run[key] for key in ("epoch", "figures", "verdict")} for run in report.get("runs", [])],
        epoch_to_keep=report.get("epoch_to_keep", ""), samples=samples,
    )


def read(path: Path) -> dict:
    """A file of JSON; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# ---------------------------------------------------------------------------------------------------------------------
# tables


def markdown(settings: dict, results: dict[str, dict], folder: Path) -> str:
    """results.md: for a reader what results.json is for a program."""
    sections = ["# What the study measured", "Made by `reproduce.py` with " + (", ".join(
        f"`--{key} {value}`" for key, value in settings.items() if value != "") or "no settings") + ".",
        "## Cost", costs(results)]
    if any(result["samples"] for result in results.values()):
        sections += ["## The last weights, sampler by sampler", samplers(results)]
    if found := bars(results):
        sections += ["## What was asked", found]
    for run in LONG:
        if run in results and results[run]["evaluation"]:
            sections += [f"## {run}: {ABOUT[run]}", over_time(results[run]), results[run]["epoch_to_keep"]]
            sections += ["\n".join(f"- {line}" for line in results[run]["evaluation"][-1]["verdict"])]
    if any(run in results for run in SHORT):
        sections += ["## One change each", ablations(results)]
    sections += ["## What the original speaks of, and what was measured", claims(settings, results)]
    for run in LONG:
        names = {"stages.png": "the same noise after more and more epochs", "training.gif": "the training",
                 "loss.png": "the loss", "ddpm.png": "ddpm, all of the steps", "types.png": "a row a type"}
        names = {name: what for name, what in names.items() if (folder / run / name).exists()}
        sections += [f"![{run}: {what}]({run}/{name})" for name, what in names.items()]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def costs(results: dict[str, dict]) -> str:
    rows = []
    for run, about in ABOUT.items():
        result = results.get(run, {})
        cost = result.get("cost") or {}
        rows.append([run, about, str(result.get("epochs") or NONE)] + ([
            f"{cost['seconds'] / 60:.1f} min", f"{cost['images'] / cost['seconds']:,.0f}",
            f"{cost['peak_memory'] / 2**30:.2f} GiB"] if cost else [NONE] * 3))
    return table(["run", "what it is", "epochs", "time, with grids and saves", "images a second", "peak memory"], rows)


def samplers(results: dict[str, dict]) -> str:
    rows = [[run, f"`{sampler}`", *(str(of[key]) for key in ("number", "black_corner", "collapsed", "clean")),
             f"{of['seconds']:.0f} s" if of["seconds"] is not None else NONE]
            for run, result in results.items() for sampler, of in result["samples"].items()]
    return table(["run", "sampler", "samples", "black corners", "collapsed to black", "clean white background",
                  "time, with the start"], rows)


def bars(results: dict[str, dict]) -> str:
    """What was asked of the two long trainings, and whether it was reached."""
    rows = []
    for run in LONG[:2]:
        for sampler, of in results.get(run, {}).get("samples", {}).items():
            good = of["number"] == GRID and not of["black_corner"] and not of["collapsed"] and of["clean"] >= 62
            found = f"{of['black_corner']}, {of['collapsed']}, {of['clean']} of {of['number']}"
            rows.append([f"{run}, `{sampler}`: of {GRID} samples no black corners, no collapse, 62 clean", found,
                         "yes" if good else "no"])
    cost = results.get("reference", {}).get("cost")
    if cost:
        minutes = cost["seconds"] / 60
        rows.append(["reference: under 15 minutes on an H200", f"{minutes:.1f} min for {cost['images']:,} images",
                     "yes" if minutes < 15 else "no"])
    return table(["asked", "measured", "reached"], rows) if rows else ""


def over_time(result: dict) -> str:
    rows = [[str(at["epoch"]), *(cell(at["figures"], name) for name in FIGURES)] for at in result["evaluation"]]
    last = result["evaluation"][-1]["figures"]
    rows.append(["real pictures", *(cell(last, name, real=True) for name in FIGURES)])
    return table(["epoch", *(MEANINGS[name][0] for name in FIGURES)], rows)


def ablations(results: dict[str, dict]) -> str:
    rows = []
    for run in SHORT:
        of = results.get(run, {}).get("evaluation") or [{"figures": {}}]
        rows.append([ABOUT[run], *(cell(of[-1]["figures"], name) for name in SIGNS)])
    return table(["change", *(MEANINGS[name][0] for name in SIGNS)], rows)


def cell(figures: dict, name: str, real: bool = False) -> str:
    """One figure as "4.1 %" or "4.1 % (3.0 to 5.5)", or that of real pictures in the samples' place."""
    figure = figures.get(name, {}).get("real") if real else figures.get(name)
    if not figure:
        return NONE
    value, interval = shown(figure, MEANINGS[name][1])
    return f"{value} ({interval})" if interval and name in WITH_INTERVAL else value


def claims(settings: dict, results: dict[str, dict]) -> str:
    """What the README of the original claims or leaves open, and what the reference configuration showed here."""
    run, held = results.get("reference", {}), results.get("reference_holdout", {})
    at = {of["epoch"]: of["figures"] for of in run.get("evaluation", [])}
    last = at[max(at)] if at else {}

    def say(figures: dict, *names: str) -> str:
        return "; ".join(f"{MEANINGS[name][0]} {cell(figures, name)}" for name in names if name in figures)

    cost = run.get("cost")
    half = at.get(round(settings.get("epochs", 0) / 2), {})
    gap = (held.get("evaluation") or [{"figures": {}}])[-1]["figures"]
    rows = [
        ["time (\"~X hours\")", f"{cost['seconds'] / 60:.1f} min for {run['epochs']} epochs" if cost else ""],
        ["quality (\"high quality\")", say(last, "precision", "wasserstein_fine", "clean")],
        ["stages of learning at epochs 100, 300, 500 and 1000 to 2000",
         "; ".join(f"epoch {epoch}: {found}" for epoch, of in sorted(at.items()) if (found := say(of, "wasserstein")))],
        ["diversity", say(last, "recall", "coverage")],
        ["memorisation", "; ".join(filter(None, (say(last, "copies"), say(gap, "bits_gap"))))],
        ["its published grid of epoch 1000: of 64, 53 with black corners, 10 collapsed, 1 clean",
         say(half, "black_corner", "collapsed", "clean")],
    ]
    return table(["the original", "the reference configuration, here"], [[what, found or NONE] for what, found in rows])


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def draw_pictures(folder: Path, epochs: list[int]) -> None:
    """stages.png, a row for each of these epochs, and training.gif, from a run's sample grids, all of one noise."""
    grids = {int(re.fullmatch(r"generated_epoch_(\d+)\.png", path.name)[1]): path
             for path in sorted(folder.glob("generated_epoch_*.png"))}
    if epochs := [epoch for epoch in epochs if epoch in grids]:
        rows = torch.cat([cells(grids[epoch])[:8] for epoch in epochs])
        save_picture(grid(rows, 8, enlargement(rows), [f"epoch {epoch}" for epoch in epochs]), folder / "stages.png")
    if len(grids) > 1:
        frames = []
        for epoch, path in grids.items():
            pictures = cells(path)[:16]
            sheet = grid(pictures, 4, enlargement(pictures))
            frame = Image.new("RGB", (sheet.width, sheet.height + 20), "white")
            frame.paste(sheet, (0, 20))
            font = ImageFont.load_default(size=14)
            ImageDraw.Draw(frame).text((4, 2), f"epoch {epoch}", fill=(40, 40, 40), font=font)
            frames.append(frame)
        save_animation(frames, folder / "training.gif", seconds=0.15 * len(frames))


def cells(path: Path) -> torch.Tensor:
    """The pictures of a sample grid, uint8 [64, 3, S, S]; between them lie two white pixels."""
    sheet = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())[2:, 2:]
    side = len(sheet) // 8
    return sheet.view(8, side, 8, side, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)[..., :-2, :-2]


def enlargement(pictures: torch.Tensor) -> int:
    """So that small pictures can be seen."""
    return max(1, 64 // pictures.shape[-1])
