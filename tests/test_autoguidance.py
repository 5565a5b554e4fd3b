"""Guidance away from the network as it was after less training: kept by the training, followed when drawing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gaussian import MEAN, STD, exact, seeded_noise, start
from PIL import Image
from scripts import FEW_STEPS, TINY, assert_one_line, assert_same_run, call, call_in, pictures, same

import evaluate
import export
import generate
import train
from evaluation.report_markdown import report_markdown
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS, sample
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.images import to_uint8

pytestmark = pytest.mark.usefixtures("own_folder")
SCHEDULER = NoiseScheduler(schedule="cosine")
FLAGS = (*TINY, "--guide_at", 0.6, "--guidance", 2, "--sample_every", 1)  # kept after 4 of the 6 steps, 2 of 3 epochs


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> Path:
    """Return a folder with a tiny run that keeps an earlier network. Not to be written to."""
    return call_in(tmp_path_factory.mktemp("guided"), train, *FLAGS, "--milestones", 1, 2)


def checkpoint(folder: Path, name: str = "final_model"):
    return load_checkpoint(folder / f"checkpoints/{name}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def draw(network, guidance=1.0, **options):
    x_T = start(4)
    return sample(network, SCHEDULER, x_T, prediction="v", steps=20, clip=False, guidance=guidance,
                  draw_noise=seeded_noise(x_T), **options)


@pytest.mark.parametrize("labels", [None, torch.tensor([[0.0], [1.0], [0.5], [1.0]])])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_output_goes_away_from_that_of_the_worse_network(sampler, labels):
    network, worse = exact(SCHEDULER, "v"), exact(SCHEDULER, "v", std=2 * STD)

    def combined(x_t, t, *labels):
        return 3 * network(x_t, t, *labels) - 2 * worse(x_t, t, *labels)

    options = dict(sampler=sampler, labels=labels)
    torch.testing.assert_close(draw(network, 3.0, worse=worse, **options), draw(combined, **options))
    assert draw(network, 1.0, worse=worse, **options).equal(draw(network, **options))
    torch.testing.assert_close(draw(network, 0.0, worse=worse, **options), draw(worse, **options))


def test_samples_are_more_typical_if_the_worse_network_spreads_its_samples_more():
    """Not exactly as the Gaussian that guidance aims at, since it aims at another one at each timestep."""
    network, worse = exact(SCHEDULER, "v"), exact(SCHEDULER, "v", std=1.5 * STD)
    x_T = start(4000)
    options = dict(sampler="dpm++", steps=100, prediction="v", clip=False)
    plain = sample(network, SCHEDULER, x_T, **options)
    guided = sample(network, SCHEDULER, x_T, **options, worse=worse, guidance=2.0)
    torch.testing.assert_close(guided.mean(0)[0], MEAN, rtol=0, atol=0.03)
    aimed_at = (2 / STD**2 - 1 / (1.5 * STD) ** 2) ** -0.5
    assert ((plain - guided).std(0)[0] > 0).all()
    assert (guided.std(0)[0] < (STD + aimed_at) / 2).all() and (guided.std(0)[0] > 0.5 * aimed_at).all()


# ---------------------------------------------------------------------------------------------------------------------
# training


def test_the_earlier_network_is_the_average_after_that_part_of_the_training(guided):
    final = checkpoint(guided)
    assert same(final["earlier"], checkpoint(guided, "epoch_0002")["ema"])
    assert not same(final["earlier"], final["ema"])
    assert "earlier" not in checkpoint(guided, "epoch_0001") and "earlier" in checkpoint(guided, "epoch_0002")


def test_training_itself_is_the_same_without(guided, trained):
    assert same(checkpoint(guided)["ema"], checkpoint(trained)["ema"])


@pytest.mark.parametrize("steps", [3, 5])
def test_a_resumed_run_keeps_the_same_network(guided, steps):
    assert call(train, *FLAGS, "--max_steps", steps) == 0
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), checkpoint(guided, "latest"))
    assert same(load_checkpoint("checkpoints/final_model.pt")["earlier"], checkpoint(guided)["earlier"])


def test_a_run_that_is_resumed_past_that_step_keeps_the_next_average(trained):
    assert call(train, *TINY, "--max_steps", 5) == 0
    assert call(train, "--resume", "--max_steps", 0, "--guide_at", 0.5) == 0
    final = load_checkpoint("checkpoints/final_model.pt")
    assert same(final["earlier"], final["ema"]) and same(final["ema"], checkpoint(trained)["ema"])


def test_grids_are_guided_once_there_is_an_earlier_network(guided, trained):
    grids = [[(folder / f"outputs/generated_epoch_000{epoch}.png").read_bytes() for epoch in (1, 2, 3)]
             for folder in (guided, trained)]
    assert grids[0][0] == grids[1][0]  # there was none yet
    assert grids[0][1] == grids[1][1]  # it is the network itself
    assert grids[0][2] != grids[1][2]


def test_tuning_to_few_steps_does_not_go_with_it(capsys):
    code = call(train, "--preset", "few_steps", "--guide_at", 0.3, "--num_critters", 8)
    assert_one_line(code, capsys, "--guide_at", "leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# commands


def generated(*flags, name: str = "a"):
    assert call(generate, *FEW_STEPS, "--num_images", 4, *flags, "--individual", "--output", f"{name}.png") == 0
    return pictures(name), json.loads(Image.open(f"{name}.png").text["PokeDiff"])


def test_generate_goes_away_from_the_earlier_network_by_default(guided, capsys):
    flags = ("--checkpoint", guided / "checkpoints/final_model.pt")
    images, settings = generated(*flags)
    assert (settings["guidance"], settings["guide"]) == (3, "earlier")
    assert "guidance 3 (earlier)" in capsys.readouterr().out
    pipeline = Pipeline.load(flags[1], precision="fp32")
    expected = pipeline.sample(range(4), sampler="ddpm", steps=3, guidance=3.0, guide="earlier")
    assert not expected.equal(pipeline.sample(range(4), sampler="ddpm", steps=3))
    for picture, image in zip(images.values(), to_uint8(expected), strict=True):
        assert (picture == image.permute(1, 2, 0).numpy()).all()
    plain, settings = generated(*flags, "--guidance", 1, name="b")
    assert "guide" not in settings and any((a != b).any() for a, b in zip(images.values(), plain.values()))


def test_a_type_can_be_the_guide_as_well(guided):
    flags = ("--checkpoint", guided / "checkpoints/final_model.pt", "--types", "fire")
    assert generated(*flags)[1]["guide"] == "earlier"
    assert generated(*flags, "--guide", "types", name="b")[1]["guide"] == "types"


@pytest.mark.parametrize("flags, words", [
    (["--guide", "earlier"], ["no earlier network", "--guide_at"]),
    (["--guide", "earlier", "--types", "fire"], ["no earlier network", "--guide_at"]),
    (["--guide", "types"], ["--types", "fire"]),
])
def test_a_guide_that_is_not_there(final, flags, words, capsys):
    code = call(generate, *FEW_STEPS, "--checkpoint", final, "--num_images", 1, *flags)
    assert_one_line(code, capsys, *words)


def test_the_guide_without_types_where_types_should_guide(guided, capsys):
    code = call(generate, "--checkpoint", guided / "checkpoints/final_model.pt", "--guide", "types", "--guidance", 2)
    assert_one_line(code, capsys, "--types")


def test_a_damaged_earlier_network_is_refused(guided):
    content = checkpoint(guided)
    content["earlier"]["conv_in.weight"][0] = float("nan")
    save_checkpoint("nan.pt", **content)
    with pytest.raises(CheckpointError, match="not finite"):
        Pipeline.load("nan.pt")
    del content["earlier"]["conv_in.weight"]
    save_checkpoint("parts.pt", **content)
    with pytest.raises(CheckpointError, match="incomplete"):
        Pipeline.load("parts.pt")


def test_half_a_checkpoint_keeps_it(guided):
    assert call(export, "--checkpoint", guided / "checkpoints/final_model.pt", "--to", "pt", "--output", "half.pt") == 0
    images = [Pipeline.load(path).sample(range(2), steps=3, sampler="ddim", guidance=3.0)
              for path in ("half.pt", guided / "checkpoints/final_model.pt")]
    torch.testing.assert_close(*images, rtol=0, atol=0.02)


def test_another_checkpoint_can_be_the_guide(guided):
    """The network of the second epoch, which the final checkpoint holds as well."""
    folder = guided / "checkpoints"
    flags = ("--checkpoint", folder / "final_model.pt")
    expected, _ = generated(*flags)
    images, settings = generated(*flags, "--guide", folder / "epoch_0002.pt", name="b")
    assert settings["guide"] == "checkpoints/epoch_0002.pt"
    assert all((a == b).all() for a, b in zip(images.values(), expected.values(), strict=True))
    other, _ = generated(*flags, "--guide", folder / "epoch_0001.pt", name="c")
    assert any((a != b).any() for a, b in zip(other.values(), expected.values()))


def test_a_smaller_network_can_be_the_guide(guided, capsys):
    assert call(train, *FLAGS, "--width", 4, "--run_name", "narrow") == 0
    flags = ("--checkpoint", guided / "checkpoints/final_model.pt", "--guide", "checkpoints/narrow/final_model.pt")
    assert generated(*flags)[1]["guide"] == "narrow/final_model.pt"
    capsys.readouterr()
    assert_one_line(call(export, *flags, "--to", "pt"), capsys, "another size", "generate.py --guide")
    assert_one_line(call(export, *flags, "--to", "onnx"), capsys, "--guide needs a folder")


@pytest.mark.parametrize("flags, words", [
    (["--guide", "nowhere.pt"], ["no guide nowhere.pt", "earlier, types"]),
    (["--guide", "cosine.pt"], ["cosine.pt", "differ in schedule"]),
    (["--guide", "tuned.pt"], ["tuned.pt", "that one was tuned to jump"]),
    (["--checkpoint", "tuned.pt", "--guide", "other.pt"], ["other.pt", "this one was tuned to jump"]),
    (["--guide", "same.pt"], ["same.pt", "guidance does nothing"]),
])
def test_a_checkpoint_that_cannot_be_the_guide(guided, flags, words, capsys):
    content = checkpoint(guided)
    save_checkpoint("same.pt", **content)
    save_checkpoint("tuned.pt", **content | dict(config=content["config"] | dict(objective="consistency")))
    save_checkpoint("other.pt", **content | dict(ema=content["earlier"]))
    content["scheduler"]["schedule"] = "linear" if content["scheduler"]["schedule"] == "cosine" else "cosine"
    save_checkpoint("cosine.pt", **content)
    for command in (generate, evaluate, export):
        more = ("--to", "pt") if command is export else ()
        code = call(command, "--checkpoint", guided / "checkpoints/final_model.pt", *flags, *more)
        assert_one_line(code, capsys, *words)


def test_an_export_keeps_another_guide(guided, final):
    """Also where the checkpoint held none, and in a deeper network."""
    epoch_1 = guided / "checkpoints/epoch_0001.pt"
    assert call(train, *TINY, "--init", final, "--blocks", 2, "--run_name", "deep") == 0
    for path in (final, "checkpoints/deep/final_model.pt"):
        assert call(export, "--checkpoint", path, "--guide", epoch_1, "--to", "pt", "--output", "with.pt") == 0
        pipeline, guide = Pipeline.load("with.pt", precision="fp32"), Pipeline.load(epoch_1, precision="fp32")
        x_t, t, labels = pipeline.noise(range(2)), torch.tensor([3, 500]), torch.zeros(2, len(pipeline.class_names))
        with torch.no_grad():
            torch.testing.assert_close(pipeline.earlier(x_t, t, labels), guide.net(x_t, t, labels), rtol=0, atol=0.02)


EVALUATION = ("--num_samples", 4, "--num_guided", 4, "--num_likelihood", 0, "--device", "cpu", "--precision", "fp32")


@pytest.mark.parametrize("more, expected", [
    (["--guidance", 3], [(3, "earlier")]), (["--guidance", 3, "--guide", "types"], [(3, "types")]),
    ([], [(1, None), (3, "earlier")]), (["--guide", "types"], [(3, "types")]),
])
def test_evaluation_draws_with_the_guide_that_it_reports(guided, monkeypatch, more, expected):
    drawn, sample = [], Pipeline.sample

    def recorded(pipeline, *args, **options):
        drawn.append((options["guidance"], options["guide"]))
        return sample(pipeline, *args, **options)

    monkeypatch.setattr(Pipeline, "sample", recorded)
    content = checkpoint(guided)
    content["config"]["num_critters"] = 60  # with fewer images, nothing is called a copy
    save_checkpoint("model.pt", **content)
    assert call(evaluate, "--checkpoint", "model.pt", *EVALUATION, *more) == 0
    report = json.loads(Path("outputs/evaluation/report.json").read_text())
    assert drawn == expected and report["runs"][0]["sampling"]["guide"] == expected[0][1]
    assert ("guidance 3" in report["summary"]) == (expected[0][0] == 3)


def test_a_card_says_that_its_figures_are_of_guidance_that_it_lacks(guided):
    path = guided / "checkpoints/final_model.pt"
    for guidance in (1, 3):
        assert call(evaluate, "--checkpoint", path, *EVALUATION, "--guidance", guidance) == 0
        card = report_markdown(Path("outputs/evaluation/report.json"), path)
        assert ("exported without" in card) == (guidance == 3)


def test_evaluation_away_from_another_checkpoint(guided):
    flags = ("--checkpoint", guided / "checkpoints/final_model.pt", *EVALUATION)
    assert call(evaluate, *flags, "--guide", guided / "checkpoints/epoch_0001.pt") == 0
    report = json.loads(Path("outputs/evaluation/report.json").read_text())
    name = "checkpoints/epoch_0001.pt"
    assert report["runs"][0]["sampling"]["guide"] == name and f"guidance 3 ({name})" in report["summary"]


def test_several_checkpoints_have_one_guide(guided, capsys):
    """The first has no earlier network, so types guide all of them."""
    paths = [guided / f"checkpoints/epoch_000{epoch}.pt" for epoch in (1, 2)]
    assert call(evaluate, "--checkpoint", *paths, *EVALUATION, "--guidance", 3) == 0
    report = json.loads(Path("outputs/evaluation/report.json").read_text())
    assert [run["sampling"]["guide"] for run in report["runs"]] == ["types", "types"]
    capsys.readouterr()
    code = call(evaluate, "--checkpoint", *paths, *EVALUATION, "--guide", "earlier")
    assert_one_line(code, capsys, "epoch_0001.pt", "no earlier network")


def test_without_types_as_well(capsys):
    assert call(train, *FLAGS, "--labels", "none", "--run_name", "untyped") == 0
    flags = ("--checkpoint", "checkpoints/untyped/final_model.pt")
    assert generated(*flags)[1]["guide"] == "earlier"
    assert call(evaluate, *flags, *EVALUATION, "--guidance", 3) == 0
    capsys.readouterr()
    assert_one_line(call(generate, *flags, "--guide", "types"), capsys, "knows none", "leave --guide out")


def test_another_part_of_the_training_on_resume(guided):
    """A later part replaces the network that was kept; an earlier one has passed."""
    for guide_at, epoch in ((0.9, 3), (0.3, 2)):
        assert call(train, *FLAGS, "--run_name", f"at_{guide_at}", "--max_steps", 4) == 0
        assert call(train, "--resume", "--run_name", f"at_{guide_at}", "--max_steps", 0, "--guide_at", guide_at) == 0
        final = load_checkpoint(f"checkpoints/at_{guide_at}/final_model.pt")
        assert same(final["earlier"], checkpoint(guided, f"epoch_000{epoch}" if epoch < 3 else "final_model")["ema"])
