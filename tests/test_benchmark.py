"""tools/benchmark: what it counts is right, and what it cannot do is one line. Nothing is timed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import assert_one_line, call

from reverse_diffusion import SAMPLERS
from tools.benchmark import __main__ as benchmark
from tools.benchmark import measure, roofline
from tools.benchmark.roofline import OTHER, CountBytes, Rates, kind_of, profile

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ("--width 8 --groups 4 --multipliers 1 2 --blocks 1 --image_size 16 --batch_size 4 --num_images 2 --rounds 2 "
         "--warmup 1 --steps 1 --passes 1 --seconds 1 --device cpu --precision fp32").split()


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    monkeypatch.setattr(roofline, "_least_seconds", lambda work, device, times=1: (work(), 1e-3)[1])
    monkeypatch.setattr(measure, "default_steps", lambda sampler, num_timesteps: 5 if sampler == "ddpm" else 3)


@pytest.fixture
def no_memory_processes(monkeypatch):
    monkeypatch.setattr(benchmark, "measure_memory", lambda name, flags: 10**9)


def report() -> dict:
    return json.loads(Path("outputs/benchmark.json").read_text())


def test_it_prints_tables_and_writes_everything(no_memory_processes, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    assert call(benchmark, *SMALL, "--against") == 0
    printed, written = capsys.readouterr().out, report()
    for package in ("diffusers", "denoising-diffusion-pytorch"):
        assert f"{package} is left out" in printed and f"pip install {package}" in printed
    assert list(written["training"]) == ["PokeDiff, fp32", "plain loop, fp32"]
    for figures in written["training"].values():
        assert len(figures["images_per_second"]) == 2 and figures["images_per_second"][0] <= figures["median"]
        assert 0 <= figures["data_wait"] < 1 and figures["gflop_step"] > 2 * 4 * figures["gflop_forward"] > 0
        assert figures["matmul_fraction"] == pytest.approx(
            figures["gflop_step"] * 1e9 * figures["median"] / 4 / written["machine"]["fp32"]["flops"], rel=0.5)
        assert figures["peak_memory"] == 10**9
    assert written["training"]["plain loop, fp32"]["speedup"] == 1
    assert "| plain loop, fp32 |" in printed and "| dpm++-3 |" in printed

    assert list(written["sampling"]) == ["fp32"]
    assert list(written["sampling"]["fp32"]) == [f"{name}-{5 if name == 'ddpm' else 3}" for name in SAMPLERS
                                                 if not SAMPLERS[name].tuned]
    figures, forward = written["sampling"]["fp32"]["ddpm-5"], written["training"]["PokeDiff, fp32"]["gflop_forward"]
    assert figures["passes"] in (1, 2, 3, 4) and figures["gflop_image"] == pytest.approx(5 * forward)


def test_two_precisions_are_compared(no_memory_processes, capsys):
    """bfloat16 is emulated where the processor does not have it."""
    assert call(benchmark, *SMALL, "--rounds", 1, "--precision", "bf16") == 0
    written, printed = report(), capsys.readouterr().out
    assert list(written["training"]) == ["PokeDiff, bf16", "PokeDiff, fp32", "plain loop, fp32"]
    assert list(written["sampling"]) == ["bf16", "fp32"]
    assert {figures["speedup"] for figures in written["sampling"]["fp32"].values()} == {1}
    assert "| sampling | images/s, bf16 | images/s, fp32 | speedup | GFLOP per image | passes timed |" in printed


def test_latents_of_an_autoencoder_with_decoding(trained_autoencoder, no_memory_processes, capsys):
    autoencoder, = trained_autoencoder.rglob("final_model.pt")
    assert call(benchmark, *SMALL, "--autoencoder", autoencoder) == 0
    forward = report()["training"]["PokeDiff, fp32"]["gflop_forward"]
    decoding = report()["sampling"]["fp32"]["ddpm-5"]["gflop_image"] - 5 * forward
    assert decoding > forward > 0  # the network works on 4 x 4 latents, the decoder up to 16 x 16 pixels
    assert call(benchmark, *SMALL, "--alone", "--rounds", 1) == 0
    assert list(report()["training"]) == ["PokeDiff, fp32"]
    capsys.readouterr()
    assert_one_line(call(benchmark, *SMALL, "--autoencoder", autoencoder, "--against"), capsys, "--autoencoder")


def test_memory_is_measured_in_a_process_of_its_own():
    """From a folder that is not the repository's, in which relative paths keep their meaning."""
    assert 10**8 < measure.measure_memory("plain loop, fp32", SMALL) < 10**10
    with pytest.raises(ValueError, match="memory of plain loop.*no autoencoder at lost.pt"):
        measure.measure_memory("plain loop, fp32", [*SMALL, "--autoencoder", "lost.pt"])


def test_a_killed_memory_process_is_reported(monkeypatch):
    """The kernel ends a process that takes too much memory, which then says nothing itself."""
    killed = subprocess.CompletedProcess([], returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: killed)
    with pytest.raises(ValueError, match="memory of plain loop.*-9"):
        measure.measure_memory("plain loop, fp32", SMALL)


def test_the_profile_shows_where_the_time_goes(capsys):
    assert call(benchmark, *SMALL, "--profile") == 0
    printed = capsys.readouterr().out
    assert "| convolutions |" in printed and "| group normalisation |" in printed and "| optimizer and EMA |" in printed
    rows = report()["rows"]
    assert sum(row["flops"] for row in rows if row["kind"] == "convolutions") > 0.5 * sum(row["flops"] for row in rows)


def test_flops_bytes_and_floors_of_known_work():
    a, b = torch.ones(50, 40), torch.ones(40, 30)

    def work():
        (a @ b).T.relu_()  # the transpose is a view, which moves nothing

    rows = {row.kind: row for row in profile(work, torch.device("cpu"), Rates(flops=1e6, bytes=1e3))}
    product, relu = rows["matrix products and attention"], rows[OTHER]
    assert product.flops == 2 * 50 * 40 * 30 and product.bytes == 4 * (50 * 40 + 40 * 30 + 50 * 30)
    assert product.floor == product.bytes / 1e3 > product.flops / 1e6 and relu.flops == 0
    assert relu.bytes == 4 * 2 * 50 * 30  # read and written


def test_bytes_of_a_convolution():
    images, weights = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    with CountBytes() as counter:
        F.conv2d(images, weights, padding=1)
    assert counter.bytes == {"convolutions": 4 * (2 * 3 * 64 + 5 * 27 + 2 * 5 * 64)}


@pytest.mark.parametrize("name, kind", [
    ("aten::mkldnn_convolution", "convolutions"), ("aten::native_group_norm_backward", "group normalisation"),
    ("aten::_fused_adam_", "optimizer and EMA"), ("aten::silu_backward", "SiLU"), ("aten::mul", OTHER),
    ("aten::_foreach_add_", "optimizer and EMA"), ("aten::_scaled_dot_product_flash_attention",
                                                   "matrix products and attention"),
])
def test_kinds_of_operation(name, kind):
    assert kind_of(name) == kind


def test_bad_flags_are_one_line(capsys):
    assert_one_line(call(benchmark, "--image_size", 30, "--device", "cpu"), capsys, "--image_size", "multiple of 8")
    assert_one_line(call(benchmark, *SMALL, "--groups", 3), capsys, "groups")
    assert_one_line(call(benchmark, *SMALL, "--memory_of", "mine"), capsys, "--memory_of", "plain loop, fp32")
    assert_one_line(call(benchmark, *SMALL, "--output", "."), capsys, "--output", "folder")
