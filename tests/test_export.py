"""export.py without its optional packages: flags, refusals, whole folders, card, runtime, model.json."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import ROOT, assert_one_line, call, tree
from tiny_model import save_tiny_model

import export
import train
from models.export import card, diffusers, onnx, web
from models.export.description import describe
from models.pipeline import Pipeline
from training.config import _parse_flags
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import MANIFEST


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the checkpoints of tiny models, and with a runtime that is none. Not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "typed.pt", ("fire", "ice", "dark"))
    save_tiny_model(folder / "latent.pt", latent=True)
    save_tiny_model(folder / "wide.pt", multipliers=(2, 2))
    save_tiny_model(folder / "tuned.pt", objective="consistency")
    (folder / "runtime/dist").mkdir(parents=True)
    for name in web.RUNTIME_FILES:
        (folder / "runtime/dist" / name).write_text(name)
    with tarfile.open(folder / "runtime.tgz", "w:gz") as archive:
        archive.add(folder / "runtime", "package")
    return folder


@pytest.fixture
def no_graphs(monkeypatch):
    """Write the model's folder without translating its network."""
    def write_model(pipeline, name, target, output, half, max_types):
        (target / "model.onnx").write_text(f"{name} {output} {half} {max_types}")

    monkeypatch.setattr(web, "require_packages", lambda: None)
    monkeypatch.setattr(web, "write_model", write_model)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("flags, words", [
    ("typed.pt", "give a format: --to diffusers, onnx, pt, safetensors or web"),
    ("typed.pt --to onnx --output a.pt", "--output must end in .onnx"),
    ("typed.pt --to safetensors --output a.bin", "--output must end in .safetensors"),
    ("typed.pt --to pt --output a.safetensors", "--output must end in .pt"),
    ("typed.pt --to web --output a.html", "--to web writes a folder"),
    ("typed.pt --to diffusers --output a.safetensors", "--to diffusers writes a folder"),
    ("typed.pt --to diffusers --half", "--half goes with --to onnx, not with diffusers"),
    ("typed.pt --to onnx --runtime a.tgz", "--runtime goes with --to web"),
    ("typed.pt --to onnx --max_types 3", "--max_types goes with --to diffusers and web"),
    ("typed.pt --to web --credit me", "--credit goes with --to diffusers"),
    ("typed.pt --to web --max_types 0", "--max_types must be at least 1"),
    ("missing.pt --to onnx", "no checkpoint at"),
    ("damaged.pt --to onnx", "truncated or not a PokeDiff checkpoint"),
])
def test_what_cannot_be_done_is_said_in_one_line(folder, own_folder, capsys, flags, words):
    checkpoint, *flags = flags.split()
    whole = (folder / "typed.pt").read_bytes()
    Path("damaged.pt").write_bytes(whole[: len(whole) // 2])
    path = Path(checkpoint) if checkpoint == "damaged.pt" else folder / checkpoint
    assert_one_line(call(export, "--checkpoint", path, *flags), capsys, words)
    assert [path.name for path in Path().iterdir()] == ["damaged.pt"]


@pytest.mark.parametrize("name", ["typed.pt", "latent.pt"])
def test_a_checkpoint_of_half_the_size_draws_nearly_the_same(folder, own_folder, name):
    assert call(export, "--checkpoint", folder / name, "--to", "pt", "--output", "half.pt") == 0
    assert os.path.getsize("half.pt") < 0.8 * os.path.getsize(folder / name)  # a tiny one is mostly names
    whole, half = (Pipeline.load(path, precision="fp32") for path in (folder / name, "half.pt"))
    assert half.settings == whole.settings and half.class_names == whole.class_names
    difference = (whole.sample(range(4), steps=3) - half.sample(range(4), steps=3)).abs()
    assert 0 < difference.max() < 0.02


def test_weights_that_float16_cannot_hold_are_refused(folder, own_folder, capsys):
    content = load_checkpoint(folder / "typed.pt")
    content["ema"]["conv_in.weight"][0] = 1e5
    save_checkpoint("large.pt", **content)
    assert_one_line(call(export, "--checkpoint", "large.pt", "--to", "pt", "--output", "half.pt"), capsys, "float16")
    assert not Path("half.pt").exists()


@pytest.mark.parametrize("to, package", [("onnx", "onnx"), ("onnx", "onnxruntime"), ("web", "onnxscript"),
                                         ("diffusers", "diffusers"), ("safetensors", "safetensors")])
def test_a_missing_package_is_named(folder, own_folder, capsys, monkeypatch, to, package):
    for name in ("onnx", "onnxscript", "onnxruntime", "diffusers", "safetensors"):
        monkeypatch.setitem(sys.modules, name, torch if name != package else None)
    code = call(export, "--checkpoint", folder / "typed.pt", "--to", to)
    assert_one_line(code, capsys, f"needs the package {package}, which is not installed: pip install -r "
                                  f"requirements-export.txt")
    assert not list(Path().rglob("*.*"))


def test_a_safetensors_file_without_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(Exception, match="a.safetensors needs the package safetensors, which is not installed"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("checkpoint, words", [
    ("latent.pt", "cannot hold a model of latents with its autoencoder; --to onnx, web and safetensors can"),
    ("tuned.pt", "was tuned to few: export the one it was tuned from .None.; --to onnx, web and safetensors can"),
    ("wide.pt", "whose first multiplier is 2, only 1; --to onnx, web and safetensors can"),
])
def test_diffusers_refuses_what_it_cannot_hold(folder, checkpoint, words):
    with pytest.raises(Exception, match=words):
        diffusers.check_expressible(Pipeline.load(folder / checkpoint), max_types=2)


def test_diffusers_refuses_unknown_layers_and_too_many_sets(folder, monkeypatch):
    pipeline = Pipeline.load(folder / "typed.pt")
    monkeypatch.setattr(diffusers, "MOST_SETS", 7)
    diffusers.check_expressible(pipeline, max_types=2)  # none, three, and three pairs
    with pytest.raises(Exception, match="3 types make 8 sets of up to 3, .* give a smaller --max_types"):
        diffusers.check_expressible(pipeline, max_types=3)
    pipeline.net.patches = torch.nn.Conv2d(3, 3, 2)
    with pytest.raises(Exception, match="no counterpart of this network's patches; --to onnx, web and safetensors"):
        diffusers._renamed_weights(pipeline.net)


def test_latents_in_one_onnx_file_are_refused(folder, tmp_path):
    with pytest.raises(Exception, match="three networks, not one file: give --output a folder"):
        onnx.write_file(Pipeline.load(folder / "latent.pt"), "a", tmp_path / "a.onnx")


# ---------------------------------------------------------------------------------------------------------------------
# the page's folder


@pytest.mark.parametrize("runtime", ["runtime", "runtime.tgz"])
def test_the_page_is_whole(folder, own_folder, no_graphs, capsys, runtime):
    flags = "--checkpoint", folder / "typed.pt", "--to", "web", "--runtime", folder / runtime
    for max_types in (2, 3):  # the second export takes the place of the first
        assert call(export, *flags, "--max_types", max_types) == 0
        assert Path("outputs/tiny_web/model/model.onnx").read_text() == f"tiny x_0 True {max_types}"
    assert [path.name for path in Path("outputs").iterdir()] == ["tiny_web"]
    page = {path.name for path in web.PAGE.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in Path("outputs/tiny_web").iterdir()} == page | {"ort", "model", MANIFEST}
    assert Path("outputs/tiny_web/index.html").read_bytes() == (web.PAGE / "index.html").read_bytes()
    assert {path.name: path.read_text() for path in Path("outputs/tiny_web/ort").iterdir()} == {
        name: name for name in web.RUNTIME_FILES}
    assert "python -m http.server --directory outputs/tiny_web" in capsys.readouterr().out


@pytest.mark.parametrize("error, status", [(OSError(errno.ENOSPC, "No space left on device"), "error: could not write"),
                                           (KeyboardInterrupt(), 130), (MemoryError(), "error: out of memory")])
def test_a_failed_export_leaves_what_stood_there(folder, own_folder, no_graphs, monkeypatch, error, status):
    flags = "--checkpoint", folder / "typed.pt", "--to", "web", "--runtime", folder / "runtime", "--output", "page"
    assert call(export, *flags) == 0
    before = tree()

    def fail(pipeline, name, target, *_, **__):
        (target / "model.onnx").write_text("half of it")
        raise error

    monkeypatch.setattr(web, "write_model", fail)
    assert str(call(export, *flags)).startswith(str(status))
    assert tree() == before
    assert str(call(export, *flags[:-1], "other")).startswith(str(status))
    assert tree() == before


@pytest.mark.parametrize("kind", ["a folder of something else", "a folder with model/ alone", "a changed export",
                                  "a file", "the page's source"])
def test_nothing_else_is_overwritten(folder, own_folder, no_graphs, capsys, kind):
    output = Path("mine")
    flags = "--checkpoint", folder / "typed.pt", "--to", "web", "--runtime", folder / "runtime", "--output"
    if kind == "a folder with model/ alone":
        Path("mine/model").mkdir(parents=True)
        Path("mine/model/model.json").write_text("mine")
    elif kind == "a changed export":
        assert call(export, *flags, output) == 0
        Path("mine/style.css").write_text("mine")
        capsys.readouterr()
    elif kind == "a file":
        output.write_text("mine")
    elif kind == "the page's source":
        output = web.PAGE / "out"
    else:
        output.mkdir()
        Path("mine/thesis.txt").write_text("years of work")
    before = tree(), tree(web.PAGE)
    assert_one_line(call(export, *flags, output), capsys, "name", "folder")
    assert (tree(), tree(web.PAGE)) == before


def test_a_runtime_that_is_none_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "text.tgz").write_text("no tarball")
    (tmp_path / "cut.tgz").write_bytes((folder / "runtime.tgz").read_bytes()[:150])
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/dist/other.js"), io.BytesIO())
    for name in ("text.tgz", "cut.tgz", "empty", "other.tgz"):
        with pytest.raises(Exception, match=f"{name} is not npm's package onnxruntime-web") as refused:
            web.read_runtime(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(Exception, match="there is no --runtime"):
        web.read_runtime(tmp_path / "missing.tgz")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="npm, which is not installed; fetch it elsewhere with `npm pack"):
        web.read_runtime(None)


def test_one_version_of_the_runtime_is_fetched_everywhere():
    found = {}
    for path in [ROOT / ".ci/run", *ROOT.glob(".github/workflows/*"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"),
                 ROOT / "tests/browser/conftest.py"]:
        for name in re.findall(r"npm pack(?: --\S+)* (onnxruntime-web[^\s`)]*)", path.read_text(encoding="utf-8")):
            found.setdefault(name, set()).add(path.name)
    assert found == {web.RUNTIME_PACKAGE: {"run", "web_page.md", "conftest.py"}}
    assert re.fullmatch(r"onnxruntime-web@\d+\.\d+\.\d+", web.RUNTIME_PACKAGE)


# ---------------------------------------------------------------------------------------------------------------------
# what travels with the model


def test_the_description_gives_the_schedule_to_the_last_bit(folder):
    pipeline = Pipeline.load(folder / "typed.pt")
    described = json.loads(json.dumps(describe(pipeline, "tiny")))
    assert described["alpha_bar"] == pipeline.scheduler._tables["alphas_cumprod"].tolist()
    assert described["types"] == ["fire", "ice", "dark"] and described["max_types"] == 2
    assert described["guidance"] == 3 and described["sampler"] == {"name": "sde-dpm++", "steps": 20}
    assert (described["channels"], described["height"], described["clip_range"]) == (3, 16, 1)
    latents = describe(Pipeline.load(folder / "latent.pt"), "tiny", max_types=9)
    assert (latents["channels"], latents["height"], latents["image_size"]) == (4, 4, 16)
    assert "samplers" not in described  # any sampler suits it
    assert latents["latent"] and latents["clip_range"] == 3.5 and latents["guidance"] == 1 and latents["max_types"] == 0


def test_the_description_says_what_to_guide_away_from(folder, tmp_path):
    pipeline = Pipeline.load(folder / "typed.pt")
    assert (describe(pipeline, "tiny")["guide"], describe(pipeline, "tiny")["guidance"]) == ("types", 3)
    pipeline.load_guide(save_tiny_model(tmp_path / "small.pt", pipeline.class_names, multipliers=(1,)))
    assert describe(pipeline, "tiny")["guide"] == "earlier"
    assert describe(pipeline, "tiny", with_earlier=False)["guide"] == "types"
    untyped = Pipeline.load(folder / "latent.pt")
    assert describe(untyped, "tiny")["guide"] is None and not describe(untyped, "tiny")["supports_guidance"]
    content = load_checkpoint(folder / "latent.pt")
    content["ema"]["conv_in.weight"] += 1
    save_checkpoint(tmp_path / "other.pt", **content)
    untyped.load_guide(tmp_path / "other.pt")
    assert describe(untyped, "tiny")["supports_guidance"] and describe(untyped, "tiny")["guidance"] == 3


def test_the_description_of_a_tuned_model_names_its_sampler(folder):
    assert describe(Pipeline.load(folder / "tuned.pt"), "tuned")["samplers"] == ["consistency"]


def test_the_training_command_of_the_card_is_one(monkeypatch):
    """train.py understands it, and would train as the model was trained."""
    settings = load_checkpoint(Path(__file__).parents[1] / "checkpoints/critters.pt")["config"]
    settings |= dict(data="/home/somebody/my images", init="~/before.pt", grad_checkpoint=True, milestones=(1, 5))
    command = card.training_command(settings)
    assert "somebody" not in command
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["python", "train.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    parsed = _parse_flags(train.Config, train.PRESETS, "", "python train.py")
    settings |= dict(data="my images", init="before.pt")
    dropped = {name for name in settings if name not in parsed}
    assert parsed == {name: settings[name] for name in parsed}
    assert all(name in card.NOT_OF_THE_MODEL or not settings[name] for name in dropped), dropped


def test_the_card_of_a_model_without_types_and_figures(folder):
    text = card.card_text(Pipeline.load(folder / "wide.pt"), card.Card("a\nb", "mit", "me", num_images=0))
    assert "## Types" not in text and "samples.png" not in text and "not measured" in text and "# a\\nb\n" in text
