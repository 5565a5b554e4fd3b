"""train.py through its command line, in a folder of its own.

The tests call main() in this process, since a new one takes seconds to import torch. test_bad_input.py and
test_resume.py start the real command.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import TINY, assert_one_line, assert_same_run, call, metrics, pictures

import generate
import train
import unet
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from models.space import PixelSpace
from training import loop, loss
from training.step import learning_rate
from unet import UNetConfig
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")


def test_a_run_writes_grids_loss_curve_metrics_and_weights(trained, monkeypatch):
    monkeypatch.chdir(trained)
    grids = [f"generated_epoch_000{i}.png" for i in (1, 2, 3)]
    assert sorted(os.listdir("outputs")) == ["cost.json", *grids, "index.html", "loss.png", "metrics.csv"]
    assert sorted(os.listdir("checkpoints")) == [".lock", "epoch_0002.pt", "final_model.pt", "latest.pt"]
    assert Image.open("outputs/generated_epoch_0003.png").size == (2 * 16 + 3 * 2, 2 * 16 + 3 * 2)
    assert Image.open("outputs/loss.png").size[0] > 400
    rows = metrics()
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert all(0 < float(row["loss"]) < 3 for row in rows)
    assert load_checkpoint("checkpoints/epoch_0002.pt")["step"] == 4
    assert load_checkpoint("checkpoints/final_model.pt")["step"] == 6


def test_the_first_loss_is_that_of_predicting_zero():
    """A new network outputs 0, so its loss for eps is the mean square of the noise: 1, within 0.026 x 3.5."""
    assert call(train, *TINY, "--num_critters", 4, "--image_size", 16, "--epochs", 1) == 0
    assert float(metrics()[0]["loss"]) == pytest.approx(1, abs=0.09)


@pytest.mark.parametrize("prediction, epochs, tolerance", [("v", 120, 25), ("x0", 60, 10)])
def test_training_and_sampling_learn_a_colour(prediction, epochs, tolerance):
    """Samples of four images of one colour must have it. Measured: within 15 levels of 255 for v, 3 for x0."""
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
        drawn = np.stack(list(pictures(sampler).values())).mean(axis=(0, 1, 2))
        assert np.abs(drawn - colour).max() < tolerance


def test_the_seed_decides_the_run_and_the_data_seed_the_critters(trained):
    theirs = load_checkpoint(trained / "checkpoints/latest.pt")
    for flag in ("--seed", "--data_seed"):
        for seed in (0, 1) if flag == "--seed" else (1,):
            assert call(train, *TINY, flag, seed, "--run_name", f"{flag[2:]}_{seed}") == 0
    runs = {name: load_checkpoint(f"checkpoints/{name}/latest.pt") for name in ("seed_0", "seed_1", "data_seed_1")}
    assert_same_run(runs["seed_0"], theirs)
    assert Path("outputs/seed_1/metrics.csv").exists()

    # Another seed: the same critters, other weights.
    assert runs["seed_1"]["fingerprint"] == theirs["fingerprint"]
    convolutions = [name for name in theirs["ema"] if name.endswith("conv_1.weight")]
    assert not any(runs["seed_1"]["ema"][name].equal(theirs["ema"][name]) for name in convolutions)

    # Other critters: the same weights, but for six steps on other images.
    assert runs["data_seed_1"]["fingerprint"] != theirs["fingerprint"]
    for name in convolutions:
        ours, other = runs["data_seed_1"]["ema"][name], theirs["ema"][name]
        assert torch.allclose(ours, other, atol=0.01) and not ours.equal(other)


def test_the_ema_follows_the_weights():
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
    t = torch.stack([loss.draw_timesteps(batch_size, num_timesteps, generator) for _ in range(batches)])
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == num_timesteps - 1
    part = torch.arange(batch_size)
    assert (t >= part * num_timesteps // batch_size).all()
    assert (t <= (part + 1) * num_timesteps / batch_size).all()
    counts = torch.bincount(t.flatten(), minlength=num_timesteps).double()
    expected = t.numel() / num_timesteps
    assert (counts > 0).all() and (counts - expected).abs().max() < 5 * expected**0.5


def test_timesteps_stay_in_range_when_float32_rounds_up(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert loss.draw_timesteps(64, 1000, torch.Generator()).max() == 999


@pytest.mark.parametrize("schedule, mean, std", [("cosine", 0.0, 1.2), ("cosine", -0.5, 0.8), ("linear", 0.3, 1.0)])
def test_noise_levels_are_lognormal_and_spread_over_the_batch(schedule, mean, std):
    scheduler, generator = NoiseScheduler(schedule=schedule), torch.Generator().manual_seed(0)
    t = torch.stack([loss.draw_lognormal_timesteps(16, scheduler, mean, std, generator) for _ in range(1000)])
    levels = (1 / scheduler.alphas_cumprod - 1).log()[t] / 2
    assert levels.mean().item() == pytest.approx(mean, abs=0.01) and levels.std().item() == pytest.approx(std, rel=0.02)
    assert (levels.diff(dim=1) >= 0).all()  # one in each sixteenth of the distribution
    far = loss.draw_lognormal_timesteps(16, scheduler, 50.0, 1.0, generator)
    assert (far == scheduler.num_timesteps - 1).all()


def test_lognormal_noise_levels_train_and_need_a_deviation(capsys):
    assert call(train, *TINY, "--max_steps", 1, "--lognormal", -0.5, 1.2) == 0
    settings = load_checkpoint("checkpoints/latest.pt")["config"]
    assert settings["lognormal"] == (-0.5, 1.2)
    capsys.readouterr()
    for wrong in ((0, 0), (1,), (0, 1, 2)):
        assert_one_line(call(train, *TINY, "--lognormal", *wrong, "--run_name", "none"), capsys, "deviation above 0")


def test_lognormal_alone_undoes_that_of_a_preset():
    assert call(train, "--preset", "quick", *TINY, "--max_steps", 1, "--lognormal") == 0
    assert load_checkpoint("checkpoints/latest.pt")["config"]["lognormal"] == ()


def test_learning_rate():
    config = train.Config(lr=0.1, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in (0, 1, 3, 4, 99)] == pytest.approx(
        [0.025, 0.05, 0.1, 0.1, 0.1])
    config = train.Config(lr=0.1, lr_schedule="cosine")
    assert [learning_rate(config, step, 100) for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0])
    assert 0 < learning_rate(config, 99, 100) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# settings


@pytest.fixture
def configs(monkeypatch) -> list[train.Config]:
    """The settings of trainings, each of which ends before it reads an image."""
    configs = []
    monkeypatch.setattr(train, "load_run_images", lambda config, checkpoint: (configs.append(config), sys.exit(0)))
    return configs


def test_presets_and_flags(configs):
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
def test_the_levels_follow_the_size_unless_they_are_given(flags, multipliers, configs):
    assert call(train, *flags) == 0
    assert configs[0].multipliers == multipliers


def test_checkpoints_keep_the_levels_that_a_size_stood_for(monkeypatch):
    """A run resumes with them, whatever a later version thinks of that size."""
    levels = TINY.index("--multipliers")
    without = TINY[:levels] + TINY[levels + 3 :]
    monkeypatch.setitem(unet.LEVELS, 16, (1, 2))
    assert call(train, *without, "--max_steps", 1) == 0
    monkeypatch.setitem(unet.LEVELS, 16, (1, 2, 4))
    assert call(train, "--resume", "--max_steps", 2) == 0
    content = load_checkpoint("checkpoints/latest.pt")
    assert content["config"]["multipliers"] == content["network"]["config"]["multipliers"] == (1, 2)


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
    settings = fields(train.Config)
    for setting in settings:
        assert f"--{setting.name} " in text
    switches = [setting for setting in settings if setting.default is False]
    assert text.count("(default:") == len(settings) - len(switches) + 1  # and the preset's


def test_without_the_pokemon_it_trains_on_critters_and_says_so_at_both_ends(capsys):
    Path("data/pokemon_jpg").mkdir(parents=True)
    tiny = TINY[TINY.index("critters") + 1 :]
    assert call(train, *tiny, "--max_steps", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] and lines[-2].startswith("done: ")
    assert "NO IMAGES IN data/pokemon_jpg/: TRAINING ON CRITTERS" in lines[0]
    assert "kaggle.com/datasets/kvpratama/pokemon-images-dataset" in lines[0] and "--data" in lines[0]
    assert load_checkpoint("checkpoints/final_model.pt")["config"]["data"] == "critters"
    # A resumed run has its data, and a run on critters by --data has nothing to explain.
    assert call(train, "--resume", "--max_steps", 2) == 0
    assert call(train, *TINY, "--max_steps", 1, "--run_name", "critters") == 0
    assert "NO IMAGES" not in capsys.readouterr().out
    # But a folder that somebody names is meant.
    code = call(train, *tiny, "--data", "data/pokemon_jpg", "--run_name", "named")
    assert code.startswith("error: ") and "data/pokemon_jpg" in code


def test_the_reference_network_refuses_sizes_that_it_cannot_halve(capsys):
    code = call(train, "--data", "critters", "--image_size", 30, "--device", "cpu")
    assert_one_line(code, capsys, "multiple of 8", "30")


def test_an_snr_of_zero_needs_uniform_weights(capsys):
    """min_snr gives the last timestep, from which sampling starts, the weight 0, and --lognormal never draws it."""
    flags = [*TINY, "--zero_terminal_snr", "--prediction", "v", "--max_steps", 1]
    assert_one_line(call(train, *flags, "--loss_weighting", "min_snr"), capsys, "--zero_terminal_snr",
                    "--loss_weighting uniform")
    assert_one_line(call(train, *flags, "--lognormal", -0.5, 1), capsys, "--zero_terminal_snr", "no --lognormal")
    assert not Path("checkpoints").exists()
    assert call(train, *flags) == 0


@pytest.mark.parametrize("flags, words", [
    (["--labels", "none"], "needs types"), (["--label_dropout", 0], "--label_dropout above 0"),
])
def test_guidance_needs_labels_and_label_dropout(flags, words, capsys):
    assert_one_line(call(train, *TINY, "--guidance", 2.5, *flags), capsys, "--guidance 2.5", words)
    assert not Path("checkpoints").exists()
    assert call(train, *TINY, *flags, "--max_steps", 1) == 0
    capsys.readouterr()
    assert_one_line(call(train, "--resume", "--guidance", 2.5), capsys, "--guidance 2.5", words)


# ---------------------------------------------------------------------------------------------------------------------
# grids, milestones, cost


def test_a_grid_shows_the_same_noise_at_every_epoch():
    """Also for ddpm, which draws noise on the way, and for more images than go into one batch."""
    pipeline = Pipeline(lambda x_t, t: 0 * x_t, NoiseScheduler(50), PixelSpace(), dict(image_size=16, prediction="eps"),
                        (), torch.device("cpu"), "fp32")
    first, again = (pipeline.sample(range(66), sampler="ddpm") for _ in range(2))
    assert first.shape == (66, 3, 16, 16) and first.equal(again)
    assert len({image.numpy().tobytes() for image in first}) == 66


def test_named_epochs_are_kept_and_drawn():
    assert call(train, *TINY, "--milestones", 1, 3, "--milestone_every", 2, "--sample_every", 9) == 0
    assert sorted(path.name for path in Path("checkpoints").glob("*.pt")) == [
        "epoch_0001.pt", "epoch_0002.pt", "final_model.pt", "latest.pt"]  # the third is the final model
    assert [path.name for path in sorted(Path("outputs").glob("generated*"))] == [
        "generated_epoch_0001.png", "generated_epoch_0003.png"]


def test_the_cost_of_a_run_is_written_and_a_resumed_one_adds_to_it():
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


def test_the_ema_keeps_no_graph(monkeypatch):
    """One step's graph hanging on the one before would fill the memory in a long run."""
    networks = []

    def keep_network(pipeline, seeds, **options):
        networks.append(pipeline.net)
        return torch.zeros(1, 3, 8, 8)

    monkeypatch.setattr(Pipeline, "sample", keep_network)
    assert call(train, *TINY, "--epochs", 1) == 0
    assert not any(p.requires_grad for p in networks[0].parameters())


def test_training_in_bfloat16_is_training_in_float32_but_for_rounding():
    for precision in ("fp32", "bf16"):
        assert call(train, *TINY, "--precision", precision, "--run_name", precision, "--epochs", 2) == 0
    wide, narrow = ([float(row["loss"]) for row in metrics(f"{name}/metrics.csv")] for name in ("fp32", "bf16"))
    assert wide != narrow and narrow == pytest.approx(wide, rel=0.02)


def test_a_run_that_could_not_be_compiled_does_not_try_again(monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module: no_compiler)
    assert call(train, *TINY, "--max_steps", 1, "--compile", "on") == 0
    assert "torch.compile does not work here (no compiler)" in capsys.readouterr().out
    assert load_checkpoint("checkpoints/latest.pt")["config"]["compile"] == "off"


# ---------------------------------------------------------------------------------------------------------------------
# duration


@pytest.mark.parametrize("seconds, words", [
    (40, ["1 min"]), (3 * 3600, ["3.0 hours"]), (5 * 86400, ["5.0 days", "--preset quick"]),
])
def test_the_duration_is_announced_and_days_on_a_cpu_name_a_faster_way(seconds, words, capsys):
    loop.announce_duration(seconds, has_faster_way=True)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
    assert ("quick" in printed) == (seconds > 86400)


def test_the_duration_leaves_out_saves_and_grids(monkeypatch, capsys):
    """Each step takes a minute, each save an hour and each grid a day."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def taking(seconds: float, function):
        def call_slowly(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)
        return call_slowly

    monkeypatch.setattr(loss, "draw_timesteps", taking(60, loss.draw_timesteps))
    monkeypatch.setattr(loop.RunDir, "save", taking(3600, lambda self, name, **content: True))
    monkeypatch.setattr(train, "square_grid", taking(86400, lambda images: Image.new("RGB", (8, 8))))
    flags = ["--epochs", 26, "--batch_size", 8, "--milestone_every", 1, "--save_every", 0, "--sample_every", 5,
             "--num_samples", 1, "--sample_steps", 1]
    assert call(train, *TINY, *flags) == 0  # 25 steps, then one more
    assert "training takes about 1 min more" in capsys.readouterr().out
    assert clock.now > 5 * 86400 + 26 * 3600


def test_init_starts_from_the_ema_of_another_run(final, capsys):
    """With a rate of nearly 0 it also ends there. Dropout belongs to the training, not to the network's weights."""
    assert call(train, *TINY, "--init", final, "--lr", 1e-12, "--max_steps", 2, "--dropout", 0.2) == 0
    there, here = load_checkpoint(final)["ema"], load_checkpoint("checkpoints/final_model.pt")
    assert here["network"]["config"]["dropout"] == 0.2
    assert all(torch.allclose(there[name], here["ema"][name], atol=1e-9) for name in there)
    assert call(train, *TINY, "--init", final, "--blocks", 2, "--max_steps", 2, "--run_name", "deeper") == 0
    capsys.readouterr()
    others = {"size": ["--width", 16], "size ": ["--init", "checkpoints/deeper/final_model.pt"],
              "types": ["--labels", "none"], "prediction": ["--prediction", "v"],
              "schedule": ["--schedule", "cosine"], "its schedule": ["--timesteps", 40]}
    for word, flags in others.items():
        code = call(train, *TINY, "--init", final, "--run_name", "other", *flags)
        assert_one_line(code, capsys, "--init", "of another network", word.strip())
