"""tools/study: the plan, resuming after any stop, and tables that agree with the files."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, TINY, assert_one_line, call
from torchvision.utils import save_image

import evaluate
import generate
import train
from tools.study import __main__ as study
from tools.study import plots, results, runner
from tools.study.plan import ABLATIONS, Study, is_selected, milestone_epochs, plan
from training.config import configure
from utils.cli import parse

pytestmark = pytest.mark.usefixtures("own_folder")
JOBS = plan("study", Study())
NAMES = [job.name for job in JOBS]


def parsed(command: list[str], monkeypatch) -> dict:
    """The settings of a command, as its script parses them."""
    monkeypatch.setattr(sys, "argv", command)
    if command[0] == "train.py":
        return asdict(configure(train.Config, train.PRESETS, "", "train.py").config)
    return asdict(parse({"generate.py": generate, "evaluate.py": evaluate}[command[0]].Settings, ""))


def config_of(run: str, monkeypatch) -> dict:
    return parsed(JOBS[NAMES.index(f"train {run}")].command, monkeypatch)


def differences(a: dict, b: dict) -> set[str]:
    return {name for name in a if a[name] != b[name]}


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def test_order_of_the_jobs():
    assert NAMES[:2] == ["train reference", "train improved"]
    kinds = [name.split()[0] for name in NAMES]
    assert [job.run for job in JOBS if job.kind == "train"][2:4] == ["reference_holdout", "improved_holdout"]
    assert NAMES.index("evaluate improved") < NAMES.index("train reference_holdout") < NAMES.index("train short")
    assert NAMES.index("train not_weighted") < NAMES.index("evaluate short")  # nothing slow between the trainings
    assert kinds.count("train") == kinds.count("evaluate") == 10 and kinds.count("sample") == 9
    assert len(set(NAMES)) == len(NAMES)
    for i, job in enumerate(JOBS):  # what a job needs is created before it
        assert not job.needs or any(before.creates == job.needs for before in JOBS[:i])


def test_scripts_accept_every_command(monkeypatch):
    milestones = {}
    for job in JOBS:
        settings = parsed(job.command, monkeypatch)
        if job.kind == "train":
            milestones[job.run] = [*(f"epoch_{epoch:04d}.pt" for epoch in settings["milestones"]),
                                   "final_model.pt"]
        if job.kind == "evaluate":
            paths = [Path(path) for path in settings["checkpoint"]]
            assert [path.name for path in paths] == milestones[job.run]
            assert {path.parent.as_posix() for path in paths} == {f"checkpoints/study/{job.run}"}
    assert milestones["reference"] == ["epoch_0001.pt", "epoch_0100.pt", "epoch_0300.pt", "epoch_0500.pt",
                                       "epoch_1000.pt", "final_model.pt"]


def test_the_reference_run_is_the_reference_configuration(monkeypatch):
    config, default = config_of("reference", monkeypatch), asdict(train.Config())
    assert differences(config, default) == {
        "labels", "milestones", "milestone_every", "sample_every", "num_samples", "save_every", "run_name"}
    assert config["labels"] == "none"
    assert differences(config_of("reference_holdout", monkeypatch), config) == {"holdout", "run_name"}


def test_each_ablation_changes_one_setting(monkeypatch):
    short = config_of("short", monkeypatch)
    assert differences(short, config_of("improved", monkeypatch)) == {
        "epochs", "holdout", "milestones", "milestone_every", "sample_every", "run_name"}
    changes = set()
    for run in list(ABLATIONS)[1:]:
        config = config_of(run, monkeypatch)
        (name,) = differences(config, short) - {"run_name"}
        changes.add((name, config[name]))
    assert changes == {("augment", "flip"), ("augment", "none"), ("ema_decay", 0.0), ("dropout", 0.1),
                       ("loss_weighting", "uniform")}


def test_flags_for_every_training_do_not_undo_its_change(monkeypatch):
    flags = "--lr 2e-3 --ema_decay 0.9 --num_samples 4 --run_name mine"
    jobs = {job.name: job for job in plan("study", replace(Study(), train=flags))}
    improved, not_averaged = (parsed(jobs[f"train {run}"].command, monkeypatch) for run in ("improved", "not_averaged"))
    assert improved["lr"] == not_averaged["lr"] == 2e-3
    assert improved["ema_decay"] == 0.9 and not_averaged["ema_decay"] == 0
    assert improved["num_samples"] == 64 and improved["run_name"] == "study/improved"


@pytest.mark.parametrize("epochs, expected", [
    (2000, [1, 100, 300, 500, 1000, 2000]), (20, [1, 3, 5, 10, 20]), (1, [1]),
])
def test_milestone_epochs(epochs, expected):
    assert milestone_epochs(epochs) == expected


def test_without_labels_no_samples_by_type():
    assert "sample improved types" in NAMES
    assert "sample improved types" not in [job.name for job in plan("study", replace(Study(), labels="none"))]


@pytest.mark.parametrize("words, expected", [
    ((), 29), (("train",), 10), (("reference",), 6), (("reference", "train"), 1), (("holdout", "improved"), 11),
    (("ablations", "evaluate"), 6), (("nothing",), 0),
])
def test_only(words, expected):
    assert sum(is_selected(job, words) for job in JOBS) == expected


# ---------------------------------------------------------------------------------------------------------------------
# running it


class FakeScripts:
    """Stands in for run_script: creates what the scripts would, unless it is to fail or to be interrupted."""

    def __init__(self, monkeypatch):
        self.commands, self.fail, self.stop = [], (), ()
        monkeypatch.setattr(runner, "run_script", self)

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


@pytest.fixture
def scripts(monkeypatch) -> FakeScripts:
    return FakeScripts(monkeypatch)


def test_it_resumes_where_it_was_stopped_and_repeats_nothing(scripts, capsys):
    scripts.stop = ["study/improved_holdout"]
    assert call(study, "--data", "critters") == 130
    before = scripts.commands.copy()
    scripts.commands.clear()
    assert call(study) == 0  # with the settings that it was started with
    assert scripts.commands[0] == "train.py --resume --run_name study/improved_holdout"
    assert len(before) + len(scripts.commands) == 29 + 1 and not set(before) & set(scripts.commands)
    scripts.commands.clear()
    assert call(study) == 0 and scripts.commands == []
    capsys.readouterr()
    assert call(study, "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 29 and all(line.startswith("[x] python ") for line in lines)


def test_a_failed_job_stops_only_those_that_need_it(scripts, capsys):
    scripts.fail = ["study/improved "]
    assert call(study, "--data", "critters", "--only", "reference", "improved", "train") == 0
    scripts.fail = ["study/dropout", "study/improved/dpm++"]
    assert call(study) == 1
    assert "error: 2 of 29 jobs failed, see above: sample improved dpm++, train dropout" in capsys.readouterr().err
    assert "evaluate.py evaluation" in scripts.names()
    assert not any("checkpoints/study/dropout" in command for command in scripts.commands)
    scripts.fail = ()
    scripts.commands.clear()
    assert call(study) == 0
    assert scripts.names() == ["generate.py dpm++.png", "train.py dropout", "evaluate.py evaluation"]


def test_a_milestone_of_a_training_that_never_saved_is_removed(scripts):
    Path("checkpoints/study/reference").mkdir(parents=True)
    Path("checkpoints/study/reference/epoch_0001.pt").touch()
    assert call(study, "--data", "critters", "--only", "reference", "train") == 0
    assert scripts.commands[0].startswith("train.py --data critters --labels none --epochs 2000")
    assert not Path("checkpoints/study/reference/epoch_0001.pt").exists()


def test_a_script_may_save_at_the_deadline(monkeypatch):
    monkeypatch.setattr(runner, "ROOT", Path.cwd())
    Path("slow.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        runner.run_script(["slow.py"], runner.time.monotonic() + 3)
    if not Path("ready").exists():
        pytest.skip("this machine takes more than three seconds to start Python")
    assert Path("saved").exists()
    Path("quick.py").write_text("import sys; sys.exit(3)")
    assert runner.run_script(["quick.py"], None) == 3


def test_scripts_are_those_of_the_repository():
    assert all((runner.ROOT / job.command[0]).is_file() for job in JOBS) and runner.ROOT == ROOT


def test_when_the_time_is_up_nothing_is_started(scripts, capsys):
    assert call(study, "--data", "critters", "--minutes", 1e-9) == 124
    assert scripts.commands == [] and "run the same command again" in capsys.readouterr().out


def test_other_settings_need_another_name(scripts, capsys):
    assert call(study, "--data", "critters", "--only", "nothing") == 0
    capsys.readouterr()
    assert_one_line(call(study, "--epochs", 5), capsys, "outputs/study/", "--epochs 2000", "--name")
    assert call(study, "--epochs", 5, "--data", "critters", "--name", "other", "--only", "nothing") == 0
    assert json.loads(Path("outputs/other/settings.json").read_text())["epochs"] == 5


def test_images_without_labels_are_reported_before_the_training(capsys):
    Path("mine").mkdir()
    Image.new("RGB", (8, 8)).save("mine/one.png")
    assert_one_line(call(study, "--data", "mine"), capsys, "mine", "labels.csv", "--labels none")
    assert_one_line(call(study, "--data", "nowhere"), capsys, "nowhere")
    assert_one_line(call(study, "--data", "critters", "--name", "../above"), capsys, "--name")
    assert_one_line(call(study, "--data", "critters", "--epochs", 0), capsys, "--epochs")
    assert not Path("outputs").exists()


def test_a_full_disk_leaves_no_half_settings(scripts, monkeypatch, capsys):
    """Half a settings.json would make every later call fail."""
    write_text = Path.write_text

    def write_half(path: Path, text: str, **options) -> None:
        write_text(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        assert_one_line(call(study, "--data", "critters"), capsys, "No space left")
    assert call(study, "--data", "critters", "--only", "nothing") == 0


def test_damaged_settings_are_named(scripts, capsys):
    Path("outputs/study").mkdir(parents=True)
    Path("outputs/study/settings.json").write_text("{")
    assert_one_line(call(study), capsys, "outputs/study/settings.json", "damaged")
    Path("outputs/study/settings.json").write_text('{"data": "critters", "speed": 2}')
    assert_one_line(call(study), capsys, "outputs/study/settings.json")


# ---------------------------------------------------------------------------------------------------------------------
# the results


def test_grid_images():
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    save_image(images / 255, "grid.png", nrow=8, pad_value=1)
    assert plots.grid_images(Path("grid.png")).equal(images.to(torch.uint8))


def test_tables_are_empty_before_anything_was_run():
    text = results.write_results("study").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.endswith("| – | – | – | – |") for line in rows) == 10
    assert not any(word in text for word in ("%", " min ", "GiB |"))


def test_tables_agree_with_the_files():
    """A short training and its samples are real; of the evaluation there is only the report."""
    flags = shlex.join(TINY[2:])  # without --data critters
    assert call(study, "--data", "critters", "--epochs", 3, "--only", "nothing", f"--train={flags}") == 0
    for job in plan("study", Study(**json.loads(Path("outputs/study/settings.json").read_text()))):
        if job.name in ("train reference", "sample reference dpm++"):
            assert call(train if job.kind == "train" else generate, *job.command[1:]) == 0
    figures = dict(copies=dict(value=0.125, low=0.1, high=0.15, real=dict(value=0.01)), recall=dict(value=0.5))
    evaluation = Path("outputs/study/reference/evaluation")
    evaluation.mkdir()
    (evaluation / "report.json").write_text(json.dumps(dict(epoch_to_keep="Keep epoch 2.", runs=[
        dict(epoch=epoch, figures=figures, verdict=["It copies."], other=0) for epoch in (1, 2, 3)])))
    white = np.full((16, 16, 3), 255, np.uint8)
    for i, path in enumerate(sorted(Path("outputs/study/reference/dpm++").iterdir())):
        Image.fromarray(white if i < 40 else 0 * white).save(path)

    text = results.write_results("study").read_text(encoding="utf-8")
    written = json.loads(Path("outputs/study/results.json").read_text())
    cost = json.loads(Path("outputs/study/reference/cost.json").read_text())
    run = written["runs"]["reference"]
    assert written["settings"]["epochs"] == 3 and list(written["runs"]) == ["reference"]
    assert run["cost"] == cost and run["epochs"] == 3
    assert [checkpoint["epoch"] for checkpoint in run["evaluation"]] == [1, 2, 3]
    assert run["samples"] == {"dpm++": dict(number=64, black_corner=24, collapsed=24, clean=40, seconds=None)}
    assert f"| 3 | {cost['seconds'] / 60:.1f} min | {cost['images'] / cost['seconds']:,.0f} |" in text
    assert "| reference | `dpm++` | 64 | 24 | 24 | 40 | – |" in text
    assert text.count("12.5 % (10.0 to 15.0)") == 3  # one row per checkpoint
    assert "| real images | – | – | – | 1.0 % |" in text
    assert "Keep epoch 2." in text and "- It copies." in text
    stages, gif = (Image.open(f"outputs/study/reference/{name}") for name in ("stages.png", "training.gif"))
    assert stages.height == 3 * (4 * 18) + 8 and gif.n_frames == 3  # three epochs, of images enlarged four times
