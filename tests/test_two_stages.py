"""`--autoencoder own`: an autoencoder and a diffusion in its latents, as two stages of one run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from scripts import assert_one_line, assert_same_run, call, call_in

import train
from tools import train_autoencoder
from training import loop
from training.distributed import DistEnv
from training.loss import AutoencoderLoss, DiffusionLoss
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")
RUN = ("--preset maker --data critters --num_critters 8 --image_size 32 --autoencoder_epochs 3 --epochs 3 "
       "--batch_size 4 --width 8 --groups 4 --blocks 1 --multipliers 1 --num_samples 4 --sample_steps 2 --timesteps 50 "
       "--sample_every 9 --device cpu --precision fp32").split()
FILES = ("latest.pt", "final_model.pt", "first_stage/latest.pt", "first_stage/final_model.pt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The checkpoints of a run that nothing stopped."""
    return call_in(tmp_path_factory.mktemp("undisturbed"), train, *RUN) / "checkpoints"


def stop_at(monkeypatch, loss: type, number: int) -> None:
    """Send SIGTERM when a loss draws its randomness for the given time."""
    draws, draw = [], loss.draw_randomness

    def draw_and_stop(self, *args):
        draws.append(1)
        if len(draws) == number:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, *args)

    monkeypatch.setattr(loss, "draw_randomness", draw_and_stop)


def assert_ends_as(undisturbed: Path) -> None:
    for name in FILES:
        assert_same_run(load_checkpoint(f"checkpoints/{name}"), load_checkpoint(undisturbed / name))


@pytest.mark.parametrize("loss, number", [(AutoencoderLoss, 2), (DiffusionLoss, loop.ProgressBar.FIRST + 10 + 4)])
def test_a_run_resumes_exactly_in_either_stage(loss, number, undisturbed, monkeypatch, capsys):
    """The estimate of the duration makes some steps of the diffusion before the first stage."""
    with monkeypatch.context() as patch:
        stop_at(patch, loss, number)
        assert call(train, *RUN) == 128 + signal.SIGTERM
    assert Path("checkpoints/latest.pt").exists() == (loss is DiffusionLoss)
    page = Path("outputs/index.html").read_text()  # of the run: the way to that of its first stage, or its own
    assert ('http-equiv="refresh"' in page) == (loss is AutoencoderLoss) and 'href="first_stage/index.html"' in page
    assert "continue with: python train.py --resume\n" in capsys.readouterr().out
    assert call(train, "--resume") == 0
    assert_ends_as(undisturbed)


def test_a_kill_between_the_stages_repeats_neither(undisturbed, monkeypatch, capsys):
    assert call(train, *RUN) == 0
    for name in ("latest.pt", "final_model.pt"):
        Path("checkpoints", name).unlink()
    monkeypatch.setattr(train, "train_autoencoder", None)  # must not be needed
    assert call(train, "--resume") == 0
    assert_ends_as(undisturbed)


def test_a_run_that_was_stopped_in_its_first_stage_is_not_overwritten(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, AutoencoderLoss, 2)
        assert call(train, *RUN) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert_one_line(call(train, *RUN), capsys, "checkpoints/first_stage/latest.pt is from an earlier run", "--resume")
    assert_one_line(call(train, "--resume", "--lr", "1"), capsys, "the run to resume has --lr")
    code = call(train_autoencoder, "--resume", "--run_name", "first_stage")
    assert_one_line(code, capsys, "first stage of a longer run", "train.py --resume")


def test_an_unknown_setting_of_a_first_stage_is_refused(undisturbed, capsys):
    content = load_checkpoint(undisturbed / "first_stage/latest.pt")
    content.pop("format")
    content["next_config"]["colour"] = "red"
    save_checkpoint("checkpoints/first_stage/latest.pt", **content)
    assert_one_line(call(train, "--resume"), capsys, "checkpoints/first_stage/latest.pt", "unknown here (colour)")


def test_the_duration_counts_both_stages(monkeypatch):
    """The first stage has 28 steps, after 25 of which the estimate comes."""
    announced = []
    monkeypatch.setattr(loop, "announce_duration", lambda seconds, has_faster_way: announced.append(seconds))
    monkeypatch.setattr(train, "estimate_diffusion", lambda *_: 5000.0)
    assert call(train, *RUN, "--autoencoder_epochs", 28, "--max_steps", 1) == 0
    assert len(announced) == 1 and 5000 < announced[0] < 5100


def test_the_estimate_leaves_no_trace(monkeypatch, capsys):
    config = train.Config(**{**train.PRESETS["maker"], "data": "critters", "num_critters": 8, "image_size": 32,
                             "width": 8, "groups": 4, "blocks": 1, "multipliers": (1,), "epochs": 4, "device": "cpu"})
    seconds = train.estimate_diffusion(config, train.DistEnv())
    assert 0 < seconds < 100 and capsys.readouterr().out == "" and not list(Path().iterdir())


def test_processes_that_cannot_share_a_step_of_the_first_stage():
    dist = DistEnv()
    dist.world_size = 3
    with pytest.raises(ValueError, match="--autoencoder own takes 8 images a step, which 3 processes"):
        train.train_own_autoencoder(train.Config(**train.PRESETS["maker"], batch_size=12), False, dist)


def test_out_of_memory_in_the_first_stage_counts_its_own_images(monkeypatch, capsys):
    def too_large(*_):
        raise MemoryError

    monkeypatch.setattr(AutoencoderLoss, "__call__", too_large)
    line = call(train, *RUN, "--grad_accum", 2)
    capsys.readouterr()
    assert_one_line(line, capsys, "out of memory with 4 images at a time", "--grad_accum 4", "2 at a time")
