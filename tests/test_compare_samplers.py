"""compare_samplers.py and recognise.py through their command lines, with a network that was not trained.

    python -m pytest tests/test_compare_samplers.py
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compare_samplers  # noqa: E402
import recognise  # noqa: E402
from checkpoint import save_checkpoint  # noqa: E402
from critters import TYPES  # noqa: E402
from forward_diffusion import NoiseScheduler  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(3)
    model = UNet(UNetConfig(width=8, multipliers=(1,), blocks=1, groups=4, num_types=len(TYPES)))
    save_checkpoint(tmp_path / "model.pt", ema=model.state_dict(), unet=asdict(model.config), types=list(TYPES),
                    scheduler=NoiseScheduler(20, schedule="cosine").config(), held_out=[],
                    config=dict(prediction="v", image_size=16))
    return tmp_path / "model.pt"


def call(script, *flags) -> int | str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags), "--device", "cpu"])
        try:
            script.main()
        except SystemExit as stopped:
            return stopped.code
    return 0


def test_compare_samplers_goes_on_where_it_was(checkpoint, monkeypatch, capsys):
    runs = {"ddpm": (dict(sampler="ddpm"), (2, 20)), "dpm++": (dict(sampler="dpm++"), (2,))}
    monkeypatch.setattr(compare_samplers, "YARDSTICK", ("ddpm", 20))
    flags = ["--checkpoint", checkpoint, "--num_images", 64]
    monkeypatch.setattr(compare_samplers, "RUNS", {"ddpm": runs["ddpm"]})
    assert call(compare_samplers, *flags) == 0
    first = json.loads(Path("outputs/samplers.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"]) for row in first] == [("ddpm", 2), ("ddpm", 20)]
    monkeypatch.setattr(compare_samplers, "RUNS", runs)
    assert call(compare_samplers, *flags) == 0
    results = json.loads(Path("outputs/samplers.json").read_text())
    assert results["rows"][:2] == first and len(results["rows"]) == 3  # what was measured before is kept
    table = Path("outputs/samplers.md").read_text().splitlines()
    assert len(table) == 2 + 3 + 1 and "| +0.0000 ± 0.0000 |" in table[3] and table[4].startswith("| `dpm++` | 2 |")
    assert Path("outputs/samplers.png").stat().st_size > 10_000
    # Noise out of a network that knows nothing is further from critters than other critters are.
    assert min(row["distances"][0] for row in results["rows"]) > 2 * results["real"][0]
    line = call(compare_samplers, "--checkpoint", checkpoint, "--num_images", 65)
    assert "remove it, or give another --output" in line and "\n" not in line


def test_jackknife():
    """For a mean it gives the mean's usual standard error."""
    x = np.random.default_rng(0).normal(size=compare_samplers.GROUPS)
    value, error = compare_samplers.with_error([x.mean(), *(np.delete(x, i).mean() for i in range(len(x)))])
    assert value == x.mean() and error == pytest.approx(x.std(ddof=1) / len(x) ** 0.5)


def test_recognise(checkpoint, capsys):
    assert call(recognise, "--checkpoint", checkpoint, "--num_images", 2, "--num_pairs", 1, "--steps", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = {line.split()[1]: float(line.split()[0]) for line in lines[1 : 1 + len(TYPES)]}
    assert set(shares) == set(TYPES)
    assert 0 <= np.mean(list(shares.values())) < 50  # the network does not look at types, so one in ten is luck
    assert "45 pairs" in lines[-4]


def test_a_model_of_something_else(tmp_path):
    model = UNet(UNetConfig(width=8, multipliers=(1,), blocks=1, groups=4, num_types=1))
    save_checkpoint("other.pt", ema=model.state_dict(), unet=asdict(model.config), types=["cat"], held_out=[],
                    scheduler=NoiseScheduler(20).config(), config=dict(prediction="eps", image_size=16))
    for script in (compare_samplers, recognise):
        line = call(script, "--checkpoint", "other.pt")
        assert "other.pt is not a model of critters" in line and "\n" not in line
