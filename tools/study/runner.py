"""Run the jobs of a study one after the other: what is done, what can be resumed, when to stop."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.study.plan import Job
from tools.study.results import write_results
from training.run_dir import milestones, run_folder
from utils.files import read_json, write_json
from utils.processes import interrupt_on_sigterm, run_python

ROOT = Path(__file__).resolve().parents[2]
TIMED_OUT = 124  # the exit status of timeout(1)
INTERRUPTED = 130


def load_progress(name: str) -> dict[str, float]:
    """Return the seconds that each finished job took; trainings are not among them, they leave a checkpoint."""
    return read_json(run_folder("outputs", name) / "progress.json")


def is_done(job: Job, progress: dict[str, float]) -> bool:
    return job.creates.exists() if job.creates else job.name in progress


def run_jobs(name: str, jobs: Sequence[Job], minutes: float) -> int:
    """Run the jobs that are not done yet, then write the results.

    A job that fails does not keep those that do not need its result from running.

    Args:
        minutes: when to stop; 0 means never.

    Returns:
        The exit status: 0, 1 if a job failed, 124 if the time was up, 130 after an interrupt.
    """
    interrupt_on_sigterm()
    deadline = time.monotonic() + 60 * minutes if minutes else None
    progress, failed, status = load_progress(name), [], 0
    try:
        for number, job in enumerate(jobs, 1):
            if is_done(job, progress):
                continue
            label = f"[{number}/{len(jobs)}] {job.name}"
            if job.needs and not job.needs.exists():
                print(f"{label}: skipped, {job.needs} does not exist yet")
                continue
            if deadline and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(job.command, 60 * minutes)

            # Run the command, or resume it.
            command = next_command(name, job)
            print(f"{label}: {shlex.join(['python', *command])}", flush=True)
            started = time.monotonic()
            if run_script(command, deadline):
                failed.append(job.name)  # the script has printed why
            elif not job.creates:
                progress[job.name] = round(time.monotonic() - started, 1)
                write_json(run_folder("outputs", name) / "progress.json", progress)
    except subprocess.TimeoutExpired:
        print(f"stopped after {minutes:g} minutes; run the same command again to continue")
        status = TIMED_OUT
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue")
        status = INTERRUPTED
    print(f"wrote {write_results(name)}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} jobs failed, see above: {', '.join(failed)}", file=sys.stderr)
    return status or int(bool(failed))


def next_command(name: str, job: Job) -> list[str]:
    """Return the command of a job, or the one that resumes a training that was begun."""
    if job.kind == "evaluate":  # a milestone that could not be saved does not prevent evaluating the others
        missing = [word for word in job.command if word.endswith(".pt") and not Path(word).exists()]
        if missing:
            print(f"warning: {job.name}: left out {', '.join(missing)}, which does not exist", file=sys.stderr)
        return [word for word in job.command if word not in missing]
    if job.kind != "train":
        return job.command
    folder = run_folder("checkpoints", f"{name}/{job.run}")
    if (folder / "latest.pt").exists():
        return ["train.py", "--resume", "--run_name", f"{name}/{job.run}"]
    for path in milestones(folder):  # killed after its first milestone and before its first save: start over
        path.unlink()
    return job.command


def run_script(command: Sequence[str], deadline: float | None) -> int:
    """Run a script of the repository's root and return its exit status; see `run_python`."""
    return run_python([ROOT / command[0], *command[1:]], deadline)
