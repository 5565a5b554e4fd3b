"""reproduce.py: what it plans, that it goes on after any stop, and that its tables say what the files say."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import evaluate
import generate
import reproduce
import results
import runs
import train
from scripts import TINY, assert_one_line, call

pytestmark = pytest.mark.usefixtures("own_folder")
JOBS = reproduce.plan("study", reproduce.SETTINGS)
NAMES = [job.name for job in JOBS]


def flags_of(script, command: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", command)
    if script is train:
        return runs.parse_flags(train.Config, train.PRESETS, "")
    return vars(script.parse_flags())


def config_of(run: str, monkeypatch) -> dict:
    return asdict(train.Config(**flags_of(train, JOBS[NAMES.index(f"train {run}")].command, monkeypatch)))


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def test_what_matters_most_comes_first():
    assert NAMES[:2] == ["train reference", "train improved"]
    kinds = [name.split()[0] for name in NAMES]
    assert [job.run for job in JOBS if job.kind == "train"][2:4] == ["reference_holdout", "improved_holdout"]
    assert NAMES.index("evaluate improved") < NAMES.index("train reference_holdout") < NAMES.index("train short")
    assert NAMES.index("train not_weighted") < NAMES.index("evaluate short")  # nothing slow between the trainings
    assert kinds.count("train") == kinds.count("evaluate") == 11 and kinds.count("sample") == 9
    for i, job in enumerate(JOBS):  # each needs what another one makes before it
        assert not job.needs or any(before.file == job.needs for before in JOBS[:i])


def test_every_command_is_one_that_the_scripts_take(monkeypatch):
    scripts = {"train.py": train, "generate.py": generate, "evaluate.py": evaluate}
    kept = {}
    for job in JOBS:
        found = flags_of(scripts[job.command[0]], job.command, monkeypatch)
        if job.kind == "train":
            kept[job.run] = [f"epoch_{epoch:04d}.pt" for epoch in found.get("milestones", ())] + ["final_model.pt"]
        if job.kind == "evaluate":
            assert [path.name for path in found["checkpoint"]] == kept[job.run]
            assert {path.parent.as_posix() for path in found["checkpoint"]} == {f"checkpoints/study/{job.run}"}
    assert kept["reference"] == ["epoch_0001.pt", "epoch_0100.pt", "epoch_0300.pt", "epoch_0500.pt", "epoch_1000.pt",
                                 "final_model.pt"]


def test_the_reference_run_is_the_reference_configuration(monkeypatch):
    config, default = config_of("reference", monkeypatch), asdict(train.Config())
    changed = {name for name in default if config[name] != default[name]}
    assert changed == {"labels", "milestones", "milestone_every", "sample_every", "num_samples", "save_every",
                       "run_name"}
    assert config["labels"] == "none"
    held = config_of("reference_holdout", monkeypatch)
    assert {name for name in held if held[name] != config[name]} == {"holdout", "run_name"}


def test_each_ablation_changes_one_thing(monkeypatch):
    short, improved = config_of("short", monkeypatch), config_of("improved", monkeypatch)
    assert {name for name in short if short[name] != improved[name]} == {
        "epochs", "holdout", "milestones", "milestone_every", "sample_every", "run_name"}
    seen = set()
    for run in list(reproduce.ABLATIONS)[1:]:
        config = config_of(run, monkeypatch)
        (name,) = {name for name in short if config[name] != short[name]} - {"run_name"}
        seen.add((name, config[name]))
    assert seen == {("augment", "flip"), ("augment", "none"), ("augment", "untold"), ("ema_decay", 0.0),
                    ("dropout", 0.1), ("loss_weighting", "uniform")}


def test_flags_for_every_training_leave_its_change_alone(monkeypatch):
    settings = {**reproduce.SETTINGS, "train": "--lr 2e-3 --ema_decay 0.9 --num_samples 4 --run_name mine"}
    jobs = {job.name: job for job in reproduce.plan("study", settings)}
    found = [flags_of(train, jobs[f"train {run}"].command, monkeypatch) for run in ("improved", "not_averaged")]
    assert [flags["lr"] for flags in found] == [2e-3, 2e-3] and [flags["ema_decay"] for flags in found] == [0.9, 0]
    assert found[0]["num_samples"] == 64 and found[0]["run_name"] == "study/improved"


@pytest.mark.parametrize("epochs, expected", [
    (2000, [1, 100, 300, 500, 1000, 2000]), (20, [1, 3, 5, 10, 20]), (1, [1]),
])
def test_stages(epochs, expected):
    assert reproduce.stages(epochs) == expected


def test_without_types_none_are_asked_for():
    names = [job.name for job in reproduce.plan("study", {**reproduce.SETTINGS, "labels": "none"})]
    assert "sample improved types" in NAMES and "sample improved types" not in names


@pytest.mark.parametrize("words, expected", [
    (None, 31), (["train"], 11), (["reference"], 6), (["reference", "train"], 1), (["holdout", "improved"], 11),
    (["ablations", "evaluate"], 7), (["nothing"], 0),
])
def test_only(words, expected):
    assert sum(reproduce.chosen(job, words) for job in JOBS) == expected


# ---------------------------------------------------------------------------------------------------------------------
# carrying it out


class Machine:
    """In the place of run_script: it writes what the scripts write, unless it is to fail or to be stopped."""

    def __init__(self, monkeypatch):
        self.commands, self.fail, self.stop = [], (), ()
        monkeypatch.setattr(reproduce, "run_script", self)

    def __call__(self, command: list[str], deadline: float | None) -> int:
        self.commands.append(shlex.join(command))
        folder = Path("checkpoints", command[-1])
        if command[0] == "train.py":
            folder.mkdir(parents=True, exist_ok=True)
        for word in self.stop:
            if word in self.commands[-1]:
                self.stop = ()
                (folder / "latest.pt").touch()
                raise KeyboardInterrupt
        if any(word in self.commands[-1] for word in self.fail):
            return 1
        if command[0] == "train.py":
            (folder / "final_model.pt").touch()
        return 0

    def names(self) -> list[str]:
        return [command.split()[0] + " " + Path(command.split()[-1]).name for command in self.commands]


def test_it_goes_on_where_it_was_stopped_and_repeats_nothing(monkeypatch, capsys):
    machine = Machine(monkeypatch)
    machine.stop = ["study/improved_holdout"]
    assert call(reproduce, "--data", "critters") == 130
    begun = machine.commands.copy()
    machine.commands.clear()
    assert call(reproduce) == 0  # the settings are those that it was begun with
    assert machine.commands[0] == "train.py --resume --run_name study/improved_holdout"
    assert len(begun) + len(machine.commands) == 31 + 1 and not set(begun) & set(machine.commands)
    machine.commands.clear()
    assert call(reproduce) == 0 and machine.commands == []
    capsys.readouterr()
    assert call(reproduce, "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 31 and all(line.startswith("[x] python ") for line in lines)


def test_what_fails_keeps_nothing_else_from_being_done(monkeypatch, capsys):
    machine = Machine(monkeypatch)
    machine.fail = ["study/improved "]
    assert call(reproduce, "--data", "critters", "--only", "reference", "improved", "train") == 0
    machine.fail = ["study/dropout", "study/improved/dpm++"]
    assert call(reproduce) == 1
    assert "error: 2 of 31 failed, as they say above: sample improved dpm++, train dropout" in capsys.readouterr().err
    assert "evaluate.py evaluation" in machine.names() and not any("checkpoints/study/dropout" in command
                                                                  for command in machine.commands)
    machine.fail = ()
    machine.commands.clear()
    assert call(reproduce) == 0
    assert machine.names() == ["generate.py dpm++.png", "train.py dropout", "evaluate.py evaluation"]


def test_a_milestone_without_a_save_is_not_in_the_way(monkeypatch):
    machine = Machine(monkeypatch)
    Path("checkpoints/study/reference").mkdir(parents=True)
    Path("checkpoints/study/reference/epoch_0001.pt").touch()
    assert call(reproduce, "--data", "critters", "--only", "reference", "train") == 0
    assert machine.commands[0].startswith("train.py --data critters --labels none --epochs 2000")
    assert not Path("checkpoints/study/reference/epoch_0001.pt").exists()


def test_at_the_deadline_a_script_is_asked_to_stop_and_may_save(monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", Path.cwd())
    Path("slow.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        reproduce.run_script(["slow.py"], reproduce.time.monotonic() + 3)
    if not Path("ready").exists():
        pytest.skip("this machine takes more than three seconds to start Python")
    assert Path("saved").exists()
    Path("quick.py").write_text("import sys; sys.exit(3)")
    assert reproduce.run_script(["quick.py"], None) == 3


def test_time_that_is_up_is_said_and_nothing_is_begun(monkeypatch, capsys):
    machine = Machine(monkeypatch)
    assert call(reproduce, "--data", "critters", "--minutes", 1e-9) == 124
    assert machine.commands == [] and "the same command goes on" in capsys.readouterr().out


def test_another_study_needs_another_name(monkeypatch, capsys):
    Machine(monkeypatch)
    assert call(reproduce, "--data", "critters", "--only", "nothing") == 0
    capsys.readouterr()
    assert_one_line(call(reproduce, "--epochs", 5), capsys, "outputs/study/", "--epochs 2000", "--name")
    assert call(reproduce, "--epochs", 5, "--data", "critters", "--name", "other", "--only", "nothing") == 0
    assert json.loads(Path("outputs/other/settings.json").read_text())["epochs"] == 5


def test_pictures_without_types_are_noticed_before_the_training(capsys):
    Path("mine").mkdir()
    Image.new("RGB", (8, 8)).save("mine/one.png")
    assert_one_line(call(reproduce, "--data", "mine"), capsys, "mine", "labels.csv", "--labels none")
    assert_one_line(call(reproduce, "--data", "nowhere"), capsys, "nowhere")
    assert not Path("outputs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the results


def test_the_cells_of_a_grid_are_its_pictures():
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    save_image(images / 255, "grid.png", nrow=8, pad_value=1)
    assert results.cells(Path("grid.png")).equal(images.to(torch.uint8))


def test_before_anything_was_run_the_tables_are_empty():
    text = results.write_results("study").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.endswith("| – | – | – | – |") for line in rows) == 11
    assert sum(line.endswith(" | – |") for line in rows) == 11 + 6
    assert not any(word in text for word in ("%", " min ", "GiB |"))


def test_the_tables_say_what_the_files_say():
    """A short training and its samples are real; of an evaluation there is only the file."""
    tiny = shlex.join(TINY[2:])  # without --data critters
    assert call(reproduce, "--data", "critters", "--epochs", 3, "--only", "nothing", "--train", tiny) == 0
    for job in reproduce.plan("study", json.loads(Path("outputs/study/settings.json").read_text())):
        if job.run == "reference" and (job.kind == "train" or job.name.endswith(" dpm++")):
            script = train if job.kind == "train" else generate
            assert call(script, *job.command[1:]) == 0
    figures = dict(copies=dict(value=0.125, low=0.1, high=0.15, real=dict(value=0.01)), recall=dict(value=0.5))
    evaluation = Path("outputs/study/reference/evaluation")
    evaluation.mkdir()
    (evaluation / "report.json").write_text(json.dumps(dict(epoch_to_keep="Keep epoch 2.", runs=[
        dict(epoch=epoch, figures=figures, verdict=["It copies."], other=0) for epoch in (1, 2, 3)])))
    white = np.full((16, 16, 3), 255, np.uint8)
    for i, path in enumerate(sorted(Path("outputs/study/reference/dpm++").iterdir())):
        Image.fromarray(white if i < 40 else 0 * white).save(path)

    text = results.write_results("study").read_text(encoding="utf-8")
    made = json.loads(Path("outputs/study/results.json").read_text())
    cost = json.loads(Path("outputs/study/reference/cost.json").read_text())
    run = made["runs"]["reference"]
    assert made["settings"]["epochs"] == 3 and list(made["runs"]) == ["reference"]
    assert run["cost"] == cost and run["epochs"] == 3 and [of["epoch"] for of in run["evaluation"]] == [1, 2, 3]
    assert run["samples"] == {"dpm++": dict(number=64, black_corner=24, collapsed=24, clean=40, seconds=None)}
    assert f"| 3 | {cost['seconds'] / 60:.1f} min | {cost['images'] / cost['seconds']:,.0f} |" in text
    assert "| reference | `dpm++` | 64 | 24 | 24 | 40 | – |" in text
    assert text.count("12.5 % (10.0 to 15.0)") == 3 + 1  # a line each, and what was claimed
    assert "| real pictures | – | – | – | 1.0 % |" in text
    assert "Keep epoch 2." in text and "- It copies." in text
    stages, gif = (Image.open(f"outputs/study/reference/{name}") for name in ("stages.png", "training.gif"))
    assert stages.height == 3 * (4 * 18) + 8 and gif.n_frames == 3  # three epochs, of pictures enlarged four times
