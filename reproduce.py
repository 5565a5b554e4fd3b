"""The whole study in one command: the reference configuration to its end, the improved one, and one change at a time.

    python reproduce.py                                      # all of it; the same line again goes on after any stop
    python reproduce.py --plan                               # what it would run, in which order, and what is done
    python reproduce.py --only reference train --minutes 9   # a piece of it, stopped and saved after nine minutes
    python reproduce.py --rehearse                           # all of it in small, on critters: minutes on a CPU

It calls train.py, generate.py and evaluate.py as a user would, the most important first, and then writes what there is
to outputs/study/: results.md and results.json (see results.py), to which nothing is carried over by hand.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dataset import DataError, image_names
from flags import Parser, finite, positive
from labels import LabelError, find_labels
from results import GRID, stages, write_results
from reverse_diffusion import SAMPLERS
from runs import milestones, run_folder

HERE = Path(__file__).resolve().parent

# What is trained. The improved configuration is what README.md's results speak for: v on the cosine schedule with
# min-SNR, a short rise and a falling rate. A rate of 2e-4 that falls to 0 along a cosine is the reference's on average.
CONFIGURATIONS = {
    "reference": "--labels none",
    "improved": "--prediction v --schedule cosine --loss_weighting min_snr --lr 2e-4 --lr_schedule cosine "
                "--warmup_steps 200",
}
# Each is the improved configuration in a shorter training, with one change; "short" is without any, to compare with.
ABLATIONS = {
    "short": "",
    "flips_alone": "--augment flip",
    "not_augmented": "--augment none",
    "not_told": "--augment untold",
    "not_averaged": "--ema_decay 0",
    "dropout": "--dropout 0.1",
    "not_weighted": "--loss_weighting uniform",
}
HOLDOUT = "--holdout 0.1"
GROUPS = {"holdout": ("reference_holdout", "improved_holdout"), "ablations": tuple(ABLATIONS)}
KINDS = ("train", "sample", "evaluate")

SETTINGS = dict(data="data/pokemon_jpg", labels="auto", epochs=2000, ablation_epochs=300, num_samples=1000,
                sample_steps=100, train="")
REHEARSAL = dict(data="critters", labels="auto", epochs=40, ablation_epochs=10, num_samples=60, sample_steps=20,
                 train="--num_critters 200 --image_size 16 --width 16 --groups 8 --multipliers 1 2 --blocks 1 "
                       "--lr 2e-3 --ema_decay 0.99 --sample_steps 20")


@dataclass
class Job:
    """One command. It is done when its file is there, or, without a file, when progress.json says so."""

    kind: str
    run: str
    command: list[str]
    file: Path | None = None
    needs: Path | None = None

    @property
    def name(self) -> str:
        return " ".join([self.kind, self.run, *([Path(self.command[-1]).stem] if self.kind == "sample" else [])])


def main() -> None:
    args = parse_flags()
    try:
        settings = settle(args)
        jobs = plan(args.name, settings)
        if args.plan:
            done = progress(args.name)
            for job in jobs:
                print(f"[{'x' if is_done(job, done) else ' '}] {shlex.join(['python', *job.command])}")
            return
        signal.signal(signal.SIGTERM, interrupt)
        status = carry_out(args.name, [job for job in jobs if chosen(job, args.only)], args.minutes)
    except (ValueError, DataError, LabelError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


def settle(args) -> dict:
    """The settings of the study: those that it was begun with, or what the flags say. They stay with it, in a file.

    Raises:
        ValueError: for flags other than those that it was begun with, and for data without types.
    """
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    path = run_folder("outputs", args.name) / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        wrong = [f"--{name} {before[name]}" for name in given if given[name] != before[name]]
        if wrong:
            raise ValueError(f"the study in {path.parent}/ was begun with {', '.join(wrong)}: leave these flags out, "
                             f"or give another one its own --name")
        return before
    settings = {**(REHEARSAL if args.rehearse else SETTINGS), **given}
    names = image_names(settings["data"])
    if settings["data"] != "critters" and settings["labels"] != "none" and (
            not find_labels(settings["data"], names, settings["labels"])):
        raise ValueError(f"the pictures in {settings['data']} have no types: put a labels.csv there, name one with "
                         f"--labels, or say --labels none")
    if not args.plan:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n")
    return settings


def plan(name: str, settings: dict) -> list[Job]:
    """All of the study, the most important first, and nothing slow between the two trainings that matter most."""
    flags, epochs = {}, settings["epochs"]
    for run, configuration in CONFIGURATIONS.items():
        labels = "" if "--labels" in configuration else f"--labels {shlex.quote(settings['labels'])} "
        flags[run] = flags[f"{run}_holdout"] = labels + configuration
    flags |= dict.fromkeys(ABLATIONS, flags["improved"])

    def train(run: str) -> Job:
        short, change = run in ABLATIONS, ABLATIONS.get(run, "")
        length = settings["ablation_epochs"] if short else epochs
        kept = [] if short else ["--milestones", *map(str, stages(epochs)[:-1])]
        # --train comes after the configuration, so that it can change it, and before what makes this run what it is.
        command = ["train.py", "--data", settings["data"],
                   *shlex.split(f"{flags[run]} {settings['train']} {change}"),
                   *shlex.split(HOLDOUT if short or run.endswith("_holdout") else ""),
                   "--epochs", str(length), *kept, "--milestone_every", str(length),
                   "--sample_every", str(max(1, length // (4 if short else 40))), "--num_samples", str(GRID),
                   "--save_every", "3", "--run_name", f"{name}/{run}"]
        return Job("train", run, command, file=weights(name, run))

    def sample(run: str) -> list[Job]:
        # In generate.py's own numbers of steps: all of ddpm, 50 of ddim, 20 of the others.
        ways = [(which, f"--num_images {GRID} --individual --sampler {which}") for which in SAMPLERS]
        if "--labels none" not in flags[run]:
            ways.append(("types", "--types all --sampler ddpm"))
        return [Job("sample", run, ["generate.py", "--checkpoint", str(weights(name, run)), *how.split(),
                                    "--output", str(run_folder("outputs", f"{name}/{run}") / f"{which}.png")],
                    needs=weights(name, run)) for which, how in ways]

    def evaluate(run: str) -> Job:
        kept = [] if run in ABLATIONS else [run_folder("checkpoints", f"{name}/{run}") / f"epoch_{epoch:04d}.pt"
                                            for epoch in stages(epochs)[:-1]]
        command = ["evaluate.py", "--checkpoint", *map(str, kept), str(weights(name, run)), "--sampler", "ddpm",
                   "--num_samples", str(settings["num_samples"]), "--steps", str(settings["sample_steps"]),
                   "--output", str(run_folder("outputs", f"{name}/{run}") / "evaluation")]
        return Job("evaluate", run, command, needs=weights(name, run))

    jobs = [train(run) for run in CONFIGURATIONS]
    jobs += [job for run in CONFIGURATIONS for job in sample(run)]
    jobs += [evaluate(run) for run in CONFIGURATIONS]
    for group in GROUPS.values():
        jobs += [train(run) for run in group] + [evaluate(run) for run in group]
    return jobs


def weights(name: str, run: str) -> Path:
    return run_folder("checkpoints", f"{name}/{run}") / "final_model.pt"


def chosen(job: Job, words: list[str] | None) -> bool:
    """Does --only name this job? Of its words some are runs, or groups of them, and some kinds of work."""
    kinds = [word for word in words or () if word in KINDS]
    runs = {run for word in words or () if word not in KINDS for run in GROUPS.get(word, (word,))}
    return (not kinds or job.kind in kinds) and (not runs or job.run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# carrying it out


def progress(name: str) -> dict[str, float]:
    """The jobs that are done, but for the trainings, with the seconds that they took."""
    path = run_folder("outputs", name) / "progress.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(job: Job, done: dict[str, float]) -> bool:
    return job.file.exists() if job.file else job.name in done


def carry_out(name: str, jobs: list[Job], minutes: float) -> int:
    """Run what is not done, then write the results. The exit status: 0, 1 after a failure, 124 when time was up."""
    deadline = time.monotonic() + 60 * minutes if minutes else None
    failed, done, status = [], progress(name), 0
    folder = run_folder("outputs", name)
    try:
        for number, job in enumerate(jobs, 1):
            if is_done(job, done):
                continue
            if job.needs and not job.needs.exists():
                print(f"[{number}/{len(jobs)}] {job.name}: not possible yet, without {job.needs}")
                continue
            if deadline and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(job.command, 60 * minutes)
            command = to_go_on(job, name)
            print(f"[{number}/{len(jobs)}] {job.name}: {shlex.join(['python', *command])}", flush=True)
            started = time.monotonic()
            if run_script(command, deadline):
                failed.append(job.name)  # its own line says why; what does not need it goes on
            elif not job.file:
                done[job.name] = round(time.monotonic() - started, 1)
                temporary = folder / ".progress.json"
                temporary.write_text(json.dumps(done, indent=1) + "\n")
                temporary.replace(folder / "progress.json")
    except subprocess.TimeoutExpired:
        print(f"stopped after {minutes:g} minutes; the same command goes on from here")
        status = 124  # as timeout(1) has it
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        status = 130
    print(f"wrote {write_results(name)}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} failed, as they say above: {', '.join(failed)}", file=sys.stderr)
    return status or int(bool(failed))


def to_go_on(job: Job, name: str) -> list[str]:
    """The command of a job, or that which goes on with a training that was begun."""
    if job.kind == "evaluate":  # whatever became of a milestone, the others can be measured
        lost = [word for word in job.command if word.endswith(".pt") and not Path(word).exists()]
        if lost:
            print(f"warning: {job.name} does without {', '.join(lost)}, which is not there", file=sys.stderr)
        return [word for word in job.command if word not in lost]
    if job.kind != "train":
        return job.command
    folder = run_folder("checkpoints", f"{name}/{job.run}")
    if (folder / "latest.pt").exists():
        return ["train.py", "--resume", "--run_name", f"{name}/{job.run}"]
    for path in milestones(folder):  # killed between its first milestone and its first save: nothing to go on from
        path.unlink()
    return job.command


def run_script(command: list[str], deadline: float | None) -> int:
    """Run one of the scripts; its exit status. At the deadline, or if this process is to stop, it is asked to stop: a
    training then saves."""
    process = subprocess.Popen([sys.executable, HERE / command[0], *command[1:]])
    try:
        return process.wait(timeout=deadline and max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        process.wait()
        raise


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


def parse_flags():
    parser = Parser(description="Train, sample and measure all that the README's results speak of, or go on with it.")
    parser.add_argument("--plan", action="store_true", help="only print what it would run, with a mark at what is done")
    parser.add_argument("--only", nargs="+", metavar="WORD", choices=[*CONFIGURATIONS, *GROUPS["holdout"], *ABLATIONS,
                        *GROUPS, *KINDS, "nothing"], help="runs, of reference, improved, holdout, ablations or one of "
                        "these two groups, and kinds of work, of train, sample and evaluate; nothing: only write the "
                        "results again (default: everything)")
    parser.add_argument("--minutes", type=finite, default=0, help="stop after so many, saved; 0: never. What is not "
                        "a training starts over after a stop, and should fit into that time (default: 0)")
    parser.add_argument("--rehearse", action="store_true", help="everything in small, on critters, under the name "
                        "rehearsal")
    parser.add_argument("--name", help="sub-folder of outputs/ and checkpoints/ (default: study)")
    parser.add_argument("--data", help="folder of images, or critters (default: data/pokemon_jpg)")
    parser.add_argument("--labels", help="the images' types, as in train.py, for all but the reference (default: auto)")
    parser.add_argument("--epochs", type=positive, help="of the long trainings (default: 2000)")
    parser.add_argument("--ablation_epochs", type=positive, help="of the short ones (default: 300)")
    parser.add_argument("--num_samples", type=positive, help="that evaluate.py draws from each checkpoint (default: "
                        "1000)")
    parser.add_argument("--sample_steps", type=positive, help="of ddpm, for those (default: 100)")
    parser.add_argument("--train", metavar="FLAGS", help="more flags for every training, as \"--image_size 32 --width "
                        "32\"")
    args = parser.parse_args()
    args.name = args.name or ("rehearsal" if args.rehearse else "study")
    if Path(args.name).is_absolute() or ".." in Path(args.name).parts:
        parser.error(f"--name must be the name of a sub-folder, not {args.name}")
    return args


if __name__ == "__main__":
    main()
