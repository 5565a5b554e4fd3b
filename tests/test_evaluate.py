"""evaluate.py as people use it, on tiny models and folders; and what the report says of figures that are made up."""

import copy
import json
import re
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import evaluate
import report
from checkpoint import save_checkpoint
from critters import TYPES, draw_critters
from forward_diffusion import NoiseScheduler
from pictures import save_picture, to_image
from unet import UNet, UNetConfig

FEW = ("--num_samples 60 --steps 2 --num_likelihood 6 --likelihood_steps 3 --device cpu --precision fp32 "
       "--output report").split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*flags) -> int | str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        try:
            evaluate.main()
        except SystemExit as stopped:
            return stopped.code
    return 0


def checkpoint(path: str, *, data: str = "critters", names: tuple[str, ...] = (), held_out: list[str] = (),
               epoch: int = 1) -> str:
    """A tiny network with random weights, as train.py writes it."""
    torch.manual_seed(epoch)
    unet = UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=len(names))
    config = dict(data=data, num_critters=110, labels="auto", image_size=16, seed=0, prediction="v", sampler="ddim",
                  sample_steps=2)
    model = UNet(unet)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)  # it starts at 0, and all networks would be the same
    save_checkpoint(path, ema=model.state_dict(), unet=asdict(unet), scheduler=NoiseScheduler(50).config(),
                    config=config, types=list(names), held_out=list(held_out), step=epoch, epoch=epoch)
    return path


def write_folder(folder: str, images: torch.Tensor) -> list[str]:
    Path(folder).mkdir()
    names = [f"{i:03d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        save_picture(to_image(image), Path(folder, name))
    return names


def critters(count: int, seed: int, side: int = 16) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, side, seed)[0]).permute(0, 3, 1, 2)


def figures() -> dict:
    return json.loads(Path("report/report.json").read_text())["runs"][-1]["figures"]


def test_checkpoints_of_one_training_give_a_report_over_time():
    files = [checkpoint(f"{epoch}.pt", names=TYPES, epoch=epoch) for epoch in (20, 10)]
    assert call("--checkpoint", *files, *FEW) == 0
    made = json.loads(Path("report/report.json").read_text())
    assert [run["epoch"] for run in made["runs"]] == [10, 20]
    assert "fresh" in made["summary"] and made["epoch_to_keep"]
    measured = made["runs"][0]["figures"].keys()
    assert set(report.MEANINGS) - {"fid", "kid"} <= measured
    assert made["runs"][0]["figures"]["wasserstein"] != made["runs"][1]["figures"]["wasserstein"]

    page = Path("report/report.html").read_text()
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r"src='([^']{22})", page))
    assert "href" not in page and page.count("<img") == 2 + evaluate.PAIRS + 2  # grids, pairs, two plots
    for name in measured & report.MEANINGS.keys():
        assert report.MEANINGS[name][3].replace("'", "&#x27;") in page
    for name in ("over_time.png", "bits.png", "closest_pairs.png"):
        assert Path("report", name).stat().st_size > 1000


def test_a_folder_of_planted_copies_is_reported_as_such():
    data = critters(120, 0, 32)
    write_folder("data", data)
    write_folder("copied", data[:60].flip(-1))
    write_folder("fresh", critters(60, 1, 32))
    assert call("--samples", "copied", "--data", "data", "--output", "report") == 0
    assert figures()["copies"]["value"] > 0.95 and figures()["copies"]["low"] > 0.9
    assert "The model copies" in Path("report/report.html").read_text()
    assert call("--samples", "fresh", "--data", "data", "--output", "report") == 0
    assert figures()["copies"]["value"] <= 0.03
    assert figures()["border"]["value"] == pytest.approx(1) and "bits_train" not in figures()


def test_pictures_kept_aside_are_found_by_name():
    names = write_folder("data", critters(120, 0))
    held_out = names[::6]
    assert call("--checkpoint", checkpoint("a.pt", data="data", held_out=held_out), *FEW) == 0
    made = json.loads(Path("report/report.json").read_text())
    assert "100 training pictures" in made["summary"] and "20 kept aside" in made["summary"]
    assert made["runs"][0]["bits"]["held_out"]["num_images"] == 6 and not made["notes"]
    assert not {pair["picture"] for pair in made["runs"][0]["copies"]["closest"]} & set(held_out)
    code = call("--checkpoint", checkpoint("b.pt", data="data", held_out=["elsewhere.png"]), *FEW)
    assert code.startswith("error: none of the 1 pictures")


def test_what_cannot_be_measured_is_said_and_not_made_up():
    write_folder("data", critters(40, 0))
    assert call("--checkpoint", checkpoint("a.pt", data="data"), *FEW, "--num_samples", 3) == 0
    made = json.loads(Path("report/report.json").read_text())
    assert not {"precision", "wasserstein", "copies", "bits_held_out"} & made["runs"][0]["figures"].keys()
    notes = " ".join(made["notes"])
    assert all(words in notes for words in ("kept aside", "Distances: a distance needs 50", "Copies: finding copies"))
    assert all(note.replace("'", "&#x27;") in Path("report/report.html").read_text() for note in made["notes"])


def test_samples_are_drawn_as_the_training_s_grids_were_and_another_sampler_has_its_own_steps():
    write_folder("data", critters(4, 0))
    flags = ["--checkpoint", checkpoint("a.pt", data="data"), "--num_samples", 1, "--num_likelihood", 0]
    for more, expected in ([], ("ddim", 2)), (["--sampler", "sde-dpm++"], ("sde-dpm++", 50)):
        assert call(*flags, *more, "--device", "cpu", "--output", "report") == 0
        drawn = json.loads(Path("report/report.json").read_text())["runs"][0]["sampling"]
        assert (drawn["sampler"], drawn["steps"]) == expected


def test_errors_are_one_line():
    write_folder("some", critters(3, 0))
    for flags, words in (
        (["--checkpoint", "none.pt"], "no checkpoint at none.pt"),
        ([], "no checkpoint in checkpoints/"),
        (["--samples", "some"], "--samples needs --data"),
        (["--samples", "nowhere", "--data", "some"], "no folder nowhere"),
        (["--checkpoint", checkpoint("a.pt", data="missing")], "no folder missing"),
        (["--checkpoint", checkpoint("b.pt"), checkpoint("c.pt", data="some")], "trained on different data"),
        (["--checkpoint", "b.pt", "--device", "tpu9"], "no device"),
    ):
        code = call(*flags)
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code and words in code, code


def test_fid_is_asked_of_torch_fidelity_where_it_is_installed(monkeypatch):
    write_folder("data", critters(110, 0))
    write_folder("samples", critters(55, 1))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as though it were not
    code = call("--samples", "samples", "--data", "data", "--fid")
    assert code.startswith("error: --fid needs torch-fidelity") and "pip install" in code

    def calculate_metrics(input1, input2, **options):
        assert input1[0].dtype == torch.uint8 and input1[0].shape == (3, 16, 16) and len(input1) == len(input2)
        return dict(frechet_inception_distance=12.5, kernel_inception_distance_mean=0.01)

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    assert call("--samples", "samples", "--data", "data", "--fid", "--output", "report") == 0
    assert figures()["fid"] == {"value": 12.5, "real": {"value": 12.5}}


def made_up(epoch: int, copies: tuple[float, float, float], distance: float) -> dict:
    def figure(value: float, low: float, high: float) -> dict:
        return dict(value=value, low=low, high=high)

    real = figure(0.8, 0.75, 0.85)
    return dict(epoch=epoch, num_samples=1000, copies=dict(alarm=0.01), figures=dict(
        copies=figure(*copies), wasserstein=figure(distance, distance - 0.01, distance + 0.01),
        precision={**figure(0.6, 0.55, 0.65), "real": real}, tilt={**figure(9, 8.5, 9.5), "real": figure(7, 6.8, 7.2)},
        brightness={**figure(0.5, 0.4, 0.6), "real": figure(0.5, 0.49, 0.51)},
    ))


def test_the_verdict_follows_the_figures():
    honest, copying = made_up(1, (0.012, 0.007, 0.02), 0.1), made_up(2, (0.2, 0.18, 0.22), 0.05)
    said = " ".join(report.verdict(honest))
    assert "does not copy: 12 of 1,000" in said and "Fewer samples look like real" in said and "glance: tilt in" in said
    assert "The model copies: 200 of 1,000" in " ".join(report.verdict(copying))
    alike = copy.deepcopy(copying)  # unseen pictures are called copies as often: it is the test that errs
    alike["figures"]["copies"]["real"] = dict(value=0.2, low=0.18, high=0.22)
    assert "The model copies" not in " ".join(report.verdict(alike))
    few = copy.deepcopy(honest)
    few["figures"]["copies"] = dict(value=0, low=0, high=0.05)
    assert "No copying can be shown" in " ".join(report.verdict(few))


def test_the_epoch_to_keep_is_the_best_of_those_that_do_not_copy():
    chance, much = (0.01, 0.005, 0.02), (0.1, 0.08, 0.12)
    runs = [made_up(10, chance, 0.2), made_up(20, chance, 0.102), made_up(30, chance, 0.1), made_up(40, much, 0.05)]
    kept = report.epoch_to_keep(runs)
    assert kept.startswith("Keep epoch 30") and "Epoch 20 is as near" in kept and "1 of 4 copy" in kept
    assert "Every checkpoint copies" in report.epoch_to_keep(runs[-1:] * 2)
    assert report.epoch_to_keep(runs[:1]) == ""
