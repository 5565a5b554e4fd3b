"""Failures while a training runs: full disks, a second trainer, signals, non-finite numbers, too little memory."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import ROOT, TINY, assert_one_line, assert_same_run, call, metrics, same

import train
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from training import loop, loss, run_dir, run_images
from training.run_dir import RunDir, lock_folder, milestones
from training.run_page import RunPage
from utils import files
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch):
    """A disk for checkpoints that is full while `disk["full"]`; `disk["failed"]` counts the saves that fail."""
    disk, save = dict(full=True, failed=0), torch.save

    def save_if_room(content, file):
        if disk["full"]:
            disk["failed"] += 1
            file.write(b"half of a checkpoint")
            no_space()
        save(content, file)

    monkeypatch.setattr(torch, "save", save_if_room)
    return disk


# ---------------------------------------------------------------------------------------------------------------------
# disks


def test_a_disk_that_is_full_for_a_while_costs_nothing(trained, disk, monkeypatch, capsys):
    """The first save works, the next ones fail, and there is room again before the end."""
    steps, draw = [], loss.draw_timesteps

    def draw_and_fill(*args):
        steps.append(len(steps))
        disk["full"] = len(steps) in (3, 4)
        if len(steps) == 4:
            assert load_checkpoint("checkpoints/latest.pt")["step"] == 2  # the old one is whole
        return draw(*args)

    monkeypatch.setattr(loss, "draw_timesteps", draw_and_fill)
    assert call(train, *TINY, "--save_every", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), load_checkpoint(trained / "checkpoints/latest.pt"))
    printed = capsys.readouterr().err
    assert printed.count("could not write checkpoints/latest.pt (No space left on device)") == 1  # and not each time
    assert "training goes on" in printed and "checkpoints/latest.pt could be written again" in printed
    assert disk["failed"] == 2


def test_a_failed_save_is_retried_after_a_minute_and_not_at_every_step(disk, monkeypatch):
    assert call(train, *TINY, "--epochs", 20).startswith("error: ")  # saves every 10 minutes
    assert disk["failed"] == 1
    run = RunDir(train.Config(save_every=10.0), [], loop.COLUMNS, new=True)
    now = time.monotonic()
    monkeypatch.setattr(run_dir.time, "monotonic", lambda: now)
    run.save("latest.pt", step=1)
    assert run.next_save == now + 60
    disk["full"] = False
    run.save("latest.pt", step=1)
    assert run.next_save == now + 600


def test_a_disk_that_stays_full_ends_with_one_line_and_the_old_checkpoint(trained, disk, capsys):
    disk["full"] = False
    assert call(train, *TINY, "--max_steps", 3) == 0
    before = Path("checkpoints/latest.pt").read_bytes()
    disk["full"] = True
    capsys.readouterr()
    code = call(train, "--resume", "--max_steps", 0)
    assert code.startswith("error: ") and "step 6" in code and "--resume" in code and "\n" not in code
    assert "No space left on device" in capsys.readouterr().err
    assert Path("checkpoints/latest.pt").read_bytes() == before
    disk["full"] = False
    assert call(train, "--resume", "--max_steps", 0) == 0  # there is room, and it ends well
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), load_checkpoint(trained / "checkpoints/latest.pt"))


@pytest.mark.parametrize("module, name, lost", [
    (train, "square_grid", "generated_epoch_0002.png"), (RunDir, "draw_loss", "loss.png"),
    (RunDir, "_append_metrics", "metrics.csv"), (RunPage, "render", "index.html"),
])
def test_a_file_of_outputs_that_cannot_be_written_ends_no_training(trained, monkeypatch, capsys, module, name, lost):
    write, calls = getattr(module, name), []

    def write_but_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            no_space()
        return write(*args, **kwargs)

    monkeypatch.setattr(module, name, write_but_once)
    assert call(train, *TINY, "--milestone_every", 2, "--sample_every", 1) == 0
    assert f"warning: no outputs/{lost}" in capsys.readouterr().err
    theirs = {path.name: path.read_bytes() for path in (trained / "outputs").iterdir()}
    ours = {path.name: path.read_bytes() for path in Path("outputs").iterdir()}
    for name in ("cost.json", "index.html"):  # which have the seconds
        del ours[name], theirs[name]
    if lost.startswith("generated"):
        del theirs[lost]
    assert ours == theirs  # the loss curve and the metrics are whole again after the next epoch
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), load_checkpoint(trained / "checkpoints/latest.pt"))


def test_outputs_that_were_removed_come_back(monkeypatch):
    draw = loss.draw_timesteps

    def draw_and_remove(*args):
        shutil.rmtree("outputs")
        return draw(*args)

    monkeypatch.setattr(loss, "draw_timesteps", draw_and_remove)
    assert call(train, *TINY, "--epochs", 2, "--batch_size", 8) == 0
    assert [row["epoch"] for row in metrics()] == ["1", "2"] and Path("outputs/generated_epoch_0002.png").exists()


def test_keep_limits_the_milestones():
    assert call(train, *TINY, "--epochs", 6, "--milestone_every", 1, "--keep", 2) == 0
    assert sorted(path.name for path in Path("checkpoints").glob("*.pt")) == [
        "epoch_0004.pt", "epoch_0005.pt", "final_model.pt", "latest.pt"]
    assert call(train, "--resume", "--epochs", 8, "--keep", 0) == 0
    kept = [path.stem for path in milestones(Path("checkpoints"))]
    assert kept == ["epoch_0004", "epoch_0005", "epoch_0006", "epoch_0007"]  # as eight epochs without a stop leave them
    Path("checkpoints/epoch_10000.pt").touch()
    assert [path.name for path in milestones(Path("checkpoints"))][-1] == "epoch_10000.pt"  # by number, not name


def test_keep_spares_the_milestones_that_were_named():
    flags = ["--epochs", 6, "--milestone_every", 1, "--milestones", 1, 3, "--keep", 1]
    assert call(train, *TINY, *flags) == 0
    assert [path.stem for path in milestones(Path("checkpoints"))] == ["epoch_0001", "epoch_0003", "epoch_0005"]
    assert call(train, "--resume", "--epochs", 7, "--milestones", 3) == 0
    assert [path.stem for path in milestones(Path("checkpoints"))] == ["epoch_0003", "epoch_0006"]


def test_a_kill_at_the_first_milestone_leaves_a_run_that_resumes(monkeypatch):
    """latest.pt is written before the milestone, and a milestone that a kill prevented is written on resume."""
    save = RunDir.save

    def die_at_the_milestone(run, name, **content):
        if name == "epoch_0001.pt":
            raise KeyboardInterrupt
        return save(run, name, **content)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", die_at_the_milestone)
        assert call(train, *TINY, "--milestone_every", 1) == 130
    assert [path.name for path in Path("checkpoints").glob("*.pt")] == ["latest.pt"]
    assert call(train, "--resume") == 0
    assert [path.stem for path in milestones(Path("checkpoints"))] == ["epoch_0001", "epoch_0002"]


# ---------------------------------------------------------------------------------------------------------------------
# two trainers, and stops


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_second_trainer_in_a_folder_is_refused_until_the_first_is_gone(capsys):
    Path("checkpoints").mkdir()
    ready, tell = os.pipe()
    first = os.fork()
    if first == 0:
        lock_folder(Path("checkpoints"))
        os.write(tell, b"!")
        time.sleep(600)
    os.read(ready, 1)
    try:
        assert_one_line(call(train, *TINY), capsys, f"process {first}", "checkpoints/", "--run_name")
        assert not list(Path("checkpoints").glob("*.pt")) and not Path("outputs/metrics.csv").exists()
        assert call(train, *TINY, "--run_name", "other", "--max_steps", 1) == 0
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert call(train, *TINY, "--max_steps", 1) == 0  # nothing to clean up


@pytest.mark.skipif(os.name != "posix", reason="POSIX locks")
def test_a_file_system_without_locks_is_no_obstacle(monkeypatch):
    import fcntl

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert call(train, *TINY, "--max_steps", 1) == 0


def test_a_run_that_came_and_went_while_this_one_read_its_images_is_not_overwritten(monkeypatch, capsys):
    load = run_images.load_images

    def load_while_another_trains(*args, **kwargs):
        monkeypatch.setattr(run_images, "load_images", load)
        assert call(train, *TINY, "--max_steps", 1) == 0
        return load(*args, **kwargs)

    monkeypatch.setattr(run_images, "load_images", load_while_another_trains)
    assert "--resume" in call(train, *TINY)
    assert load_checkpoint("checkpoints/latest.pt")["step"] == 1


@pytest.mark.skipif(os.name != "posix", reason="signals to a group are POSIX's")
def test_signals_to_all_processes_of_a_training_with_workers():
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the workers too. Then Ctrl-C twice while a step hangs."""
    Path("run.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from training import dataset, loss
dataset._default_memory_limit = lambda: 0
if sys.argv.pop() == "hang":
    loss.draw_timesteps = lambda *args: (open("hangs", "w"), time.sleep(600))
train.main()
""")
    Path("mine").mkdir()
    for i in range(9):
        Image.new("RGB", (20, 20), (28 * i,) * 3).save(f"mine/{i}.png")
    flags = [*TINY, "--data", "mine", "--workers", "2", "--epochs", "1000000", "--sample_every", "1000000"]

    def start(*more: str, until: str) -> subprocess.Popen:
        with open("out", "w") as out, open("err", "w") as err:
            command = [sys.executable, "run.py", *more]
            process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        deadline = time.monotonic() + 240
        while not Path(until).exists() or Path(until).name == "metrics.csv" and len(metrics()) < 2:
            assert process.poll() is None and time.monotonic() < deadline, Path("err").read_text()[-500:]
            time.sleep(0.1)
        return process

    process = start(*flags, "", until="outputs/metrics.csv")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) == 143
    assert "--resume" in Path("out").read_text() and "Traceback" not in Path("err").read_text()
    before = load_checkpoint("checkpoints/latest.pt")

    process = start("--resume", "hang", until="hangs")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for its step
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=100) == -signal.SIGINT
    assert same(load_checkpoint("checkpoints/latest.pt"), before)


# ---------------------------------------------------------------------------------------------------------------------
# numbers and memory


def spoil(monkeypatch, steps: set[int], value: float = float("nan")) -> None:
    """Multiply the loss of these steps by `value`."""
    weight, calls = NoiseScheduler.loss_weight, []

    def loss_weight(*args):
        calls.append(args)
        return weight(*args) * (value if len(calls) - 1 in steps else 1)

    monkeypatch.setattr(NoiseScheduler, "loss_weight", loss_weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(monkeypatch, capsys, value):
    spoil(monkeypatch, {3}, value)
    assert call(train, *TINY, "--max_steps", 3) == 0
    before = load_checkpoint("checkpoints/latest.pt")
    assert call(train, "--resume", "--max_steps", 4) == 0
    after = load_checkpoint("checkpoints/latest.pt")
    assert all(same(before[part], after[part]) for part in ("model", "ema")) and after["step"] == 4
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert "skipped 1 of the steps up to 4" in capsys.readouterr().err
    assert call(train, "--resume", "--max_steps", 0) == 0
    rows = metrics()
    assert [row["skipped"] for row in rows] == ["0", "1", "0"]
    assert float(rows[1]["loss"]) == before["stats"]["loss_sum"]  # the mean of the epoch's one good step


def test_an_epoch_without_a_single_good_step(monkeypatch):
    spoil(monkeypatch, {2, 3})
    assert call(train, *TINY) == 0
    assert [row["skipped"] for row in metrics()] == ["0", "2", "0"] and metrics()[1]["loss"] == "nan"


def test_a_run_of_bad_steps_stops_and_keeps_the_last_good_weights(monkeypatch):
    spoil(monkeypatch, set(range(4, 1000)))
    assert call(train, *TINY, "--epochs", 2) == 0
    before = Path("checkpoints/latest.pt").read_bytes()
    code = call(train, "--resume", "--epochs", 1000)
    assert code.startswith("error: no finite loss") and "--lr" in code and "float16" in code and "\n" not in code
    assert len(metrics()) == 2 + loop.MAX_SKIPPED / 2 - 1  # it stopped at the end of the epoch with the last one
    assert Path("checkpoints/latest.pt").read_bytes() == before


def test_float16_trains_with_a_scaler_and_resumes_exactly(capsys):
    """The first scale, 65536, is too large for some steps of this training, so its changes are part of the test."""
    flags = [*TINY, "--precision", "fp16", "--epochs", 4, "--loss_weighting", "min_snr", "--prediction", "x0"]
    assert call(train, *flags, "--run_name", "whole") == 0
    whole = load_checkpoint("checkpoints/whole/latest.pt")
    assert whole["scaler"]["scale"] < 65536 and whole["step"] == 8
    assert call(train, *flags, "--max_steps", 3) == 0
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), whole)
    assert call(train, *flags, "--precision", "fp32", "--run_name", "wide") == 0
    narrow, wide = ([float(row["loss"]) for row in metrics(f"{name}/metrics.csv")] for name in ("whole", "wide"))
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.1)  # a mean over other steps where some were skipped
    assert call(train, "--resume", "--run_name", "whole", "--epochs", 5, "--precision", "fp32") == 0  # and back again
    assert call(train, "--resume", "--run_name", "whole", "--epochs", 6, "--precision", "fp16") == 0


def test_steps_that_overflow_in_float16_are_skipped_until_the_scale_fits(monkeypatch, capsys):
    spoil(monkeypatch, set(range(100)), 1e4)
    assert call(train, *TINY, "--precision", "fp16", "--epochs", 10) == 0
    scale = load_checkpoint("checkpoints/latest.pt")["scaler"]["scale"]
    skipped = sum(int(row["skipped"]) for row in metrics())
    assert skipped > 0 and scale == 65536 / 2**skipped and "skipped" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
])
@pytest.mark.parametrize("flags, words", [
    ([], ["4 images at a time", "--grad_accum 2,", "2 at a time"]),
    (["--grad_accum", 2], ["2 images at a time", "--grad_accum 4,", "1 at a time"]),
    (["--grad_accum", 4], ["one image at a time", "--width"]),
])
def test_too_little_memory_is_one_line_that_says_what_to_try(monkeypatch, capsys, error, flags, words):
    def too_large(*args, **kwargs):
        raise error

    monkeypatch.setattr(train.UNet, "forward", too_large)
    code = call(train, *TINY, *flags)
    assert code.startswith("error: out of memory") and all(word in code for word in words) and "\n" not in code


def test_a_grid_that_needs_too_much_memory_ends_no_training(monkeypatch, capsys):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more lines")

    monkeypatch.setattr(Pipeline, "sample", too_large)
    assert call(train, *TINY) == 0
    assert "warning: no outputs/generated_epoch_0003.png (CUDA out of memory" in capsys.readouterr().err
    assert load_checkpoint("checkpoints/final_model.pt")["step"] == 6


def test_a_programming_error_is_not_hidden(monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train.UNet, "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        call(train, *TINY)


def test_the_folder_of_a_checkpoint_is_synced_too(monkeypatch):
    """The new name then survives a power cut, as the new bytes do."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
    save_checkpoint("folder/a.pt", step=1)
    assert synced == [Path("folder/a.pt").stat().st_ino, Path("folder").stat().st_ino]
