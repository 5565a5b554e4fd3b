"""A training that stops, for whatever reason, resumes as if it had not; and none overwrites another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import FEW_STEPS, ROOT, TINY, assert_one_line, assert_same_run, call, metrics, same

import generate
import train
from training import loss
from training.config import settle
from training.labels import BEFORE_METADATA
from training.step import learning_rate
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("more", [
    [], ["--dropout", "0.3"], ["--lr_schedule", "cosine", "--warmup_steps", "4"], ["--precision", "bf16"],
    ["--holdout", "0.25", "--labels", "none", "--grad_accum", "2", "--prediction", "v", "--zero_terminal_snr"],
], ids=["plain", "dropout", "lr", "bf16", "others"])
def test_a_resumed_run_is_the_uninterrupted_one(trained, more):
    if more:
        assert call(train, *TINY, *more, "--run_name", "whole") == 0
        whole, whole_outputs = load_checkpoint("checkpoints/whole/latest.pt"), Path("outputs/whole")
    else:
        whole, whole_outputs = load_checkpoint(trained / "checkpoints/latest.pt"), trained / "outputs"
    assert call(train, *TINY, *more, "--max_steps", 3) == 0  # in the middle of the second epoch
    assert load_checkpoint("checkpoints/latest.pt")["step"] == 3
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), whole)
    assert [float(row["loss"]) for row in metrics()] == [row["loss"] for row in whole["history"]]
    assert same(load_checkpoint("checkpoints/final_model.pt")["ema"], whole["ema"])
    for name in ("metrics.csv", "generated_epoch_0003.png"):
        assert Path("outputs", name).read_bytes() == (whole_outputs / name).read_bytes()


def test_a_grid_that_a_kill_prevented_is_drawn_on_resume(trained):
    assert call(train, *TINY, "--sample_every", 1, "--max_steps", 4) == 0
    Path("outputs/generated_epoch_0002.png").unlink()
    assert call(train, "--resume", "--max_steps", 0) == 0
    for name in ("generated_epoch_0002.png", "generated_epoch_0003.png", "loss.png"):
        assert Path("outputs", name).read_bytes() == (trained / "outputs" / name).read_bytes()


def test_a_run_can_be_made_longer(trained, capsys):
    assert call(train, *TINY, "--epochs", 2) == 0
    assert call(train, "--resume", "--epochs", 3) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), load_checkpoint(trained / "checkpoints/latest.pt"))
    assert "warning" not in capsys.readouterr().err


def test_more_epochs_under_a_cosine_schedule_are_warned_of_with_both_rates(capsys):
    assert call(train, *TINY, "--lr_schedule", "cosine", "--lr", 1e-3) == 0
    assert call(train, "--resume", "--epochs", 3) == 0  # the same number is no change
    assert "warning" not in capsys.readouterr().err
    assert call(train, "--resume", "--epochs", 9, "--max_steps", 7) == 0
    printed = capsys.readouterr().err
    config = train.Config(lr=1e-3, lr_schedule="cosine")
    assert f"jumps from {learning_rate(config, 6, 6):.2g} to {learning_rate(config, 6, 18):.2g}" in printed
    assert "warning: --epochs 9 instead of 3" in printed


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_resumes_from_there(trained, monkeypatch, capsys, number, code):
    calls, draw = [], loss.draw_timesteps

    def draw_and_interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(number)
        return draw(*args)

    monkeypatch.setattr(loss, "draw_timesteps", draw_and_interrupt)
    assert call(train, *TINY, "--run_name", "mine") == code
    printed = capsys.readouterr().out
    assert "stopped at step 3 of 6" in printed and "python train.py --resume --run_name mine" in printed
    assert call(train, "--resume", "--run_name", "mine") == 0
    assert len(calls) == 6  # no step was made twice
    assert_same_run(load_checkpoint("checkpoints/mine/latest.pt"), load_checkpoint(trained / "checkpoints/latest.pt"))


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT to send")
def test_ctrl_c_on_the_real_command():
    flags = [*TINY, "--epochs", "1000000", "--sample_every", "1000000"]
    with open("out", "w") as out, open("err", "w") as err:  # not pipes, which the progress bar would fill
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=out, stderr=err)
    try:
        deadline = time.monotonic() + 240  # a starved machine takes long to import torch
        while not (Path("outputs/metrics.csv").exists() and len(metrics()) > 1):
            assert process.poll() is None and time.monotonic() < deadline, Path("err").read_text()[-500:]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    assert "--resume" in Path("out").read_text() and "Traceback" not in Path("err").read_text()
    step = load_checkpoint("checkpoints/latest.pt")["step"]
    assert call(train, "--resume", "--max_steps", step + 1) == 0
    assert load_checkpoint("checkpoints/final_model.pt")["step"] == step + 1


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def test_resume_refuses_another_configuration(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = Path("checkpoints/latest.pt").read_bytes()
    for flags in ["--lr", "0.5"], ["--width", "16"], ["--multipliers", "1", "2", "2"], ["--seed", "1"], [
            "--data_seed", "1"]:
        assert_one_line(call(train, "--resume", *flags), capsys, flags[0])
    assert call(train, "--resume", "--lr", "1e-4", "--multipliers", 1, 2) == 0  # what the run has may be repeated
    assert "nothing to do" in capsys.readouterr().out
    assert Path("checkpoints/latest.pt").read_bytes() == before


def test_a_run_is_never_overwritten_by_another(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    assert_one_line(call(train, *TINY), capsys, "checkpoints/latest.pt", "--resume", "--run_name")
    line = call(train, "--resume", "--run_name", "typo")
    assert_one_line(line, capsys, "no run to resume", "checkpoints/typo/latest.pt", "--run_name")
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_resume_refuses_a_folder_with_other_images():
    Path("mine").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 90, 200)).save(f"mine/{i}.png")
    assert call(train, *TINY, "--data", "mine", "--max_steps", 1) == 0
    Path("mine/0.png").unlink()
    code = call(train, "--resume", "--max_steps", 2)
    assert code.startswith("error: ") and "2 usable images" in code and "had 3" in code


def test_resuming_a_finished_run_writes_the_final_model_that_a_kill_prevented():
    assert call(train, *TINY, "--epochs", 1) == 0
    Path("checkpoints/final_model.pt").unlink()
    assert call(train, "--resume") == 0
    assert load_checkpoint("checkpoints/final_model.pt")["step"] == 2


def test_resume_refuses_a_file_that_is_not_for_resuming(trained, capsys):
    """final_model.pt has no optimizer; somebody renamed it."""
    Path("checkpoints").mkdir()
    Path("checkpoints/latest.pt").write_bytes((trained / "checkpoints/final_model.pt").read_bytes())
    assert_one_line(call(train, "--resume", "--epochs", 4), capsys, "latest.pt")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints of other versions


def rewrite(path: str, change: Callable[[dict], object]) -> None:
    """Change the content of a checkpoint."""
    content = load_checkpoint(path)
    del content["format"]
    change(content)
    save_checkpoint(path, **content)


def test_flags_that_a_run_from_before_metadata_does_not_have():
    settings = asdict(train.Config(data="images"))
    for name in ("splits", "label_column"):
        del settings[name]
    save_checkpoint("old.pt", config=settings)
    old = load_checkpoint("old.pt")
    assert settle({"labels": "auto"}, old, train.Config) == settle({}, old, train.Config)
    assert settle({"labels": "auto"}, old, train.Config).labels == BEFORE_METADATA
    with pytest.raises(ValueError, match=r"has --label_column \(none\): leave"):
        settle({"label_column": ("types",)}, old, train.Config)
    with pytest.raises(ValueError, match="has --labels auto: leave"):
        settle({"labels": "folders"}, old, train.Config)
    del old["config"]["clip_grad"]  # whatever setting comes next
    assert settle({"clip_grad": train.Config.clip_grad}, old, train.Config) == settle({}, old, train.Config)


def test_a_setting_that_an_older_run_does_not_have_takes_its_default(trained):
    assert call(train, *TINY, "--max_steps", 3) == 0
    rewrite("checkpoints/latest.pt", lambda content: [content["config"].pop(name)
                                                      for name in ("milestones", "workers")])
    assert call(train, "--resume", "--max_steps", 0) == 0
    content = load_checkpoint("checkpoints/latest.pt")
    assert (content["config"]["milestones"], content["config"]["workers"]) == ((), -1)
    assert_same_run(content, load_checkpoint(trained / "checkpoints/latest.pt"))


def test_a_setting_that_took_its_default_cannot_be_changed_either(capsys):
    assert call(train, *TINY, "--max_steps", 3) == 0
    rewrite("checkpoints/latest.pt", lambda content: content["config"].pop("clip_grad"))
    capsys.readouterr()
    assert_one_line(call(train, "--resume", "--clip_grad", 0.5), capsys, "--clip_grad 1.0", "leave these flags out")


def test_resume_refuses_a_setting_that_it_does_not_know(capsys):
    assert call(train, *TINY, "--max_steps", 1) == 0
    rewrite("checkpoints/latest.pt", lambda content: content["config"].update(depth=3, heads=2))
    capsys.readouterr()
    before = Path("checkpoints/latest.pt").read_bytes()
    assert_one_line(call(train, "--resume", "--epochs", 4), capsys, "checkpoints/latest.pt", "depth, heads")
    assert Path("checkpoints/latest.pt").read_bytes() == before


def test_resume_refuses_a_choice_that_is_gone(capsys):
    """"untold" augmented without telling the network; such a checkpoint can still be drawn from."""
    assert call(train, *TINY, "--max_steps", 1) == 0
    rewrite("checkpoints/latest.pt", lambda content: content["config"].update(augment="untold"))
    capsys.readouterr()
    assert_one_line(call(train, "--resume", "--max_steps", 0), capsys, "--augment untold", "full, flip, none")
    assert call(generate, "--checkpoint", "checkpoints/latest.pt", *FEW_STEPS, "--num_images", 1) == 0


def to_old_format(content: dict) -> None:
    """Turn the content of a checkpoint into that of the version before `network`, `stats` and --data_seed."""
    assert content["network"].pop("kind") == "unet"
    content["unet"] = content.pop("network")["config"]
    if "stats" in content:
        content["tally"] = torch.tensor(list(content.pop("stats").values()))
    del content["config"]["data_seed"]
    content["config"]["compile"] = "auto"


def test_checkpoints_of_the_old_format_resume_and_draw():
    """Their critters were drawn from the training's own seed."""
    flags = [*TINY, "--seed", 5, "--data_seed", 5, "--dropout", 0.1]
    assert call(train, *flags, "--run_name", "whole") == 0
    whole = load_checkpoint("checkpoints/whole/latest.pt")
    assert call(train, *flags, "--max_steps", 3) == 0
    for name in ("latest.pt", "final_model.pt"):
        rewrite(f"checkpoints/{name}", to_old_format)
    plain = torch.load("checkpoints/latest.pt", weights_only=True)
    assert plain["tally"].shape == (4,) and not {"network", "stats"} & plain.keys()

    assert call(generate, "--checkpoint", "checkpoints/final_model.pt", *FEW_STEPS, "--num_images", 1) == 0
    assert call(train, "--resume", "--max_steps", 0) == 0
    content = load_checkpoint("checkpoints/latest.pt")
    assert content["config"]["data_seed"] == 5 and content["config"]["compile"] == "off"
    assert_same_run(content, whole)
