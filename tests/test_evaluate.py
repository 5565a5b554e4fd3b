"""evaluate.py as people use it, on tiny models and folders."""

import gc
import json
import re
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scripts import call

import evaluate
from critters import TYPES, draw_critters
from evaluation.meanings import MEANINGS
from evaluation.measure import NUM_PAIRS
from forward_diffusion import NoiseScheduler
from unet import UNet, UNetConfig
from utils.checkpoint import save_checkpoint
from utils.images import enlarge, save_image, to_pil

pytestmark = pytest.mark.usefixtures("own_folder")
FEW = ("--num_samples 60 --num_guided 20 --steps 2 --num_likelihood 6 --likelihood_steps 3 --device cpu "
       "--precision fp32 --output report").split()


def checkpoint(path: str, *, data: str = "critters", names: tuple[str, ...] = (), held_out: list[str] = (),
               epoch: int = 1, **settings) -> str:
    """A tiny network with random weights, as train.py writes it."""
    torch.manual_seed(epoch)
    unet = UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=len(names))
    config = dict(data=data, num_critters=110, labels="auto", image_size=16, seed=0, prediction="v", sampler="ddim",
                  sample_steps=2) | settings
    model = UNet(unet)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)  # it starts at 0, and all networks would be the same
    save_checkpoint(path, ema=model.state_dict(), network=dict(kind="unet", config=asdict(unet)),
                    scheduler=NoiseScheduler(50).config(), config=config, types=list(names), held_out=list(held_out),
                    step=epoch, epoch=epoch)
    return path


def write_folder(folder: str, images: torch.Tensor, scale: int = 1) -> list[str]:
    names = [f"{i:03d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        save_image(to_pil(enlarge(image, scale)), Path(folder, name), image_size=image.shape[-1], scale=scale)
    return names


def critters(count: int, seed: int, side: int = 16) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, side, seed)[0]).permute(0, 3, 1, 2)


def report() -> dict:
    return json.loads(Path("report/report.json").read_text())


def figures() -> dict:
    return report()["runs"][-1]["figures"]


def test_checkpoints_of_one_training_give_a_report_over_time(capsys):
    files = [checkpoint(f"{epoch}.pt", names=TYPES, epoch=epoch) for epoch in (20, 10)]
    assert call(evaluate, "--checkpoint", *files, *FEW) == 0
    content = report()
    assert [run["epoch"] for run in content["runs"]] == [10, 20]
    assert "110 unseen ones drawn for comparison" in content["summary"] and content["epoch_to_keep"]
    measured = content["runs"][0]["figures"].keys()
    outside = {name for name in MEANINGS if name.startswith("efficientnet_")}  # tests/test_efficientnet.py
    assert set(MEANINGS) - {"fid", "kid"} - outside <= measured
    assert content["runs"][0]["figures"]["wasserstein"] != content["runs"][1]["figures"]["wasserstein"]

    page = Path("report/report.html").read_text()
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r"src='([^']{22})", page))
    assert "href" not in page and page.count("<img") == 2 + NUM_PAIRS + 3  # grids, pairs, three plots
    for name in measured & MEANINGS.keys():
        assert MEANINGS[name].text.replace("'", "&#x27;") in page
    for name in ("over_time.png", "bits.png", "gap.png", "closest_pairs.png"):
        assert Path("report", name).stat().st_size > 1000

    # Copies by type, plain and guided; the error of unseen images at each noise level.
    run = content["runs"][0]
    rows = {row["type"]: row for row in run["copies_by_type"]}
    assert set(rows) - {"types of at most 5 training images"} <= set(TYPES) and len(rows) > 8
    for kind, total in (("plain", 60), ("guided", 20)):
        totals = [row[kind]["total"] for name, row in rows.items() if kind in row and name in TYPES]
        assert total <= sum(totals) <= 2 * total  # one or two types each
    assert "Copies by type" in page and "at guidance 3" in page
    assert [gap["noise"] for gap in run["gap_by_noise"]] == sorted(gap["noise"] for gap in run["gap_by_noise"])

    # The data set of the training is named everywhere.
    assert content["trained_on"] == content["runs"][0]["trained_on"] == "critters"
    assert "Model trained on: critters" in page
    assert "model trained on: critters" in capsys.readouterr().out


def test_one_checkpoint_at_a_time_is_in_memory(monkeypatch):
    files = [checkpoint(f"{epoch}.pt", epoch=epoch, num_critters=8) for epoch in (1, 2, 3)]
    in_memory, measure_samples = [], evaluate.measure_samples

    def count_networks() -> int:
        gc.collect()
        return sum(type(one) is UNet for one in gc.get_objects())

    def count(*args, **options) -> None:
        networks = count_networks()
        contents = [one for one in gc.get_objects() if type(one) is dict and {"format", "ema", "config"} <= one.keys()]
        in_memory.append((len(contents), networks))
        measure_samples(*args, **options)

    before = count_networks()
    monkeypatch.setattr(evaluate, "measure_samples", count)
    assert call(evaluate, "--checkpoint", *files, *FEW, "--num_samples", 1, "--num_likelihood", 0) == 0
    assert len(in_memory) == 3
    assert all(contents == 0 and networks <= before + 1 for contents, networks in in_memory)


def test_a_folder_of_planted_copies_is_reported_as_such():
    data = critters(120, 0, 32)
    write_folder("data", data)
    write_folder("copied", data[:60].flip(-1))
    write_folder("fresh", critters(60, 1, 32))
    assert call(evaluate, "--samples", "copied", "--data", "data", "--output", "report") == 0
    assert figures()["copies"]["value"] > 0.95 and figures()["copies"]["low"] > 0.9
    assert figures()["copies_ratio"]["value"] > 0.95 and "copies_by_type" not in report()["runs"][0]
    assert "The model copies" in Path("report/report.html").read_text()
    assert call(evaluate, "--samples", "fresh", "--data", "data", "--output", "report") == 0
    assert figures()["copies"]["value"] <= 0.03 and figures()["copies_ratio"]["value"] == 0
    assert figures()["border"]["value"] == pytest.approx(1) and "bits_train" not in figures()
    assert report()["trained_on"] is None and "trained on" not in Path("report/report.html").read_text()


def test_samples_that_were_enlarged_have_the_figures_of_their_native_pixels():
    write_folder("data", critters(110, 0))
    write_folder("native", critters(55, 1))
    write_folder("enlarged", critters(55, 1), scale=2)
    found = []
    for folder in ("native", "enlarged"):
        assert call(evaluate, "--samples", folder, "--data", "data", "--output", "report") == 0
        found.append(figures())
    assert found[0] == found[1]


def test_held_out_images_are_found_by_name():
    names = write_folder("data", critters(120, 0))
    held_out = names[::6]
    assert call(evaluate, "--checkpoint", checkpoint("a.pt", data="data", held_out=held_out), *FEW) == 0
    content = report()
    assert "100 training images" in content["summary"] and "20 held out" in content["summary"]
    assert content["trained_on"] == "data"
    assert content["runs"][0]["bits"]["held_out"]["num_images"] == 6
    (note,) = content["notes"]
    assert "only 6 images of one kind" in note
    assert not {pair["image"] for pair in content["runs"][0]["copies"]["closest"]} & set(held_out)
    code = call(evaluate, "--checkpoint", checkpoint("b.pt", data="data", held_out=["elsewhere.png"]), *FEW)
    assert code.startswith("error: none of the 1 images")


def test_what_cannot_be_measured_is_noted():
    write_folder("data", critters(40, 0))
    assert call(evaluate, "--checkpoint", checkpoint("a.pt", data="data"), *FEW, "--num_samples", 3) == 0
    content = report()
    assert not {"precision", "wasserstein", "copies", "bits_held_out"} & content["runs"][0]["figures"].keys()
    notes = " ".join(content["notes"])
    assert all(words in notes for words in ("No images were held out", "Distances were not measured: at least 50",
                                            "Copies were not searched for: at least 50"))
    assert all(note.replace("'", "&#x27;") in Path("report/report.html").read_text() for note in content["notes"])


def test_samples_are_drawn_as_the_sample_grids_were_and_another_sampler_has_its_own_steps():
    write_folder("data", critters(4, 0))
    flags = ["--checkpoint", checkpoint("a.pt", data="data"), "--num_samples", 1, "--num_likelihood", 0]
    for more, expected in ([], ("ddim", 2)), (["--sampler", "sde-dpm++"], ("sde-dpm++", 50)):
        assert call(evaluate, *flags, *more, "--device", "cpu", "--output", "report") == 0
        sampling = report()["runs"][0]["sampling"]
        assert (sampling["sampler"], sampling["steps"]) == expected


def test_guidance_that_a_model_cannot_follow_is_refused_before_any_work(monkeypatch):
    without_types = checkpoint("a.pt")
    never_without_labels = checkpoint("b.pt", names=TYPES, label_dropout=0.0)
    monkeypatch.setattr(evaluate, "load_data", None)  # calling it would be a TypeError
    for path, words in ((without_types, "knows none"), (never_without_labels, "--label_dropout 0")):
        code = call(evaluate, "--checkpoint", path, *FEW, "--guidance", 3)
        assert code.startswith("error: ") and words in code and "--guidance" in code and "\n" not in code


def test_guidance_is_refused_where_the_data_have_no_types():
    write_folder("data", critters(4, 0))
    code = call(evaluate, "--checkpoint", checkpoint("a.pt", names=TYPES, data="data"), *FEW, "--guidance", 3)
    assert code.startswith("error: --guidance strengthens types") and "leave --guidance out" in code


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
        (["--checkpoint", "b.pt", "c.pt", "--samples", "some"], "one --checkpoint or none"),
        (["--samples", "some", "--data", "some", "--guidance", 3], "--guidance has no effect here, since --samples"),
        (["--samples", "some", "--data", "some", "--labels", "none"], "--labels has no effect here"),
        (["--checkpoint", "b.pt", "--image_size", 32], "--image_size has no effect here, since a checkpoint"),
        (["--checkpoint", "b.pt", "--num_samples", 0], "--num_samples must be at least 1"),
    ):
        code = call(evaluate, *flags)
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code and words in code, code


def test_fid_is_computed_by_torch_fidelity_where_it_is_installed(monkeypatch):
    write_folder("data", critters(110, 0))
    write_folder("samples", critters(55, 1))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    code = call(evaluate, "--samples", "samples", "--data", "data", "--fid")
    assert code.startswith("error: --fid needs torch-fidelity") and "pip install" in code

    def calculate_metrics(input1, input2, **options):
        assert input1[0].dtype == torch.uint8 and input1[0].shape == (3, 16, 16) and len(input1) == len(input2)
        return dict(frechet_inception_distance=12.5, kernel_inception_distance_mean=0.01)

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    assert call(evaluate, "--samples", "samples", "--data", "data", "--fid", "--output", "report") == 0
    assert figures()["fid"] == {"value": 12.5, "real": {"value": 12.5}}

    def no_network(**_):
        raise OSError("the network cannot be downloaded")

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=no_network))
    assert call(evaluate, "--samples", "samples", "--data", "data", "--fid", "--output", "report") == 0
    assert "fid" not in figures() and "recall" in figures()
    assert "FID and KID were not measured: torch-fidelity failed (the network" in str(report()["runs"][-1]["notes"])
