"""benchmark.py and profiling.py: what they count is right, and they say what they cannot do. Nothing is timed here."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import benchmark
import profiling
from profiling import OTHERS, CountBytes, Rates, kind_of, profile
from scripts import assert_one_line, call

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ("--width 8 --groups 4 --multipliers 1 2 --blocks 1 --image_size 16 --batch_size 4 --num_images 2 --rounds 2 "
         "--warmup 1 --steps 1 --passes 1 --seconds 1 --device cpu --precision fp32").split()


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(profiling, "_least_seconds", lambda work, device, times=1: (work(), 1e-3)[1])
    monkeypatch.setattr(benchmark, "SAMPLERS", {"ddpm": 5, "dpm++": 3})


def test_it_prints_a_table_and_writes_all_it_has(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "memory_in_own_process", lambda name: 10**9)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    assert call(benchmark, *SMALL, "--against") == 0
    said = capsys.readouterr().out
    report = json.loads(Path("outputs/benchmark.json").read_text())
    for package in ("diffusers", "denoising-diffusion-pytorch"):
        assert f"{package} is not installed" in said and f"pip install {package}" in said
    assert list(report["training"]) == ["PokeDiff, fp32", "plain loop, fp32"] and list(report["sampling"]) == ["fp32"]
    for figures in report["training"].values():
        assert len(figures["images_per_second"]) == 2 and figures["images_per_second"][0] <= figures["median"]
        assert 0 <= figures["waiting"] < 1 and figures["gflop_step"] > 2 * 4 * figures["gflop_forward"] > 0
        assert figures["of_machine"] == pytest.approx(
            figures["gflop_step"] * 1e9 * figures["median"] / 4 / report["machine"]["fp32"]["flops"], rel=0.5)
    assert report["training"]["plain loop, fp32"]["times_plain"] == 1
    figures, forward = report["sampling"]["fp32"]["ddpm-5"], report["training"]["PokeDiff, fp32"]["gflop_forward"]
    assert figures["passes"] in (1, 2, 3, 4) and figures["gflop_image"] == pytest.approx(5 * forward)
    assert "| plain loop, fp32 |" in said and "| dpm++-3 |" in said


def test_it_measures_an_autoencoder_s_latents_decoding_included(trained_autoencoder, monkeypatch):
    autoencoder, = trained_autoencoder.rglob("final_model.pt")
    monkeypatch.setattr(benchmark, "memory_in_own_process", lambda name: 10**9)
    assert call(benchmark, *SMALL, "--autoencoder", autoencoder) == 0
    report = json.loads(Path("outputs/benchmark.json").read_text())
    forward = report["training"]["PokeDiff, fp32"]["gflop_forward"]
    decoding = report["sampling"]["fp32"]["ddpm-5"]["gflop_image"] - 5 * forward
    assert decoding > forward > 0  # of 4 x 4 latents by a tiny network, and of 16 x 16 pixels
    assert call(benchmark, *SMALL, "--alone", "--rounds", 1) == 0
    assert list(json.loads(Path("outputs/benchmark.json").read_text())["training"]) == ["PokeDiff, fp32"]
    code = call(benchmark, *SMALL, "--autoencoder", autoencoder, "--against")
    assert code.startswith("error: ") and "--autoencoder" in code


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *SMALL])
    assert 10**8 < benchmark.memory_in_own_process("plain loop, fp32") < 10**10


def test_the_profile_shows_where_the_time_goes(capsys):
    assert call(benchmark, *SMALL, "--profile") == 0
    said = capsys.readouterr().out
    assert "| convolutions |" in said and "| group normalisation |" in said and "| optimizer and average |" in said
    rows = json.loads(Path("outputs/benchmark.json").read_text())["rows"]
    assert sum(row["flops"] for row in rows if row["kind"] == "convolutions") > 0.5 * sum(row["flops"] for row in rows)


def test_flops_bytes_and_floors_of_known_work():
    a, b = torch.ones(50, 40), torch.ones(40, 30)

    def work():
        (a @ b).T.relu_()  # the transpose is a view, which moves nothing

    rows = {row.kind: row for row in profile(work, torch.device("cpu"), Rates(flops=1e6, bytes=1e3))}
    product, relu = rows["matrix products and attention"], rows[OTHERS]
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
    ("aten::_fused_adam_", "optimizer and average"), ("aten::silu_backward", "silu"), ("aten::mul", OTHERS),
    ("aten::_foreach_add_", "optimizer and average"), ("aten::_scaled_dot_product_flash_attention",
                                                       "matrix products and attention"),
])
def test_kinds_of_operation(name, kind):
    assert kind_of(name) == kind


def test_bad_flags_are_one_line(capsys):
    assert_one_line(call(benchmark, "--image_size", 30, "--device", "cpu"), capsys, "--image_size", "multiple of 8")
    assert_one_line(call(benchmark, *SMALL, "--groups", 3), capsys, "groups")
