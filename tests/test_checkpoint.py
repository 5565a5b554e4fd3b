"""Checkpoints survive what happens to files: kills, full disks, cuts, strangers, and code that waits to be run."""

import copy
import errno
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, load_checkpoint, load_model, newest_checkpoint, restore, save_checkpoint
from forward_diffusion import NoiseScheduler
from latents import Pixels
from unet import UNet, UNetConfig

CONFIG = dict(width=8, multipliers=(1, 2), blocks=1, groups=4, head_width=8)


def network(seed: int = 0, **changes) -> UNet:
    model = UNet(UNetConfig(**{**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def content(model: UNet) -> dict:
    return dict(ema=model.state_dict(), unet=vars(model.config).copy(), step=12,
                scheduler=NoiseScheduler(77, schedule="cosine").config(), config=dict(prediction="v", image_size=8))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.pt", **content(network()))
    return tmp_path / "model.pt"


def assert_refused(path: Path, load=load_checkpoint) -> None:
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


def test_what_is_saved_loads_as_data(saved):
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
    (RuntimeError("PyTorchStreamWriter failed writing file data/3"), OSError),  # how torch says the same
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
        monkeypatch.setattr(checkpoint.os, "replace", fail)
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
    # These stop torch's reader with an IndexError and a struct.error, of which it says nothing.
    b"a,b\n1,2\n", b"0", b"Git", *[random.Random(seed).randbytes(200) for seed in range(20)],
])
def test_a_file_of_other_bytes_is_refused(tmp_path, damage):
    path = tmp_path / "other.pt"
    path.write_bytes(damage)
    assert_refused(path)


class Trap:
    """Unpickled, it would create a file; that is how a checkpoint from the internet takes over a machine."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write, read", [
    (lambda trap, file: pickle.dump(trap, file, protocol=2), pickle.load),
    (lambda trap, file: torch.save({"format": checkpoint.FORMAT, "ema": trap}, file),
     lambda file: torch.load(file, weights_only=False)),
], ids=["pickle", "torch"])
def test_no_code_in_a_file_is_run(tmp_path, write, read):
    path, marker = tmp_path / "trap.pt", tmp_path / "code was run"
    with path.open("wb") as file:
        write(Trap(marker), file)
    assert_refused(path)
    assert_refused(path, load_model)
    assert not marker.exists()
    with path.open("rb") as file:
        read(file)
    assert marker.exists()  # the trap does work, where it is let


@pytest.mark.parametrize("theirs", [{"state_dict": {"w": torch.ones(2)}}, [1, 2], torch.ones(3), {"format": "other 1"}])
def test_a_stranger_s_file_is_refused(tmp_path, theirs):
    torch.save(theirs, tmp_path / "theirs.pt")
    assert_refused(tmp_path / "theirs.pt")


def test_load_model_rebuilds_the_network_and_the_scheduler(saved):
    original = network()
    model, scheduler, codec, config = load_model(saved)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 76])
    assert not model.training and model.config == original.config and isinstance(codec, Pixels)
    assert torch.allclose(model(x, t), original(x, t), atol=1e-5)  # its numbers may lie in another order in memory
    assert scheduler.config() == NoiseScheduler(77, schedule="cosine").config()
    assert config == dict(prediction="v", image_size=8, types=())  # a checkpoint without types is unconditional


@pytest.mark.parametrize("key", ["ema", "unet", "scheduler", "config"])
def test_an_incomplete_checkpoint_is_refused(tmp_path, key):
    parts = content(network())
    del parts[key]
    save_checkpoint(tmp_path / "part.pt", **parts)
    assert_refused(tmp_path / "part.pt", load_model)


@pytest.mark.parametrize("changes", [
    dict(ema=network(width=16).state_dict()), dict(ema=[1, 2]), dict(unet=dict(depth=3)), dict(unet=dict(width=-8)),
    dict(scheduler=dict(schedule="other")), dict(scheduler=dict(num_timesteps=10**15)), dict(config=3),
    dict(config=dict(prediction="v")), dict(config=dict(prediction="v", image_size=9)), dict(unet=dict(width="8")),
    dict(config=dict(prediction="v", image_size="8")), dict(config=dict(prediction="v", image_size=2**40)),
    dict(config=dict(prediction="y", image_size=8)), dict(ema={"conv_in.weight": "8"}),
])
def test_a_contradicting_checkpoint_is_refused(tmp_path, changes):
    save_checkpoint(tmp_path / "odd.pt", **{**content(network()), **changes})
    assert_refused(tmp_path / "odd.pt", load_model)


def test_newest_checkpoint_is_the_one_written_last(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert_refused(folder, newest_checkpoint)
    assert_refused(tmp_path / "nowhere", newest_checkpoint)
    for name, written in ("z.pt", 100), ("run/a.pt", 300), ("m.pt", 200), (".m.pt.tmp.pt", 900), ("notes.txt", 900):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        os.utime(folder / name, (written, written))
    assert newest_checkpoint(folder) == folder / "run" / "a.pt"


def test_a_file_that_swells_is_refused_before_it_does(saved):
    """torch's reader would unpack compressed parts, and a few kilobytes can be many gigabytes of zeros."""
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(saved.parent / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr("model/data/99", bytes(10_000_000))
    assert_refused(saved.parent / "bomb.pt")


def test_a_size_that_no_memory_holds_is_refused_without_trying(tmp_path):
    for number, unet in enumerate([dict(width=2**20), dict(blocks=10**9), dict(multipliers=(1, 2**20))]):
        save_checkpoint(tmp_path / f"{number}.pt", **{**content(network()), "unet": {**CONFIG, **unet}})
        assert_refused(tmp_path / f"{number}.pt", load_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = network()
    model.conv_in.bias.data[3] = value
    save_checkpoint(tmp_path / "nan.pt", **content(model))
    assert_refused(tmp_path / "nan.pt", load_model)


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


def trained(seed: int, **changes) -> tuple[UNet, torch.optim.Adam]:
    model = network(seed, **changes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3, 8, 8), torch.tensor([seed])).sum().backward()
    optimizer.step()
    return model, optimizer


def test_restore_puts_the_training_back():
    model, optimizer = trained(1)
    content = dict(model=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
    content["optimizer"]["param_groups"][0]["lr"] = "not a number"  # settings come from the code, never from a file
    other, its_optimizer = trained(2)
    restore("a.pt", content, its_optimizer, torch.amp.GradScaler("cpu", enabled=False), model=other)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert its_optimizer.param_groups[0]["lr"] == 1e-3
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(optimizer.state[p][name].equal(its_optimizer.state[q][name]) for name in optimizer.state[p])


def test_a_training_goes_on_the_same_on_a_device_with_another_order_of_memory():
    """A GPU's channels last, a CPU's planes: fused Adam takes numbers as they lie, so they must lie as weights do."""
    def next_step(fused: bool) -> list[torch.Tensor]:
        model, optimizer = trained(1)
        state = copy.deepcopy(optimizer.state_dict())
        for memory in state["state"].values():
            for name, value in memory.items():
                memory[name] = value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        other = network(2)
        its_optimizer = torch.optim.Adam(other.parameters(), lr=1e-3, fused=fused)
        restore("a.pt", dict(model=model.state_dict(), optimizer=state), its_optimizer,
                torch.amp.GradScaler("cpu", enabled=False), model=other)
        other(torch.ones(1, 3, 8, 8), torch.tensor([3])).square().sum().backward()
        its_optimizer.step()
        return list(other.parameters())

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(next_step(True), next_step(False), strict=True))


@pytest.mark.parametrize("damage", [
    lambda c: c.pop("model"), lambda c: c.update(model=3), lambda c: c["model"].pop("conv_in.bias"),
    lambda c: c["model"].update({"conv_in.bias": torch.zeros(3)}), lambda c: c["model"].update(more=torch.zeros(1)),
    lambda c: c["model"]["conv_in.bias"].fill_(float("nan")), lambda c: c.pop("optimizer"),
    lambda c: c.update(optimizer=[]), lambda c: c["optimizer"]["state"][0].clear(),
    lambda c: c["optimizer"]["state"].pop(0),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    lambda c: c["optimizer"]["state"].update({9999: {}}), lambda c: c["optimizer"]["state"][0].update(exp_avg="zero"),
    lambda c: c["scaler"].pop("scale"), lambda c: c.update(scaler=3),
])
def test_restore_refuses_what_does_not_fit(damage):
    model, optimizer = trained(1)
    scaler = torch.amp.GradScaler("cpu")
    content = dict(model=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()),
                   scaler=scaler.state_dict())
    damage(content)
    assert_refused(Path("a.pt"), lambda path: restore(path, content, optimizer, scaler, model=model))
