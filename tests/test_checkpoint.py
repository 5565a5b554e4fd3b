"""Checkpoints survive kills, full disks, truncation, files of others, and code that waits to be run.

Files are the business of utils/checkpoint.py, their meaning that of models/pipeline.py.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT

from critters import TYPES
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline, newest_checkpoint
from models.space import PixelSpace
from unet import UNet, UNetConfig
from utils import files
from utils.checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint

CONFIG = dict(width=8, multipliers=(1, 2), blocks=1, groups=4, head_width=8)


def network(**changes) -> UNet:
    net = UNet(UNetConfig(**{**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def content(net: UNet) -> dict:
    return dict(ema=net.state_dict(), network=dict(kind="unet", config=vars(net.config).copy()), step=12,
                scheduler=NoiseScheduler(77, schedule="cosine").config(), config=dict(prediction="v", image_size=8))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.pt", **content(network()))
    return tmp_path / "model.pt"


def assert_refused(path: Path, load: Callable[[Path], Any] = load_checkpoint) -> None:
    """Check that a file is refused in one line that names it."""
    with pytest.raises(CheckpointError) as refused:
        load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "latest.pt"
    history = [dict(epoch=1, loss=0.1 + 0.2), dict(epoch=2, loss=1e-300)]
    tensors = [torch.randn(3, 4), torch.arange(5), torch.tensor(1.5, dtype=torch.bfloat16)]
    save_checkpoint(path, tensors=tensors, history=history, multipliers=(1, 2), name="é")
    loaded = load_checkpoint(path)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(loaded["tensors"], tensors, strict=True))
    assert loaded["history"] == history and loaded["multipliers"] == (1, 2) and loaded["name"] == "é"


def test_a_saved_file_is_data(saved):
    assert torch.load(saved, weights_only=True)["step"] == 12


def test_saving_again_replaces_and_leaves_nothing_else(saved):
    save_checkpoint(saved, step=13)
    assert load_checkpoint(saved)["step"] == 13 and os.listdir(saved.parent) == ["model.pt"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_a_checkpoint_has_the_permissions_of_an_ordinary_file(saved):
    ordinary = saved.parent / "ordinary"
    ordinary.touch()
    assert saved.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("failure, reported_as", [
    (OSError(errno.ENOSPC, "No space left on device"), OSError),
    (RuntimeError("PyTorchStreamWriter failed writing file data/3"), OSError),  # torch's words for the same
    (KeyboardInterrupt(), KeyboardInterrupt),
])
@pytest.mark.parametrize("where", ["while writing", "while renaming"])
def test_a_failed_save_leaves_the_old_file_and_no_other(saved, monkeypatch, failure, reported_as, where):
    def fail_after_some_bytes(content, file):
        file.write(b"half of a checkpoint")
        raise failure

    def fail(*args):
        raise failure

    if where == "while writing":
        monkeypatch.setattr(torch, "save", fail_after_some_bytes)
    else:
        monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(reported_as):
        save_checkpoint(saved, step=13)
    assert load_checkpoint(saved)["step"] == 12 and os.listdir(saved.parent) == ["model.pt"]


def test_a_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "none.pt")
    assert_refused(tmp_path)  # a folder


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(saved, part):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(part * len(whole))])
    assert_refused(saved)


@pytest.mark.parametrize("damage", [
    b"hello world\n", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    b"PK\x03\x04 the start of a zip", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", b"\x00" * 512,
    # These stop torch's reader with an IndexError and a struct.error, which it does not document.
    b"a,b\n1,2\n", b"0", b"Git", *[random.Random(seed).randbytes(200) for seed in range(20)],
])
def test_a_file_of_other_bytes_is_refused(tmp_path, damage):
    path = tmp_path / "other.pt"
    path.write_bytes(damage)
    assert_refused(path)


class Trap:
    """Unpickled, it creates a file; that is how a checkpoint from the internet takes over a machine."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write, read", [
    (lambda trap, file: pickle.dump(trap, file, protocol=2), pickle.load),
    (lambda trap, file: torch.save({"format": FORMAT, "ema": trap}, file),
     lambda file: torch.load(file, weights_only=False)),
], ids=["pickle", "torch"])
def test_no_code_in_a_file_is_run(tmp_path, write, read):
    path, marker = tmp_path / "trap.pt", tmp_path / "code was run"
    with path.open("wb") as file:
        write(Trap(marker), file)
    assert_refused(path)
    assert_refused(path, Pipeline.load)
    assert not marker.exists()
    with path.open("rb") as file:
        read(file)
    assert marker.exists()  # the trap does work where nothing prevents it


@pytest.mark.parametrize("theirs", [{"state_dict": {"w": torch.ones(2)}}, [1, 2], torch.ones(3), {"format": "other 1"}])
def test_a_file_of_another_program_is_refused(tmp_path, theirs):
    torch.save(theirs, tmp_path / "theirs.pt")
    assert_refused(tmp_path / "theirs.pt")


def test_a_pipeline_has_the_network_and_the_scheduler_of_its_checkpoint(saved):
    original = network()
    pipeline = Pipeline.load(saved)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 76])
    net = pipeline.net
    assert not net.training and net.config == original.config and isinstance(pipeline.space, PixelSpace)
    assert torch.allclose(net(x, t), original(x, t), atol=1e-5)  # it may have another memory format
    assert pipeline.scheduler.config() == NoiseScheduler(77, schedule="cosine").config()
    assert pipeline.settings == dict(prediction="v", image_size=8)
    assert pipeline.class_names == ()  # a checkpoint without types is unconditional


def test_the_checkpoint_of_critters_that_comes_with_the_repository_loads():
    """It was written before the key "network" and the setting --data_seed."""
    path = ROOT / "checkpoints/critters.pt"
    assert {"unet"} == {"unet", "network"} & torch.load(path, weights_only=True, mmap=True).keys()
    pipeline = Pipeline.load(path)
    assert pipeline.class_names == TYPES and pipeline.settings["data_seed"] == pipeline.settings["seed"]
    labels = pipeline.class_labels([("fire", "flying")])
    images = pipeline.sample([3], labels=labels, guidance=2.0, sampler="ddim", steps=1)
    assert images.shape == (1, 3, pipeline.image_size, pipeline.image_size) and images.std() > 0.1


@pytest.mark.parametrize("key", ["ema", "network", "scheduler", "config"])
def test_an_incomplete_checkpoint_is_refused(tmp_path, key):
    parts = content(network())
    del parts[key]
    save_checkpoint(tmp_path / "part.pt", **parts)
    assert_refused(tmp_path / "part.pt", Pipeline.load)


def unet(**changes) -> dict:
    """Return the content of a checkpoint at "network"."""
    return dict(network=dict(kind="unet", config={**CONFIG, **changes}))


@pytest.mark.parametrize("changes", [
    dict(ema=network(width=16).state_dict()), dict(ema=[1, 2]), dict(ema={"conv_in.weight": "8"}),
    unet(depth=3), unet(width=-8), unet(width="8"), unet(multipliers=()), unet(multipliers=[]), unet(multipliers=None),
    dict(network=3), dict(network=dict(kind="unet")), dict(network=dict(kind="transformer", config=CONFIG)),
    dict(scheduler=dict(schedule="other")), dict(scheduler=dict(num_timesteps=10**15)), dict(config=3),
    dict(config=dict(prediction="v")), dict(config=dict(prediction="v", image_size=9)),
    dict(config=dict(prediction="v", image_size="8")), dict(config=dict(prediction="v", image_size=2**40)),
    dict(config=dict(prediction="y", image_size=8)),
])
def test_a_contradicting_checkpoint_is_refused(tmp_path, changes):
    save_checkpoint(tmp_path / "odd.pt", **{**content(network()), **changes})
    assert_refused(tmp_path / "odd.pt", Pipeline.load)


def test_empty_multipliers_are_refused_in_a_file_of_either_format(tmp_path):
    for number, key in enumerate([unet(multipliers=()), dict(network=None, unet={**CONFIG, "multipliers": ()})]):
        save_checkpoint(tmp_path / f"{number}.pt", **{**content(network()), **key})
        assert_refused(tmp_path / f"{number}.pt", Pipeline.load)


def test_newest_checkpoint_is_the_one_written_last(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert_refused(folder, newest_checkpoint)
    assert_refused(tmp_path / "nowhere", newest_checkpoint)
    for name, written in ("z.pt", 100), ("run/a.pt", 300), ("m.pt", 200), (".m.tmp.pt", 900), ("notes.txt", 900):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        os.utime(folder / name, (written, written))
    assert newest_checkpoint(folder) == folder / "run" / "a.pt"


def test_a_compressed_file_is_refused_before_it_is_unpacked(saved):
    """torch's reader would unpack compressed parts, and a few kilobytes can be many gigabytes of zeros."""
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(saved.parent / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr("model/data/99", bytes(10_000_000))
    assert_refused(saved.parent / "bomb.pt")


def test_a_network_too_large_for_any_memory_is_refused_without_trying(tmp_path):
    for number, changes in enumerate([dict(width=2**20), dict(blocks=10**9), dict(multipliers=(1, 2**20))]):
        save_checkpoint(tmp_path / f"{number}.pt", **{**content(network()), **unet(**changes)})
        assert_refused(tmp_path / f"{number}.pt", Pipeline.load)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net = network()
    net.conv_in.bias.data[3] = value
    save_checkpoint(tmp_path / "nan.pt", **content(net))
    assert_refused(tmp_path / "nan.pt", Pipeline.load)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit that only POSIX has")
def test_no_room_for_the_whole_file(saved):
    """The real failure, in torch's own writer: this process may not write files of more than 30 kB."""
    import resource

    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*model.pt"):
            save_checkpoint(saved, weights=[torch.zeros(1000) for _ in range(20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["model.pt"]
