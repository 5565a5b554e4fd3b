"""Bad input to the commands: checkpoints that are damaged, hostile or another's, and flags that make no sense.

Each ends with one line that names it and says what to do, and no file is touched.
"""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import TINY, assert_one_line, call, tree

import generate
import train
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")


Writer = Callable[[Path, dict], object]  # writes a checkpoint of such content to a path, but with something wrong


class Trap:
    """Unpickled, it creates a file; that is how a checkpoint from the internet takes over a machine."""

    def __reduce__(self):
        return Path.touch, (Path("code was run"),)


def pickled(path: Path, content: dict) -> None:
    path.write_bytes(pickle.dumps(Trap(), protocol=2))


def pickled_by_torch(path: Path, content: dict) -> None:
    torch.save({**content, "history": [Trap()]}, path)


def compressed(path: Path, content: dict) -> None:
    save_checkpoint(path, **content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/more", bytes(50_000_000))


def cut(part: float) -> Writer:
    def write(path: Path, content: dict) -> None:
        save_checkpoint(path, **content)
        os.truncate(path, int(part * path.stat().st_size))
    return write


def changed(**changes) -> Writer:
    return lambda path, content: save_checkpoint(path, **{**content, **changes})


def set_in(name: str, **changes) -> Writer:
    return lambda path, content: save_checkpoint(path, **{**content, name: {**content[name], **changes}})


def without(name: str) -> Writer:
    return lambda path, content: save_checkpoint(path, **{key: x for key, x in content.items() if key != name})


def in_network(**changes) -> Writer:
    return lambda path, content: save_checkpoint(path, **{**content, "network": dict(
        kind="unet", config={**content["network"]["config"], **changes})})


def with_weights(part: str, change: Callable[[dict], object]) -> Writer:
    def write(path: Path, content: dict) -> None:
        content = copy.deepcopy(content)
        change(content[part])
        save_checkpoint(path, **content)
    return write


BAD_FOR_BOTH = {
    "no bytes": lambda path, content: path.touch(),
    "text": lambda path, content: path.write_text("hello\n"),
    "a page": lambda path, content: path.write_text("<!DOCTYPE html><html>404 not found</html>"),
    "a pointer of git-lfs": lambda path, content: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "an image": lambda path, content: Image.new("RGB", (9, 9)).save(path, "PNG"),
    "half of it": cut(0.5),
    "all but its end": cut(0.999),
    "a pickle with code": pickled,
    "code in a checkpoint": pickled_by_torch,
    "a compressed one": compressed,
    "weights alone": lambda path, content: torch.save(content["ema"], path),
    "another program's": lambda path, content: torch.save({"state_dict": content["ema"], "epoch": 3}, path),
    "another version's": lambda path, content: torch.save({**content, "format": "PokeDiff checkpoint 0"}, path),
    "a list": lambda path, content: torch.save([1, 2, 3], path),
    "no settings": without("config"),
    "settings of another kind": changed(config=[1, 2]),
    "weights of other shapes": with_weights("ema", lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
    "one weight less": with_weights("ema", lambda w: w.pop("conv_in.bias")),
    "one weight more": with_weights("ema", lambda w: w.update(more=torch.zeros(1))),
    "a weight that is no number": with_weights("ema", lambda w: w["conv_in.bias"].fill_(float("nan"))),
    "a weight that is a word": with_weights("ema", lambda w: w.update({"conv_in.bias": "zero"})),
    "a folder": lambda path, content: path.mkdir(),
    "nothing": lambda path, content: None,
}
BAD_FOR_GENERATE = {
    "a network of any size": in_network(width=2**20),
    "a network without end": in_network(blocks=10**9),
    "an unknown part of a network": in_network(depth=3),
    "a network without levels": in_network(multipliers=()),
    "an unknown kind of network": set_in("network", kind="transformer"),
    "steps without end": set_in("scheduler", num_timesteps=10**15),
    "an unknown schedule": set_in("scheduler", schedule="other"),
    "an unknown prediction": set_in("config", prediction="y"),
    "images of any size": set_in("config", image_size=2**30),
    "types without names": changed(types=[]),
}
BAD_FOR_RESUME = {
    "no optimizer, as in final_model.pt": without("optimizer"),
    "no number of steps": without("step"),
    "no statistics": without("stats"),
    "statistics of words": changed(stats=dict(loss_sum="none")),
    "an unknown setting": set_in("config", depth=3),
    "a setting that is a word": set_in("config", batch_size="many"),
    "a setting out of its range": set_in("config", batch_size=-4),
    "a step that is a word": changed(step="three"),
    "a step before the first": changed(step=-5),
    "a history of words": changed(history=["once"]),
    "plain weights that are no numbers": with_weights("model", lambda w: w["conv_in.bias"].fill_(float("inf"))),
    "an optimizer of another network": with_weights("optimizer", lambda o: o["state"][0].update(exp_avg=torch.ones(2))),
    "half of an optimizer": with_weights("optimizer", lambda o: o["state"].pop(0)),
    "another number of images": changed(num_images=9),
    "other images": changed(fingerprint="0" * 64),
    "other types": changed(types=["rock"]),
}


@pytest.fixture(scope="module")
def content(trained) -> dict:
    content = load_checkpoint(trained / "checkpoints/latest.pt")
    del content["format"]
    return content


@pytest.mark.parametrize("kind", [*BAD_FOR_BOTH, *BAD_FOR_GENERATE])
def test_generate_refuses_a_bad_checkpoint(kind, content, capsys):
    {**BAD_FOR_BOTH, **BAD_FOR_GENERATE}[kind](Path("bad.pt"), content)
    before = tree()
    assert_one_line(call(generate, "--checkpoint", "bad.pt", "--num_images", 1, "--device", "cpu"), capsys, "bad.pt")
    assert tree() == before  # and no "code was run"


@pytest.mark.parametrize("kind", [*BAD_FOR_BOTH, *BAD_FOR_RESUME])
def test_resume_refuses_a_bad_checkpoint(kind, content, capsys):
    Path("checkpoints").mkdir()
    {**BAD_FOR_BOTH, **BAD_FOR_RESUME}[kind](Path("checkpoints/latest.pt"), content)
    before = tree()
    code = call(train, "--resume", "--epochs", 4)
    named = {"a setting out of its range": "--batch_size", "another number of images": "had 9",
             "other images": "other file names", "other types": "rock"}.get(kind, "checkpoints/latest.pt")
    assert_one_line(code, capsys, named)
    assert tree() == before


def test_the_good_checkpoint_that_these_were_made_from_is_accepted(content):
    Path("checkpoints").mkdir()
    save_checkpoint("checkpoints/latest.pt", **content)
    flags = ["--checkpoint", "checkpoints/latest.pt", "--num_images", 1, "--device", "cpu", "--steps", 1]
    assert call(generate, *flags) == 0
    assert call(train, "--resume", "--epochs", 4) == 0
    assert load_checkpoint("checkpoints/latest.pt")["step"] == 8


def test_the_trap_works_where_nothing_prevents_it():
    pickled(Path("trap.pt"), {})
    pickle.loads(Path("trap.pt").read_bytes())
    assert Path("code was run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], ["nowhere"]),
    (["--data", "empty"], ["empty"]),
    (["--data", "broken"], ["broken"]),
    (["--data", "mine/a.png"], ["mine/a.png is a file"]),
    (["--image_size", "31"], ["--image_size", "multiple of 2", "31"]),
    (["--image_size", "0"], ["--image_size"]),
    (["--image_size", "200000"], ["--image_size", "at most 4096"]),
    (["--batch_size", "0"], ["--batch_size"]),
    (["--batch_size", "-4"], ["--batch_size", "more than 0"]),
    (["--epochs", "0"], ["--epochs"]),
    (["--grad_accum", "0"], ["--grad_accum"]),
    (["--lr", "nan"], ["--lr", "finite"]),
    (["--lr", "inf"], ["--lr", "finite"]),
    (["--lr", "-1"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]),
    (["--seed", str(2**62)], ["--seed", "at most"]),
    (["--data_seed", "-1"], ["--data_seed"]),
    (["--ema_decay", "1"], ["--ema_decay", "less than 1"]),
    (["--holdout", "1"], ["--holdout"]),
    (["--holdout", "0.99"], ["holds out all of the 8 images"]),
    (["--label_dropout", "2"], ["--label_dropout"]),
    (["--dropout", "1"], ["dropout"]),
    (["--timesteps", "1"], ["timesteps"]),
    (["--timesteps", "1000000000000"], ["timesteps"]),
    (["--keep", "-1"], ["--keep"]),
    (["--zero_terminal_snr"], ["--prediction v"]),
    (["--fixed_augmentations", "8"], ["--fixed_augmentations", "latents"]),
    (["--workers", "-2"], ["--workers"]),
    (["--save_every", "nan"], ["--save_every"]),
    (["--width", "30"], ["30"]),
    (["--width", "4000000"], ["out of memory"]),
    (["--multipliers", "0"], ["at least 1"]),
    (["--device", "nosuch"], ["nosuch"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--run_name", "../elsewhere"], ["--run_name"]),
    (["--run_name", "/tmp/elsewhere"], ["--run_name"]),
    (["--data", "mine", "--run_name", "mine"], ["outputs"]),  # where a file is in the way
    (["--resume"], ["checkpoints/latest.pt"]),
    (["--resume", "--run_name", "nosuch"], ["checkpoints/nosuch/latest.pt"]),
])
def test_train_refuses_in_one_line(flags, words, capsys):
    for folder in ("empty", "broken", "mine"):
        Path(folder).mkdir()
    Path("broken/a.png").write_bytes(b"not an image")
    Image.new("RGB", (16, 16)).save("mine/a.png")
    if "mine" in flags:
        Path("outputs").write_text("a file")
    before = tree()
    code = call(train, *(flags if "--resume" in flags else [*TINY, *flags]))
    if "broken" in flags:
        assert "warning: left out broken/a.png" in capsys.readouterr().err
    assert_one_line(code, capsys, *words)
    assert tree() == before and not Path("checkpoints").exists()


@pytest.mark.parametrize("flags", [
    ["--schedule", "foo"], ["--preset", "foo"], ["--prediction", "foo"], ["--batch_size", "many"],
    ["--batch_size", "1.5"], ["--lr", "fast"], ["--multipliers"], ["--no_such_flag", "1"], ["--augment", "untold"],
])
def test_a_value_that_a_flag_does_not_take(flags, capsys):
    assert call(train, *flags) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and flags[0] in line and "train.py --help" in line


def test_resume_names_every_setting_that_contradicts(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = tree()
    code = call(train, "--resume", "--lr", 0.5, "--width", 16, "--seed", 1, "--epochs", 9, "--workers", 1)
    assert_one_line(code, capsys, "--lr 0.0001", "--width 8", "--seed 0", "leave these flags out")
    assert "--epochs" not in code and "--workers" not in code
    assert_one_line(call(train, "--resume", "--preset", "quick"), capsys, "--prediction eps", "--schedule linear")
    assert tree() == before
