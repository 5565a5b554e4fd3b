"""However the work on a batch is divided, among processes, parts or decoding workers, the training is the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import ROOT, TINY, assert_one_line, assert_same_run, call, metrics

import train
from training import dataset, distributed
from training.distributed import DistEnv
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")

# One step an epoch, so that metrics.csv has the loss of each step.
TWENTY_STEPS = [*TINY, "--epochs", "20", "--batch_size", "8", "--lr", "1e-3", "--sample_every", "1000"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> list[float]:
    """Return the losses of twenty steps in one process and one part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        assert call(train, *TWENTY_STEPS) == 0
        return [float(row["loss"]) for row in metrics()]


def torchrun(script: Path | str, *flags: str) -> subprocess.CompletedProcess:
    """Run two processes on this machine's CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # which says what a crash was
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_have_the_losses_of_one(losses):
    done = torchrun(ROOT / "train.py", *TWENTY_STEPS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1  # the main process speaks for both
    assert [float(row["loss"]) for row in metrics()] == pytest.approx(losses, rel=1e-5) and len(losses) == 20


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_process_that_dies_ends_the_other_and_one_alone_resumes(losses):
    Path("die.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from training import loss
draw, calls = loss.draw_timesteps, []
def draw_or_die(*args):
    calls.append(args)
    if len(calls) == 12 and os.environ["RANK"] == "1":
        open("died", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
loss.draw_timesteps = draw_or_die
train.main()
""")
    done = torchrun("die.py", *TWENTY_STEPS, "--save_every", "0")
    seconds = time.time() - float(Path("died").read_text())
    assert done.returncode != 0 and seconds < 60  # two or three, on a machine that has nothing else to do
    assert "error: another process of this training has ended" in done.stderr
    step = load_checkpoint("checkpoints/latest.pt")["step"]
    assert 9 <= step <= 12
    assert call(train, "--resume") == 0
    assert [float(row["loss"]) for row in metrics()] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--augment", "none", "--prediction", "v"]])
def test_parts_of_a_batch_have_the_losses_of_the_whole(losses, more):
    if more:
        assert call(train, *TWENTY_STEPS, *more, "--run_name", "whole") == 0
        losses = [float(row["loss"]) for row in metrics("whole/metrics.csv")]
    assert call(train, *TWENTY_STEPS, *more, "--grad_accum", 4) == 0
    assert [float(row["loss"]) for row in metrics()] == pytest.approx(losses, rel=1e-5) and len(losses) == 20


def test_the_parts_may_change_on_resume(losses):
    assert call(train, *TWENTY_STEPS, "--grad_accum", 2, "--max_steps", 9) == 0
    assert call(train, "--resume", "--grad_accum", 8, "--max_steps", 0) == 0
    assert [float(row["loss"]) for row in metrics()] == pytest.approx(losses, rel=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused(capsys):
    assert_one_line(call(train, *TINY, "--grad_accum", 3), capsys, "--batch_size 4", "--grad_accum 3", "multiple of 3")


def test_the_slices_of_the_processes_make_the_batch():
    dist = DistEnv()
    dist.world_size, indices = 3, list(range(12))
    parts = []
    for dist.rank in range(3):
        parts += indices[dist.rank_slice(12, 2)]
    assert parts == indices
    with pytest.raises(ValueError, match="--batch_size 15 .* 3 processes times --grad_accum 2; choose a multiple of 6"):
        dist.rank_slice(15, 2)


def test_an_environment_that_torchrun_did_not_set_is_refused(monkeypatch, capsys):
    for name, value in dict(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0", MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    assert_one_line(call(train, *TINY), capsys, "WORLD_SIZE", "must be numbers")


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("error, message, status", [
    (None, "", 0),
    (SystemExit("error: no such folder"), "error: no such folder", 1),
    (SystemExit(143), "", 143),
    (RuntimeError("Connection closed by peer [127.0.0.1]"), "error: another process of this training has ended", 1),
    (RuntimeError("shapes do not match"), "Traceback", 1),
])
def test_each_of_several_processes_ends_by_itself_and_the_main_one_alone_prints(monkeypatch, capsys, is_main, error,
                                                                                message, status):
    ends = []
    monkeypatch.setattr(distributed, "_end_process", lambda *arguments: ends.append(arguments))
    dist = DistEnv()
    dist.world_size, dist.is_main = 2, is_main
    with dist.main_process_output():
        print("said")
        if error:
            raise error
    (end,) = ends
    assert end[0] == is_main and end[1].startswith(message) and bool(end[1]) == bool(message) and end[2] == status
    assert capsys.readouterr().out == ("said\n" if is_main else "")


@pytest.mark.skipif(os.name == "nt", reason="processes that are started anew do not see the small memory")
def test_any_number_of_workers_is_the_same_training(monkeypatch):
    """Files that are read as needed, one of them broken; and the memory in which they would all fit."""
    Path("mine").mkdir()
    for i in range(9):
        Image.new("RGB", (20, 24), (25 * i, 90, 200)).save(f"mine/{i}.png")
    Path("mine/4.png").write_bytes(b"")
    monkeypatch.setattr(dataset, "_default_memory_limit", lambda: 0)
    runs = []
    for workers in (0, 1, 3):
        assert call(train, *TINY, "--data", "mine", "--workers", workers, "--run_name", workers) == 0
        runs.append(load_checkpoint(f"checkpoints/{workers}/latest.pt"))
    for run in runs[1:]:
        assert_same_run(run, runs[0])
    assert runs[0]["step"] == 9


def test_two_stages_in_two_processes_are_those_in_one():
    """The processes meet once, wait for each other between the stages, and part at the end."""
    flags = ("--preset maker --data critters --num_critters 8 --image_size 32 --autoencoder_epochs 1 --epochs 1 "
             "--batch_size 8 --width 8 --groups 4 --blocks 1 --multipliers 1 --num_samples 2 --sample_steps 2 "
             "--timesteps 50 --device cpu --precision fp32").split()
    assert call(train, *flags, "--run_name", "one") == 0
    done = torchrun(ROOT / "train.py", *flags, "--run_name", "two")
    assert done.returncode == 0, done.stderr
    for name in ("first_stage/final_model.pt", "final_model.pt"):
        one, two = (load_checkpoint(f"checkpoints/{run}/{name}") for run in ("one", "two"))
        assert all(torch.allclose(one["ema"][key], two["ema"][key], atol=1e-4) for key in one["ema"])
