"""The full study: train the reference and the improved model and a set of ablations, sample and evaluate them.

    python -m tools.study                                      # everything; the same command continues after any stop
    python -m tools.study --plan                               # print the commands, marking those that are done
    python -m tools.study --only reference train --minutes 9   # part of it, stopped and saved after nine minutes
    python -m tools.study --rehearse                           # a small version on critters: minutes on a CPU

Calls train.py, generate.py and evaluate.py, the most important jobs first (plan.py), and writes the tables and plots to
outputs/study/ (results.py).
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace

from tools.study.plan import ABLATIONS, CONFIGURATIONS, GROUPS, KINDS, REHEARSAL, Study, is_selected, plan
from tools.study.runner import is_done, load_progress, run_jobs
from training.folder import DataFolder
from training.labels import find_labels
from training.run_dir import run_folder
from utils.cli import check_sub_folder, parse, setting
from utils.errors import one_line_errors
from utils.files import read_json, write_json

WORDS = (*CONFIGURATIONS, *GROUPS["holdout"], *ABLATIONS, *GROUPS, *KINDS, "nothing")


@dataclass
class Settings:
    """The flags of the study; None means the study's own setting, or that of the full study."""

    plan: bool = setting(False, "only print the commands, marking those that are done")
    only: tuple[str, ...] = setting(
        (), "runs (reference, improved, the group holdout, the group ablations, or a member of one) and kinds of work "
            "(train, sample, evaluate); nothing: only write the results again (default: everything)",
        WORDS, kind=str, metavar="WORD")
    minutes: float = setting(
        0.0, "stop after this many minutes, saved; 0: never. An interrupted sample or evaluate job starts over, so it "
             "should fit into that time", least=0)
    rehearse: bool = setting(False, "run a small version of everything on critters, under the name rehearsal")
    name: str = setting("", "sub-folder of outputs/ and checkpoints/ (default: study)")
    data: str | None = setting(None, "folder of images, or critters (default: data/pokemon_jpg)", kind=str)
    labels: str | None = setting(None, "source of the labels, as in train.py; the reference uses none (default: auto)",
                                 kind=str)
    epochs: int | None = setting(None, "epochs of the long trainings (default: 2000)", kind=int, above=0)
    ablation_epochs: int | None = setting(None, "epochs of the ablations (default: 300)", kind=int, above=0)
    num_samples: int | None = setting(None, "samples that evaluate.py draws from each checkpoint (default: 1000)",
                                      kind=int, above=0)
    sample_steps: int | None = setting(None, "steps of ddpm for those samples (default: 100)", kind=int, above=0)
    train: str | None = setting(None, "more flags for every training, as --train=\"--image_size 32 --width 32\"",
                                kind=str, metavar="FLAGS")


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Run the full study: trainings, samples, evaluations, tables.",
                         prog="python -m tools.study")
        name = settings.name or ("rehearsal" if settings.rehearse else "study")
        check_sub_folder("--name", name)
        study = load_study(name, settings)
        jobs = plan(name, study)
        if settings.plan:
            progress = load_progress(name)
            for job in jobs:
                print(f"[{'x' if is_done(job, progress) else ' '}] {shlex.join(['python', *job.command])}")
            return
        save_study(name, study)
        status = run_jobs(name, [job for job in jobs if is_selected(job, settings.only)], settings.minutes)
    sys.exit(status)


def load_study(name: str, settings: Settings) -> Study:
    """Return the settings that the study was started with, or those of a new one from the flags.

    Raises:
        ValueError: for flags that differ from those the study was started with.
        DataError, LabelError: for data that are missing, or have no labels where they are to be used.
    """
    given = {declared.name: value for declared in fields(Study)
             if (value := getattr(settings, declared.name)) is not None}
    path = run_folder("outputs", name) / "settings.json"
    if path.exists():
        try:
            study = Study(**read_json(path))
        except TypeError as error:
            raise ValueError(f"{path} is of another version ({error}): choose another --name") from error
        different = [f"--{flag} {getattr(study, flag)}" for flag in given if given[flag] != getattr(study, flag)]
        if different:
            raise ValueError(f"the study in {path.parent}/ was started with {', '.join(different)}: leave these flags "
                             f"out, or choose another --name")
        return study
    study = replace(REHEARSAL if settings.rehearse else Study(), **given)
    check_data(study)
    return study


def check_data(study: Study) -> None:
    """Raise an error, before hours of training, if the images are missing or have no labels."""
    if study.data == "critters":
        return
    folder = DataFolder(study.data)
    if study.labels != "none" and not find_labels(folder, study.labels).types:
        raise ValueError(f"no labels for the images in {study.data}: put a labels.csv there, or give --labels FILE or "
                         f"--labels none")


def save_study(name: str, study: Study) -> None:
    """Write settings.json, unless it is there already."""
    path = run_folder("outputs", name) / "settings.json"
    if not path.exists():
        write_json(path, asdict(study))


if __name__ == "__main__":
    main()
