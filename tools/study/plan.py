"""The study's plan: which models are trained, sampled and evaluated, with which commands, in which order."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from reverse_diffusion import SAMPLERS
from training.run_dir import run_folder

# The improved configuration is the one of README.md's results. Its learning rate, 2e-4 decaying to 0 along a cosine,
# has the same mean as the reference's constant 1e-4.
CONFIGURATIONS = {
    "reference": "--labels none",
    "improved": "--prediction v --schedule cosine --loss_weighting min_snr --lr 2e-4 --lr_schedule cosine "
                "--warmup_steps 200",
}
# Each ablation is the improved configuration in a shorter training with one change; "short" is the baseline.
ABLATIONS = {
    "short": "",
    "flips_alone": "--augment flip",
    "not_augmented": "--augment none",
    "not_averaged": "--ema_decay 0",
    "dropout": "--dropout 0.1",
    "not_weighted": "--loss_weighting uniform",
}
HOLDOUT = "--holdout 0.1"
GROUPS = {"holdout": ("reference_holdout", "improved_holdout"), "ablations": tuple(ABLATIONS)}
KINDS = ("train", "sample", "evaluate")

RUNS = {  # every training of a study, and its description in the tables
    "reference": "ε on the linear schedule, Adam at 1e-4",
    "improved": "v on the cosine schedule, min-SNR, types, decaying learning rate",
    "reference_holdout": "reference, a tenth of the images held out",
    "improved_holdout": "improved, a tenth of the images held out",
    "short": "improved, fewer epochs: the baseline of the rows below",
    "flips_alone": "augmentation: flips only",
    "not_augmented": "no augmentation",
    "not_averaged": "no moving average of the weights",
    "dropout": "dropout 0.1",
    "not_weighted": "uniform loss weighting instead of min-SNR",
}
LONG_RUNS = tuple(run for run in RUNS if run not in ABLATIONS)

GRID_SIZE = 64  # images in a sample grid
MILESTONES = (0.05, 0.15, 0.25, 0.5, 1)  # fractions of the epochs after which a long run is evaluated


@dataclass(frozen=True)
class Study:
    """The settings of a study, which stay with it in settings.json. The defaults are those of the full study."""

    data: str = "data/pokemon_jpg"
    labels: str = "auto"
    epochs: int = 2000
    ablation_epochs: int = 300
    num_samples: int = 1000
    sample_steps: int = 100
    train: str = ""


REHEARSAL = Study(
    data="critters", epochs=40, ablation_epochs=10, num_samples=60, sample_steps=20,
    train="--num_critters 200 --image_size 16 --width 16 --groups 8 --multipliers 1 2 --blocks 1 --lr 2e-3 "
          "--ema_decay 0.99 --sample_steps 20",
)


@dataclass(frozen=True)
class Job:
    """One command of the study.

    Attributes:
        kind: one of KINDS.
        run: the training it belongs to.
        command: a script of the repository's root and its flags.
        detail: distinguishes the jobs of one kind and run.
        creates: the file whose presence marks the job as done; None: progress.json records it.
        needs: the checkpoint without which the job cannot run.
    """

    kind: str
    run: str
    command: list[str]
    detail: str = ""
    creates: Path | None = None
    needs: Path | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.run, self.detail)))


def plan(name: str, study: Study) -> list[Job]:
    """Return the jobs of a study, the most important first; the slow evaluations wait for the two main trainings."""
    jobs = [train_job(name, study, run) for run in CONFIGURATIONS]
    jobs += [job for run in CONFIGURATIONS for job in sample_jobs(name, study, run)]
    jobs += [evaluate_job(name, study, run) for run in CONFIGURATIONS]
    for runs in GROUPS.values():
        jobs += [train_job(name, study, run) for run in runs]
        jobs += [evaluate_job(name, study, run) for run in runs]
    return jobs


def train_job(name: str, study: Study, run: str) -> Job:
    """Return the job that trains one model."""
    is_short = run in ABLATIONS
    epochs = study.ablation_epochs if is_short else study.epochs
    command = ["train.py", "--data", study.data]
    # --train comes after the configuration, which it may change, and before what distinguishes this run.
    command += shlex.split(f"{configuration(study, run)} {study.train} {ABLATIONS.get(run, '')}")
    if is_short or run in GROUPS["holdout"]:
        command += HOLDOUT.split()
    command += ["--epochs", str(epochs)]
    if not is_short:
        command += ["--milestones", *map(str, milestone_epochs(epochs)[:-1])]
    command += ["--milestone_every", str(epochs), "--sample_every", str(max(1, epochs // (4 if is_short else 40))),
                "--num_samples", str(GRID_SIZE), "--save_every", "3", "--run_name", f"{name}/{run}"]
    return Job("train", run, command, creates=final_model(name, run))


def sample_jobs(name: str, study: Study, run: str) -> list[Job]:
    """Return the jobs that draw a grid with each sampler, in its default number of steps, and one of each type."""
    flags = {name: ["--num_images", str(GRID_SIZE), "--individual", "--sampler", name]
             for name, sampler in SAMPLERS.items() if not sampler.tuned}
    if "--labels none" not in configuration(study, run):
        flags["types"] = ["--types", "all", "--sampler", "ddpm"]
    checkpoint, folder = final_model(name, run), run_folder("outputs", f"{name}/{run}")
    return [Job("sample", run, ["generate.py", "--checkpoint", str(checkpoint), *sampler_flags,
                                "--output", str(folder / f"{detail}.png")], detail, needs=checkpoint)
            for detail, sampler_flags in flags.items()]


def evaluate_job(name: str, study: Study, run: str) -> Job:
    """Return the job that evaluates a model: a long run at each of its milestones, an ablation at its end."""
    epochs = [] if run in ABLATIONS else milestone_epochs(study.epochs)[:-1]
    final, folder = final_model(name, run), run_folder("outputs", f"{name}/{run}")
    checkpoints = [final.with_name(f"epoch_{epoch:04d}.pt") for epoch in epochs] + [final]
    command = ["evaluate.py", "--checkpoint", *map(str, checkpoints), "--sampler", "ddpm",
               "--num_samples", str(study.num_samples), "--steps", str(study.sample_steps),
               "--output", str(folder / "evaluation")]
    return Job("evaluate", run, command, needs=final)


def configuration(study: Study, run: str) -> str:
    """Return the flags of a run's configuration, without the change that an ablation makes."""
    flags = CONFIGURATIONS["reference" if run.startswith("reference") else "improved"]
    return flags if "--labels" in flags else f"--labels {shlex.quote(study.labels)} {flags}"


def milestone_epochs(epochs: int) -> list[int]:
    """Return the epochs at which a long run is evaluated: the first, then MILESTONES.

    Of 2000 epochs these are 1, 100, 300, 500, 1000 and 2000.
    """
    return sorted({1, *(max(1, round(fraction * epochs)) for fraction in MILESTONES)})


def final_model(name: str, run: str) -> Path:
    """Return the path of a run's final checkpoint."""
    return run_folder("checkpoints", f"{name}/{run}") / "final_model.pt"


def is_selected(job: Job, words: tuple[str, ...]) -> bool:
    """Return whether --only selects this job. Words are runs, groups of runs, and kinds of work; none select all."""
    kinds = {word for word in words if word in KINDS}
    runs = {run for word in words if word not in KINDS for run in GROUPS.get(word, (word,))}
    return (not kinds or job.kind in kinds) and (not runs or job.run in runs)
