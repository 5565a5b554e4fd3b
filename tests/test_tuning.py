"""Tuning to few steps through the command lines: resuming, refusals, drawing, what the checkpoint says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, TINY, assert_one_line, assert_same_run, call, call_in, metrics, same
from test_distributed import torchrun
from tiny_model import save_tiny_model

import evaluate
import generate
import train
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from training.consistency import CRITIC_RATE, NETWORK_BETAS, ConsistencyLoss
from training.step import TrainingStep
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.images import read_settings

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")

MODEL = [*TINY, "--prediction", "v", "--schedule", "cosine"]
SMALL = ["--checkpoint", "tuned.pt", "--device", "cpu", "--num_images", 3]


def tuning(teacher: Path) -> list:
    """Return the flags that tune the model of `teacher_folder`."""
    return [*MODEL, "--objective", "consistency", "--init", teacher / "checkpoints/final_model.pt"]


@pytest.fixture(scope="module")
def guided_folder(tmp_path_factory) -> Path:
    """A folder with a trained model of v, and its earlier self."""
    return call_in(tmp_path_factory.mktemp("guided"), train, *MODEL, "--lr", "1e-2", "--guide_at", "0.4")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    """A folder with a trained model of v."""
    return call_in(tmp_path_factory.mktemp("teacher"), train, *MODEL, "--lr", "1e-2")


def tuned_model(path: str, types=("fire", "water"), **settings) -> Path:
    return save_tiny_model(Path(path), types, objective="consistency", init="teacher.pt",
                           **dict(sampler="consistency", sample_steps=2) | settings)


# ---------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("folder, more", [
    ("teacher_folder", ["--precision", "bf16"]),
    ("teacher_folder", ["--dropout", "0.3", "--grad_accum", "2", "--augment", "flip", "--teacher_guidance", "2",
                        "--sample_steps", "4"]),
    ("guided_folder", []),
], ids=["guided by types", "dropout", "guided by the earlier network"])
def test_a_resumed_tuning_is_the_uninterrupted_one(folder, more, tmp_path, request):
    """The teacher's own file may be gone by then."""
    teacher_folder = request.getfixturevalue(folder)
    assert call(train, *tuning(teacher_folder), *more, "--run_name", "whole") == 0
    whole = load_checkpoint("checkpoints/whole/latest.pt")
    copied = tmp_path / "copied/checkpoints/final_model.pt"
    copied.parent.mkdir(parents=True)
    copied.write_bytes((teacher_folder / "checkpoints/final_model.pt").read_bytes())
    assert call(train, *tuning(tmp_path / "copied"), *more, "--max_steps", 3) == 0
    copied.unlink()
    assert call(train, "--resume", "--max_steps", 0) == 0
    ours = load_checkpoint("checkpoints/latest.pt")
    whole["config"]["init"] = ours["config"]["init"]
    assert_same_run(ours, whole)
    assert [float(row["loss"]) for row in metrics()] == [row["loss"] for row in whole["history"]]
    final = load_checkpoint("checkpoints/final_model.pt")
    assert same(final["ema"], whole["ema"]) and not {"teacher", "critic"} & final.keys()
    start = load_checkpoint(teacher_folder / "checkpoints/final_model.pt")
    networks = dict(net=start["ema"]) | (dict(worse=start["earlier"]) if "earlier" in start else {})
    assert same(ours["teacher"], {f"{name}.{key}": x for name, net in networks.items() for key, x in net.items()})
    assert not same(ours["ema"], start["ema"])
    assert ours["config"]["teacher_guidance"] == (2 if "--teacher_guidance" in more else 3)
    network, critic = ours["optimizer"]["param_groups"]
    assert critic["lr"] == CRITIC_RATE * ours["config"]["lr"] and network["betas"] == NETWORK_BETAS != critic["betas"]
    assert not same(ours["critic"], networks["net"])
    assert Path("outputs/generated_epoch_0003.png").read_bytes() == Path(
        "outputs/whole/generated_epoch_0003.png").read_bytes()


def test_a_network_can_become_deeper_and_the_critic_has_no_dropout(guided_folder, monkeypatch):
    steps = []
    monkeypatch.setattr(train, "TrainingStep", lambda *inputs, **options: steps.append(
        TrainingStep(*inputs, **options)) or steps[0])
    assert call(train, *tuning(guided_folder), "--blocks", 2, "--dropout", 0.5, "--max_steps", 1) == 0
    parts = [part for part in steps[0].critic.modules() if isinstance(part, torch.nn.Dropout)]
    assert parts and all(part.p == 0 for part in parts)


def test_two_processes_have_the_losses_of_one(teacher_folder):
    flags = [*tuning(teacher_folder), "--lr", "1e-3", "--sample_steps", 4]
    assert call(train, *flags, "--run_name", "one") == 0
    done = torchrun(ROOT / "train.py", *map(str, flags), "--run_name", "two")
    assert done.returncode == 0, done.stderr
    one, two = ([float(row["loss"]) for row in metrics(f"{name}/metrics.csv")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


def test_it_works_in_the_latents_of_the_model_that_it_tunes():
    """With their own normalisation, whatever images there are, and without naming the autoencoder."""
    save_tiny_model(Path("latent.pt"), latent=True)
    flags = [*TINY, "--prediction", "v", "--schedule", "cosine", "--timesteps", 100, "--labels", "none", "--objective",
             "consistency", "--init", "latent.pt", "--autoencoder", "own", "--augment", "flip", "--max_steps", 3]
    assert call(train, *flags) == 0
    assert call(train, "--resume", "--max_steps", 4) == 0
    assert same(load_checkpoint("checkpoints/latest.pt")["autoencoder"], load_checkpoint("latent.pt")["autoencoder"])


def test_a_step_that_is_not_finite_is_skipped(teacher_folder, monkeypatch):
    plain, steps = ConsistencyLoss.draw_randomness, []

    def spoiled(self, batch_size, generator, step):
        steps.append(step)
        randomness = plain(self, batch_size, generator, step)
        if step == 3:
            randomness[2].fill_(float("nan"))
        return randomness

    monkeypatch.setattr(ConsistencyLoss, "draw_randomness", spoiled)
    assert call(train, *tuning(teacher_folder)) == 0
    assert steps == list(range(6)) and [row["skipped"] for row in metrics()] == ["0", "1", "0"]
    latest = load_checkpoint("checkpoints/latest.pt")
    assert all(weight.isfinite().all() for name in ("model", "ema", "critic") for weight in latest[name].values())


def test_what_the_objective_implies(teacher_folder, monkeypatch):
    """Whatever a preset says, unless flags do."""
    monkeypatch.setitem(train.PRESETS, "latents", train.PRESETS["latents"] | dict(loss_weighting="min_snr"))
    at = MODEL.index("--sample_steps")
    flags = [*MODEL[:at], *MODEL[at + 2:], "--epochs", 1, "--autoencoder", "", "--objective", "consistency", "--init",
             teacher_folder / "checkpoints/final_model.pt"]
    for preset in ("latents", "maker"):  # both with guidance and log-normal timesteps, one here with min-SNR weights
        assert call(train, "--preset", preset, "--run_name", preset, *flags) == 0
        config = load_checkpoint(f"checkpoints/{preset}/final_model.pt")["config"]
        assert (config["sampler"], config["sample_steps"], config["loss_weighting"]) == ("consistency", 2, "uniform")
        assert (config["lognormal"], config["guidance"], config["guide_at"]) == ((), 1.0, 0.0)


def test_what_a_resumed_tuning_refuses(teacher_folder, capsys):
    assert call(train, *tuning(teacher_folder), "--max_steps", 3) == 0
    capsys.readouterr()
    for flags, words in ((["--sample_steps", 4], "this tuning is to 2 jumps"), (["--guidance", 3], "is built in")):
        assert_one_line(call(train, "--resume", *flags), capsys, words)
    content = load_checkpoint("checkpoints/latest.pt")
    del content["critic"]
    content["config"] |= dict(gaps=(2, 4), anchor=0.1, huber=5e-4, loss_weighting="min_snr")  # as it was before
    save_checkpoint("checkpoints/latest.pt", **{name: x for name, x in content.items() if name != "format"})
    assert_one_line(call(train, "--resume"), capsys, "start a new one")


def test_a_training_from_before_is_resumed():
    """When every run had the settings of the former tuning."""
    assert call(train, *MODEL, "--max_steps", 3) == 0
    content = load_checkpoint("checkpoints/latest.pt")
    content["config"] |= dict(gaps=(2, 4, 8, 16), anchor=0.1, huber=5e-4)
    save_checkpoint("checkpoints/latest.pt", **{name: x for name, x in content.items() if name != "format"})
    assert call(train, "--resume", "--max_steps", 4) == 0


def test_the_preset_tunes_the_quick_presets_model():
    quick, few = train.PRESETS["quick"], train.PRESETS["few_steps"]
    network = ("data", "image_size", "augment", "width", "multipliers", "blocks", "groups", "schedule", "prediction")
    assert {name: quick[name] for name in network} == {name: few[name] for name in network}
    assert few["init"] == "checkpoints/final_model.pt" and few["run_name"]  # quick's own folder is not overwritten


def test_a_presets_run_name_is_its_folder(teacher_folder, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "few_steps", train.PRESETS["few_steps"] | dict(
        init=str(teacher_folder / "checkpoints/final_model.pt")))
    Path("checkpoints").mkdir()
    Path("checkpoints/final_model.pt").write_bytes(b"of the quick preset")
    flags = [*MODEL, "--max_steps", 1]
    assert call(train, "--preset", "few_steps", *flags, "--sample_steps", 1) == 0
    assert Path("checkpoints/few_steps/final_model.pt").exists()
    assert call(train, "--resume", "--run_name", "few_steps", "--max_steps", 2) == 0
    assert call(train, "--resume", "--preset", "few_steps", *flags[:-1], 3, "--sample_steps", 1) == 0


@pytest.mark.parametrize("flags, words", [
    (["--prediction", "v"], ["--objective consistency", "--init"]),
    (["--init", "FINAL"], ["needs --prediction v"]),
    (["--init", "FINAL", "--prediction", "v", "--lognormal", "0", "1"], ["--lognormal does not go with"]),
    (["--init", "FINAL", "--prediction", "v", "--loss_weighting", "min_snr"], ["--loss_weighting min_snr does not go"]),
    (["--init", "FINAL", "--prediction", "v", "--sample_steps", "51"], ["--sample_steps must be at most the 50"]),
    (["--init", "FINAL", "--prediction", "v", "--teacher_steps", "51"], ["--teacher_steps must be at most the 50"]),
    (["--init", "FINAL", "--prediction", "v", "--schedule", "cosine", "--guidance", "3"], ["guidance 3 is built in"]),
    (["--init", "FINAL", "--prediction", "v", "--sampler", "ddim"], ["needs --sampler consistency", "ddim"]),
    (["--init", "eps.pt", "--prediction", "v"], ["eps.pt predicts eps", "predicts v"]),
    (["--init", "FINAL", "--prediction", "v"], ["of another network", "schedule"]),
    (["--init", "tuned.pt", "--prediction", "v"], ["tuned.pt is tuned already"]),
    (["--init", "plain.pt", "--prediction", "v", "--teacher_guidance", "3"], ["--guide_at", "with types", "plain.pt"]),
    (["--init", "FINAL", "--prediction", "v", "--teacher_steps", "0"], ["--teacher_steps must be more than 0"]),
    (["--objective", "denoising", "--sampler", "consistency"], ["--sampler consistency", "--objective consistency"]),
    (["--objective", "denoising", "--teacher_guidance", "2"], ["--teacher_guidance", "--objective consistency"]),
])
def test_refused_settings(teacher_folder, flags, words, capsys):
    save_tiny_model(Path("eps.pt"), prediction="eps")
    save_tiny_model(Path("plain.pt"))
    tuned_model("tuned.pt")
    flags = [str(teacher_folder / "checkpoints/final_model.pt") if flag == "FINAL" else flag for flag in flags]
    assert_one_line(call(train, *TINY, "--objective", "consistency", *flags), capsys, *words)
    assert not Path("checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def test_a_tuned_model_draws_by_jumps_and_says_so(capsys):
    path = tuned_model("tuned.pt")
    assert call(generate, *SMALL, "--individual") == 0
    assert "consistency in 2 steps" in capsys.readouterr().out
    image = np.asarray(Image.open("outputs/generated/seed_000001.png"))
    for flags, settings in ((["--steps", 4], dict(steps=4)),
                            (["--timesteps", 99, 43], dict(steps=2, timesteps=[99, 43])),
                            (["--timesteps", 99], dict(steps=1, timesteps=[99]))):
        assert call(generate, *SMALL, *flags, "--individual") == 0
        again = read_settings("outputs/generated/seed_000001.png")
        assert {name: again.get(name) for name in settings} == settings and again["sampler"] == "consistency"
        assert np.array_equal(np.asarray(Image.open("outputs/generated/seed_000001.png")), image) == (
            settings.get("timesteps") == [99, 43])
    pipeline = Pipeline.load(path, precision="fp32")
    alone, among = pipeline.sample([5]), pipeline.sample(range(3, 8))
    assert alone[0].equal(among[2])


@pytest.mark.parametrize("flags, words", [
    (["--sampler", "sde-dpm++"], ["--sampler sde-dpm++", "tuned to jump", "teacher.pt"]),
    (["--timesteps", 43, 99], ["timesteps must fall"]),
    (["--timesteps", 100], ["timesteps must fall, from 99"]),
    (["--timesteps", 99, "--steps", 2], ["--timesteps", "--steps"]),
    (["--timesteps", 99, "--init_image", "a.png"], ["--timesteps", "--init_image"]),
    (["--init_image", "a.png", "--mask", "b.png"], ["--mask", "tuned to jump", "teacher.pt"]),
])
def test_what_a_tuned_model_refuses(flags, words, capsys):
    tuned_model("tuned.pt")
    Image.new("RGB", (16, 16), "red").save("a.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save("b.png")
    code = call(generate, *SMALL, *flags)
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code
    assert all(word in code for word in words), code
    assert not Path("outputs/generated.png").exists()


def test_an_untuned_model_refuses_to_jump(capsys):
    save_tiny_model(Path("plain.pt"))
    code = call(generate, "--checkpoint", "plain.pt", "--device", "cpu", "--sampler", "consistency")
    assert_one_line(code, capsys, "--sampler consistency", "tuned", "--objective consistency")
    assert call(generate, "--checkpoint", "plain.pt", "--device", "cpu", "--num_images", 1, "--timesteps", 99, 50) == 0


def test_an_animation_shows_where_each_jump_lands():
    tuned_model("tuned.pt")
    for steps, frames in ((1, 1), (2, 3), (4, 7)):
        assert call(generate, *SMALL, "--steps", steps, "--gif") == 0
        assert Image.open("outputs/generated.gif").n_frames == frames


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_interpolation_ends_at_the_images_of_the_two_seeds(steps):
    """The noise of the jumps follows the arc, too; in batches as well."""
    tuned_model("tuned.pt")
    flags = ["--checkpoint", "tuned.pt", "--device", "cpu", "--precision", "fp32", "--steps", steps, "--individual"]
    walk = ["--interpolate", 30, 2, "--num_images", 5, "--batch_size", 2, "--output", "w.png"]
    assert call(generate, *flags, *walk) == 0
    for seed, step in ((30, 0), (2, 4)):
        assert call(generate, *flags, "--seed", seed, "--num_images", 1, "--output", "end.png") == 0
        end = np.asarray(Image.open(f"end/seed_{seed:06d}.png")).astype(int)
        assert np.abs(np.asarray(Image.open(f"w/step_{step:03d}.png")) - end).max() <= 1
    middle = np.asarray(Image.open("w/step_002.png")).astype(int)
    assert np.abs(middle - end).max() > 1


def test_from_an_image_only_some_of_the_jumps_are_made(capsys):
    tuned_model("tuned.pt")
    Image.new("RGB", (16, 16), "red").save("a.png")
    for strength, jumps in ((0.5, 2), (0.2, 1), (1, 4)):
        assert call(generate, *SMALL, "--steps", 4, "--init_image", "a.png", "--strength", strength) == 0
        assert f"consistency in {jumps} steps" in capsys.readouterr().out


def test_guidance_that_is_built_in_is_not_given_again(capsys):
    path = tuned_model("tuned.pt", teacher_guidance=3.0)
    code = call(generate, *SMALL, "--types", "fire", "--guidance", 3)
    assert_one_line(code, capsys, "guidance 3 built in", "leave --guidance out")
    assert call(generate, *SMALL, "--types", "fire") == 0
    assert read_settings("outputs/generated.png")["guidance"] == 1
    pipeline, calls = Pipeline.load(path, precision="fp32"), []
    network = pipeline._network
    pipeline._network = lambda *inputs: calls.append(len(inputs[0])) or network(*inputs)
    pipeline.sample([1, 2], labels=pipeline.class_labels([("fire",)] * 2))
    assert calls == [2, 2]  # one pass a jump
    tuned_model("tuned.pt")
    assert call(generate, *SMALL, "--types", "fire") == 0
    assert read_settings("outputs/generated.png")["guidance"] == 3


def test_it_is_evaluated_as_it_is_drawn_and_the_report_says_so(guided_folder):
    assert call(train, *tuning(guided_folder), "--teacher_guidance", 2) == 0
    flags = ["--checkpoint", "checkpoints/final_model.pt", "--num_samples", 8, "--num_likelihood", 2, "--num_guided", 0,
             "--likelihood_steps", 2, "--device", "cpu"]
    assert call(evaluate, *flags) == 0
    summary = json.loads(Path("outputs/evaluation/report.json").read_text())["summary"]
    assert "Drawn by consistency in 2 steps, guidance 2 built in by its training." in summary


def test_the_scheduler_of_a_tuned_model_needs_no_thousand_timesteps():
    scheduler = NoiseScheduler(100, schedule="cosine")
    pipeline = Pipeline.load(tuned_model("tuned.pt"), precision="fp32")
    seen = []
    pipeline.sample([1], callback=lambda i, x_t, x_0: seen.append((x_t, x_0)))
    x_t, x_0 = seen[0]
    noise = scheduler.to_eps(x_0, x_t, torch.tensor([43]))
    assert len(seen) == 2 and abs(noise.std().item() - 1) < 0.2
