"""train.py as people use it: through its command line, in a folder of their own.

The tests call main() in this process, since a new one takes seconds to import torch. test_bad_input.py and
test_resume.py start the real command.
"""

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import denoising
import generate
import runs
import train
import training_step
import unet
from checkpoint import load_checkpoint
from forward_diffusion import NoiseScheduler
from reverse_diffusion import sample_seeds
from scripts import TINY, assert_one_line, assert_same_run, call, metrics, pictures
from unet import UNetConfig

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_run_leaves_its_grids_curve_numbers_and_weights(trained, monkeypatch):
    monkeypatch.chdir(trained)
    grids = [f"generated_epoch_000{i}.png" for i in (1, 2, 3)]
    assert sorted(os.listdir("outputs")) == ["cost.json", *grids, "loss.png", "metrics.csv"]
    assert sorted(os.listdir("checkpoints")) == [".lock", "epoch_0002.pt", "final_model.pt", "latest.pt"]
    assert Image.open("outputs/generated_epoch_0003.png").size == (2 * 16 + 3 * 2, 2 * 16 + 3 * 2)
    assert Image.open("outputs/loss.png").size[0] > 400
    rows = metrics()
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert all(0 < float(row["loss"]) < 3 for row in rows)
    assert load_checkpoint("checkpoints/epoch_0002.pt")["step"] == 4
    assert load_checkpoint("checkpoints/final_model.pt")["step"] == 6


def test_the_first_loss_is_that_of_the_answer_zero():
    """A new network answers 0, so its loss for eps is the mean square of the noise: 1, give or take 0.026 x 3.5."""
    assert call(train, *TINY, "--num_critters", 4, "--image_size", 16, "--epochs", 1) == 0
    assert float(metrics()[0]["loss"]) == pytest.approx(1, abs=0.09)


@pytest.mark.parametrize("prediction, epochs, allowance", [("v", 120, 25), ("x0", 60, 10)])
def test_training_and_sampling_together_learn_a_colour(prediction, epochs, allowance):
    """Four pictures of one colour: what is sampled must have it. Measured: within 15 levels of 255 for v, 3 for x0."""
    colour = (230, 60, 140)
    Path("flat").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), colour).save(f"flat/{i}.png")
    flags = ("--data flat --image_size 8 --width 16 --groups 4 --multipliers 1 --blocks 1 --batch_size 16 "
             "--augment none --lr 3e-3 --lr_schedule cosine --warmup_steps 10 --ema_decay 0.95 --schedule cosine "
             "--num_samples 1 --sample_steps 1 --device cpu --precision fp32").split()
    assert call(train, *flags, "--prediction", prediction, "--epochs", epochs, "--sample_every", epochs) == 0
    for sampler in ("ddpm", "ddim"):
        assert call(generate, "--num_images", 8, "--sampler", sampler, "--steps", 50, "--device", "cpu", "--precision",
                    "fp32", "--individual", "--output", f"{sampler}.png") == 0
        found = np.stack(list(pictures(sampler).values())).mean(axis=(0, 1, 2))
        assert np.abs(found - colour).max() < allowance


def test_the_same_seed_gives_the_same_run_and_another_does_not(trained):
    for seed in (0, 1):
        assert call(train, *TINY, "--seed", seed, "--run_name", f"seed{seed}") == 0
    theirs = load_checkpoint(trained / "checkpoints/latest.pt")
    assert_same_run(load_checkpoint("checkpoints/seed0/latest.pt"), theirs)
    other = load_checkpoint("checkpoints/seed1/latest.pt")["ema"]
    assert not any(other[name].equal(theirs["ema"][name]) for name in other if name.endswith("conv_1.weight"))
    assert Path("outputs/seed1/metrics.csv").exists()


def test_the_average_follows_the_weights():
    assert call(train, *TINY, "--max_steps", 1) == 0
    first = load_checkpoint("checkpoints/latest.pt")
    assert call(train, "--resume", "--max_steps", 2) == 0
    second = load_checkpoint("checkpoints/latest.pt")
    for name, weight in second["model"].items():  # the second decay is 2/11, though --ema_decay is 0.9999
        expected = (2 * first["ema"][name] + 9 * weight) / 11
        torch.testing.assert_close(second["ema"][name], expected, rtol=1e-4, atol=1e-6)
    assert not all(weight.equal(first["model"][name]) for name, weight in second["model"].items())
    assert call(train, *TINY, "--max_steps", 3, "--ema_decay", 0, "--run_name", "none") == 0
    after = load_checkpoint("checkpoints/none/latest.pt")
    assert all(after["ema"][name].equal(weight) for name, weight in after["model"].items())


@pytest.mark.parametrize("batch_size, num_timesteps", [(1, 10), (7, 10), (16, 1000), (50, 20)])
def test_timesteps_are_uniform_and_spread_over_the_batch(batch_size, num_timesteps):
    generator, batches = torch.Generator().manual_seed(0), 10_000 // batch_size
    t = torch.stack([denoising.draw_timesteps(batch_size, num_timesteps, generator) for _ in range(batches)])
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == num_timesteps - 1
    part = torch.arange(batch_size)
    assert (t >= part * num_timesteps // batch_size).all()
    assert (t <= (part + 1) * num_timesteps / batch_size).all()
    counts = torch.bincount(t.flatten(), minlength=num_timesteps).double()
    expected = t.numel() / num_timesteps
    assert (counts > 0).all() and (counts - expected).abs().max() < 5 * expected**0.5


def test_timesteps_stay_in_range_when_float32_rounds_up(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert denoising.draw_timesteps(64, 1000, torch.Generator()).max() == 999


def test_learning_rate():
    config = train.Config(lr=0.1, warmup_steps=4)
    assert [training_step.learning_rate(config, step, 100) for step in (0, 1, 3, 4, 99)] == pytest.approx(
        [0.025, 0.05, 0.1, 0.1, 0.1])
    config = train.Config(lr=0.1, lr_schedule="cosine")
    assert [training_step.learning_rate(config, step, 100) for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0])
    assert 0 < training_step.learning_rate(config, 99, 100) < 1e-4


def settled(monkeypatch) -> list[train.Config]:
    """The settings of trainings, each of which ends before it begins."""
    configs = []
    monkeypatch.setattr(train, "Training", lambda config, checkpoint: (configs.append(config), sys.exit(0)))
    return configs


def test_presets_and_flags(monkeypatch):
    configs = settled(monkeypatch)
    for flags in [], ["--preset", "quick"], ["--width", 64, "--preset", "quick", "--lr", "5e-4", "--multipliers", 1, 4]:
        assert call(train, *flags) == 0
    reference, quick, changed = configs
    network = {name: value for name, value in asdict(UNetConfig()).items() if hasattr(reference, name)}
    assert {name: getattr(reference, name) for name in network} == network and len(network) > 4
    assert (reference.timesteps, reference.schedule, reference.prediction) == (1000, "linear", "eps")
    assert (quick.data, quick.image_size, quick.width, quick.prediction) == ("critters", 32, 32, "v")
    assert changed == train.Config(**{**asdict(quick), "width": 64, "lr": 5e-4, "multipliers": (1, 4)})


@pytest.mark.parametrize("flags, multipliers", [
    (["--image_size", 128], (1, 1, 2, 4, 8)), (["--image_size", 256], (1, 1, 1, 2, 4, 8)),
    (["--image_size", 96], (1, 2, 4, 8)), (["--image_size", 128, "--multipliers", 1, 2], (1, 2)),
    (["--preset", "quick", "--image_size", 128], (1, 2, 2)),
])
def test_the_levels_follow_the_size_unless_they_are_given(flags, multipliers, monkeypatch):
    configs = settled(monkeypatch)
    assert call(train, *flags) == 0
    assert configs[0].multipliers == multipliers


def test_checkpoints_keep_the_levels_that_a_size_stood_for(monkeypatch):
    """So that the run goes on with them whatever a later version thinks of that size."""
    levels = TINY.index("--multipliers")
    without = TINY[:levels] + TINY[levels + 3 :]
    monkeypatch.setitem(unet.LEVELS, 16, (1, 2))
    assert call(train, *without, "--max_steps", 1) == 0
    monkeypatch.setitem(unet.LEVELS, 16, (1, 2, 4))
    assert call(train, "--resume", "--max_steps", 2) == 0
    content = load_checkpoint("checkpoints/latest.pt")
    assert content["config"]["multipliers"] == content["unet"]["multipliers"] == (1, 2)


def test_gradient_checkpointing_changes_nothing_and_may_be_turned_on_later():
    flags = [*TINY, "--dropout", 0.3, "--grad_accum", 2]
    assert call(train, *flags, "--run_name", "plain") == 0
    assert call(train, *flags, "--max_steps", 3) == 0
    assert call(train, "--resume", "--max_steps", 0, "--grad_checkpoint") == 0
    content = load_checkpoint("checkpoints/latest.pt")
    assert content["config"]["grad_checkpoint"]
    assert_same_run(content, load_checkpoint("checkpoints/plain/latest.pt"))


def test_help_has_every_setting_and_its_default(capsys):
    assert call(train, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(train.Config):
        assert f"--{setting.name} " in text
    assert text.count("(default:") == len(fields(train.Config)) + 1  # and the preset's


def test_without_the_pokemon_it_says_so_and_trains_on_critters(capsys):
    Path("data/pokemon_jpg").mkdir(parents=True)
    tiny = TINY[TINY.index("critters") + 1 :]
    assert call(train, *tiny, "--max_steps", 1) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data/pokemon_jpg/ has no images" in said and "training on critters" in said
    assert "kaggle.com/datasets/kvpratama/pokemon-images-dataset" in said
    assert load_checkpoint("checkpoints/final_model.pt")["config"]["data"] == "critters"
    # But a folder that somebody names is meant.
    code = call(train, *tiny, "--data", "data/pokemon_jpg", "--run_name", "named")
    assert code.startswith("error: ") and "data/pokemon_jpg" in code


def test_a_grid_shows_the_same_noise_at_every_epoch():
    """Also for ddpm, which draws noise on the way, and for more images than go into one batch."""
    zero, scheduler, cpu = (lambda x_t, t: 0 * x_t), NoiseScheduler(50), torch.device("cpu")
    first, again = (sample_seeds(zero, scheduler, range(66), 16, cpu, "fp32", sampler="ddpm") for _ in range(2))
    assert first.shape == (66, 3, 16, 16) and first.equal(again)
    assert len({image.numpy().tobytes() for image in first}) == 66


def test_the_reference_network_refuses_sizes_that_it_cannot_halve(capsys):
    code = call(train, "--data", "critters", "--image_size", 30, "--device", "cpu")
    assert_one_line(code, capsys, "multiple of 8", "30")


def test_named_epochs_are_kept_and_drawn():
    assert call(train, *TINY, "--milestones", 1, 3, "--milestone_every", 2, "--sample_every", 9) == 0
    assert sorted(path.name for path in Path("checkpoints").glob("*.pt")) == [
        "epoch_0001.pt", "epoch_0002.pt", "final_model.pt", "latest.pt"]  # the third is the final model
    assert [path.name for path in sorted(Path("outputs").glob("generated*"))] == [
        "generated_epoch_0001.png", "generated_epoch_0003.png"]


def test_a_run_says_what_it_has_cost_and_a_resumed_one_adds_to_it():
    assert call(train, *TINY, "--max_steps", 3) == 0
    first = json.loads(Path("outputs/cost.json").read_text())
    assert first["images"] == 12 and first["seconds"] > 0 and first["peak_memory"] > 50_000_000  # PyTorch alone
    Path("outputs/cost.json").write_text(json.dumps({**first, "seconds": 5000, "peak_memory": 10**15}))
    assert call(train, "--resume", "--max_steps", 0) == 0
    both = json.loads(Path("outputs/cost.json").read_text())
    assert both["images"] == 24 and 5000 < both["seconds"] < 5600 and both["peak_memory"] == 10**15
    Path("outputs/cost.json").write_text("no longer JSON")
    assert call(train, "--resume", "--epochs", 4) == 0
    assert json.loads(Path("outputs/cost.json").read_text())["images"] == 32


def test_the_average_keeps_no_graph(monkeypatch):
    """One step's graph hanging on the one before would fill the memory in a long run."""
    seen = []
    monkeypatch.setattr(train, "sample_seeds", lambda ema, *args, **kwargs: seen.append(ema) or torch.zeros(1, 3, 8, 8))
    assert call(train, *TINY, "--epochs", 1) == 0
    assert not any(p.requires_grad for p in seen[0].parameters())


def test_training_in_bfloat16_is_training_in_float32_but_for_rounding():
    for precision in ("fp32", "bf16"):
        assert call(train, *TINY, "--precision", precision, "--run_name", precision, "--epochs", 2) == 0
    wide, narrow = ([float(row["loss"]) for row in metrics(f"{name}/metrics.csv")] for name in ("fp32", "bf16"))
    assert wide != narrow and narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize("seconds, words", [
    (40, ["1 min"]), (3 * 3600, ["3.0 hours"]), (5 * 86400, ["5.0 days", "--preset quick"]),
])
def test_the_duration_is_announced_and_days_on_a_cpu_name_the_way_out(seconds, words, capsys):
    runs.announce_duration(seconds, torch.device("cpu"))
    said = capsys.readouterr().out
    assert all(word in said for word in words)
    assert ("quick" in said) == (seconds > 86400)


def test_init_starts_from_the_average_of_another_run(final, capsys):
    """With a rate of nearly 0 it also ends there."""
    assert call(train, *TINY, "--init", final, "--lr", 1e-12, "--max_steps", 2) == 0
    there, here = load_checkpoint(final)["ema"], load_checkpoint("checkpoints/final_model.pt")["ema"]
    assert all(torch.allclose(there[name], here[name], atol=1e-9) for name in there)
    capsys.readouterr()
    for flags in (["--width", 16], ["--labels", "none"], ["--prediction", "v"]):
        code = call(train, *TINY, "--init", final, "--run_name", "other", *flags)
        assert_one_line(code, capsys, "--init", str(final), "of another network")
