"""Exported models compute what ours does: ONNX, diffusers and safetensors, each with its own packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import assert_one_line, call, call_in, same
from tiny_model import save_tiny_model

import export
import generate
from models.export.onnx import halve_weights
from models.pipeline import Pipeline
from reverse_diffusion import sample
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_safetensors
from utils.files import MANIFEST
from utils.images import to_uint8

TYPES = ("fire", "ice", "dark")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    save_tiny_model(folder / "typed.pt", TYPES)
    save_tiny_model(folder / "latent.pt", TYPES, prediction="eps", schedule="linear", latent=True, multipliers=(1,))
    return folder


def inputs(pipeline: Pipeline, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noise, timesteps and labels."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *pipeline.space.shape(pipeline.image_size), generator=generator)
    t = torch.randint(pipeline.scheduler.num_timesteps, (batch,), generator=generator)
    return x, t, torch.eye(len(TYPES))[torch.arange(batch) % 3] * (t % 2)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def session(content: bytes | Path):
    import onnxruntime

    return onnxruntime.InferenceSession(content if isinstance(content, bytes) else str(content),
                                        providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def onnx_file(folder) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    call_in(folder, export, "--checkpoint", "typed.pt", "--to", "onnx", "--output", "typed.onnx")
    return folder / "typed.onnx"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_onnx_file_predicts_what_the_network_does(folder, onnx_file, batch):
    pipeline = Pipeline.load(folder / "typed.pt")
    x, t, labels = inputs(pipeline, batch)
    (theirs,) = session(onnx_file).run(["prediction"], dict(x=x.numpy(), t=t.float().numpy(), labels=labels.numpy()))
    with torch.no_grad():
        assert abs(theirs - pipeline.net(x, t, labels).numpy()).max() < 1e-4


def test_weights_as_float16_change_pictures_by_less_than_one_can_see(folder, onnx_file):
    import onnx

    graph = onnx.load(onnx_file)
    halve_weights(graph)
    half = graph.SerializeToString()
    assert len(half) < 0.8 * onnx_file.stat().st_size  # of so small a network much is not weights
    pipeline, runtime = Pipeline.load(folder / "typed.pt"), session(half)

    def network(x, t, labels):
        feeds = dict(x=x.numpy(), t=t.float().numpy(), labels=labels.numpy())
        return torch.from_numpy(runtime.run(None, feeds)[0])

    x, t, labels = inputs(pipeline, 8)
    with torch.no_grad():
        ours = pipeline.net(x, t, labels)
    assert 0 < (network(x, t, labels) - ours).abs().max() < 0.01 * ours.std()
    settings = dict(sampler="dpm++", steps=20, prediction=pipeline.prediction, labels=labels)
    pictures = [to_uint8(sample(model, pipeline.scheduler, x, **settings)).float() for model in (network, pipeline.net)]
    assert (pictures[0] - pictures[1]).abs().mean() < 2


def test_an_onnx_file_describes_itself_and_not_the_machine(folder, onnx_file):
    import onnx

    graph = onnx.load(onnx_file)
    (described,) = [json.loads(entry.value) for entry in graph.metadata_props if entry.key == "pokediff"]
    assert described["types"] == list(TYPES) and described["prediction"] == "v" and described["output"] == "prediction"
    assert str(Path(__file__).parents[1]).encode() not in onnx_file.read_bytes()
    assert not list(folder.glob(".*"))


def test_the_page_of_a_latent_model_has_all_three_networks(folder, onnx_file, tmp_path, monkeypatch):
    """Also: x_0 of a model that predicts eps."""
    monkeypatch.setattr("models.export.web.read_runtime", lambda source: {})
    call_in(tmp_path, export, "--checkpoint", folder / "latent.pt", "--to", "web", "--output", "page")
    pipeline = Pipeline.load(folder / "latent.pt", precision="fp32")
    model = tmp_path / "page/model"
    described = json.loads((model / "model.json").read_text())
    assert described["latent"] and described["output"] == "x_0"
    assert described["bytes"] == {path.name: path.stat().st_size for path in model.glob("*.onnx")}

    x, t, labels = inputs(pipeline, 5)
    with torch.no_grad():
        x_0 = pipeline.scheduler.to_x_0("eps", pipeline.net(x, t, labels), x, t)
    image = pipeline.decode(x)
    for name, feeds, ours in [("model", dict(x=x, t=t.float(), labels=labels), x_0), ("decoder", dict(x_0=x), image),
                              ("encoder", dict(image=image), pipeline.encode(image))]:
        (theirs,) = session(model / f"{name}.onnx").run(None, {key: part.numpy() for key, part in feeds.items()})
        assert theirs.dtype == np.float32 and abs(theirs - ours.numpy()).max() < 0.01 * ours.std(), name


def test_a_folder_also_holds_the_network_to_guide_away_from(folder, onnx_file, tmp_path, capsys):
    save_tiny_model(tmp_path / "earlier.pt", TYPES, multipliers=(1,))
    flags = ("--checkpoint", folder / "typed.pt", "--guide", tmp_path / "earlier.pt", "--to", "onnx", "--output")
    call_in(tmp_path, export, *flags, "both")
    assert "leaves out" not in capsys.readouterr().out
    pipeline = Pipeline.load(tmp_path / "earlier.pt", precision="fp32")
    x, t, labels = inputs(pipeline, 3)
    with torch.no_grad():
        ours = pipeline.net(x, t, labels).numpy()
    feeds = dict(x=x.numpy(), t=t.float().numpy(), labels=labels.numpy())
    assert abs(session(tmp_path / "both/earlier.onnx").run(None, feeds)[0] - ours).max() < 1e-4
    described = json.loads((tmp_path / "both/model.json").read_text())
    assert described["guide"] == "earlier" and "earlier.onnx" in described["sha256"]


def test_one_onnx_file_leaves_the_network_to_guide_away_from_out_and_says_so(folder, onnx_file, tmp_path, capsys):
    content = load_checkpoint(folder / "typed.pt")
    save_checkpoint(tmp_path / "both.pt", **content, earlier=content["ema"])
    call_in(tmp_path, export, "--checkpoint", "both.pt", "--to", "onnx", "--output", "one.onnx")
    assert "one .onnx file leaves out the earlier network" in capsys.readouterr().out
    import onnx

    (described,) = [json.loads(entry.value) for entry in onnx.load(tmp_path / "one.onnx").metadata_props]
    assert described["guide"] == "types"


def test_a_runtime_that_disagrees_is_noticed(folder, onnx_file, monkeypatch):
    import onnx

    from models.export import onnx as exporter

    graph, pipeline = onnx.load(onnx_file), Pipeline.load(folder / "typed.pt")
    x, t, labels = inputs(pipeline, 2)
    denoiser = exporter.Denoiser(pipeline.net, pipeline, "prediction").eval()
    arguments = denoiser, dict(x=x, t=t.float(), labels=labels), 1e-3
    exporter._check(graph, *arguments)
    with torch.no_grad():
        pipeline.net.conv_out.bias.add_(0.1)
    with pytest.raises(Exception, match="onnxruntime computes something else"):
        exporter._check(graph, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


IN_ANOTHER_PYTHON = """
import json, re, socket, sys, types, warnings

def no_network(*_):
    raise OSError("network")

socket.socket.connect = no_network
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm

assert "unet" not in sys.modules and not any(path.endswith(sys.argv[2]) for path in sys.path)
given, pipeline = torch.load("given.pt"), DDPMPipeline.from_pretrained("exported")
typed = UNet2DModel.from_pretrained("exported", subfolder="typed_unet")
config, out = pipeline.scheduler.config, {}
with torch.no_grad():
    out["any"] = pipeline.unet(given["x"], given["t"]).sample
    out["sets"] = typed(given["x"], given["t"], torch.arange(len(given["x"]))).sample

    def draw(scheduler, noises=None, **options):
        x = given["x"][:2]
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            if noises is not None:
                options["variance_noise"] = next(noises)
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, **options).prev_sample
        return x

    out["dpm++"] = draw(DPMSolverMultistepScheduler.from_config(config, thresholding=True))
    out["ddim"] = draw(DDIMScheduler.from_config(config), use_clipped_model_output=True)
    out["sde-dpm++"] = draw(DPMSolverMultistepScheduler.from_config(
        config, thresholding=True, algorithm_type="sde-dpmsolver++"), iter(given["noises"]))
    noises = iter(given["noises"])
    scheduling_ddpm.randn_tensor = lambda *_, **__: next(noises)
    out["ddpm"] = draw(pipeline.scheduler)
torch.save(out, "out.pt")

for code in re.findall("```python\\n(.*?)```", open("exported/README.md").read(), re.DOTALL):
    exec(code.replace('"."', '"exported"'), {})
"""


@pytest.fixture(scope="module")
def diffusers_folder(folder) -> Path:
    pytest.importorskip("diffusers")
    report = dict(summary="9 samples.", runs=[dict(name="typed.pt", figures={"copies": dict(value=0.015)}, verdict=[])])
    (folder / "report.json").write_text(json.dumps(report))
    call_in(folder, export, "--checkpoint", "typed.pt", "--to", "diffusers", "--output", "exported", "--num_images", 2,
            "--credit", "drawn by Ada")
    return folder


def test_diffusers_draws_what_we_draw_and_knows_nothing_of_us(diffusers_folder):
    pipeline = Pipeline.load(diffusers_folder / "typed.pt")
    x, t, _ = inputs(pipeline, 7)
    noises = torch.randn(20, 2, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    torch.save(dict(x=x, t=t, noises=noises), diffusers_folder / "given.pt")
    root = Path(__file__).parents[1].name
    subprocess.run([sys.executable, "-I", "-c", IN_ANOTHER_PYTHON, "-", root], cwd=diffusers_folder, check=True)
    theirs = torch.load(diffusers_folder / "out.pt")

    # Outputs: any type, each type, each pair.
    sets = json.loads((diffusers_folder / "exported/types.json").read_text())
    assert sets == [[], *[[name] for name in TYPES], ["fire", "ice"], ["fire", "dark"], ["ice", "dark"]]
    with torch.no_grad():
        assert (theirs["any"] - pipeline.net(x, t)).abs().max() < 1e-4
        assert (theirs["sets"] - pipeline.net(x, t, pipeline.class_labels(sets))).abs().max() < 1e-4

    # Pictures, from the same noise and, where the sampler adds some, with the same noise added.
    for sampler in ("dpm++", "ddim", "sde-dpm++", "ddpm"):
        ours = sample(pipeline.net, pipeline.scheduler, x[:2], sampler=sampler, steps=20, prediction="v",
                      draw_noise=iter(noises).__next__)
        assert (theirs[sampler] - ours).abs().max() < 1e-3, sampler
    assert (diffusers_folder / "creature.png").is_file() and (diffusers_folder / "typed.png").is_file()


def test_the_card_has_a_head_the_figures_and_the_owners(diffusers_folder):
    yaml = pytest.importorskip("yaml")
    text = (diffusers_folder / "exported/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["library_name"]) == ("mit", "diffusers")
    assert head["pipeline_tag"] == "unconditional-image-generation" and "diffusion" in head["tags"]
    assert "9 samples." in body and "| copies | 1.5 % |  | lower |" in body and "drawn by Ada" in body
    assert "python train.py --data critters" in body
    files = list((diffusers_folder / "exported").rglob("*"))
    assert {path.name for path in files if path.parent.name == "exported"} == {
        "README.md", "model_index.json", "unet", "scheduler", "typed_unet", "types.json", "samples.png", MANIFEST}
    assert len({path.stat().st_mode for path in files if path.is_file()}) == 1


def test_a_library_that_computes_something_else_is_noticed(diffusers_folder, monkeypatch, capsys):
    from models.export import diffusers as exporter

    monkeypatch.setattr(exporter, "IN_A_BLOCK", exporter.IN_A_BLOCK | {"norm_1": "norm2", "norm_2": "norm1"})
    monkeypatch.chdir(diffusers_folder)
    before = sorted(Path("exported").rglob("*"))
    code = call(export, "--checkpoint", "typed.pt", "--to", "diffusers", "--output", "exported", "--report",
                "report.json")
    assert_one_line(code, capsys, "other layers than this network")
    assert sorted(Path("exported").rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


@pytest.fixture(scope="module", params=["typed", "latent"])
def safetensors_file(request, folder) -> Path:
    pytest.importorskip("safetensors")
    call_in(folder, export, "--checkpoint", f"{request.param}.pt", "--to", "safetensors", "--output",
            f"{request.param}.safetensors")
    return folder / f"{request.param}.safetensors"


def lists(value):
    """Return nested dicts with a list for each tuple."""
    if isinstance(value, dict):
        return {key: lists(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def test_a_safetensors_file_is_a_checkpoint(safetensors_file):
    assert same(load_checkpoint(safetensors_file), lists(load_checkpoint(safetensors_file.with_suffix(".pt"))))
    pipelines = [Pipeline.load(safetensors_file.with_suffix(suffix)) for suffix in (".pt", ".safetensors")]
    pictures = [pipeline.sample([3], steps=2) for pipeline in pipelines]
    assert torch.equal(*pictures) and pipelines[0].default_sampler == pipelines[1].default_sampler


def test_generate_reads_it(folder, own_folder, safetensors_file):
    assert call(generate, "--checkpoint", safetensors_file, "--num_images", 1, "--steps", 1, "--device", "cpu") == 0
    assert Path("outputs/generated.png").is_file()


@pytest.mark.parametrize("content", [dict(ema={"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}),  # one name for two
                                     dict(config={1: "a"})])
def test_content_that_a_safetensors_file_cannot_give_back_is_noticed(tmp_path, content):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match="a.safetensors"):
        save_safetensors(path, **content)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_tensors_of_any_kind_come_back_to_the_bit(tmp_path):
    pytest.importorskip("safetensors")
    ema = dict(nan=torch.tensor([float("nan"), -0.0]), scalar=torch.tensor(3), half=torch.ones(2, 3).half().T,
               brain=torch.ones(2, dtype=torch.bfloat16), none=torch.zeros(0, 3), truth=torch.tensor([True, False]))
    save_safetensors(tmp_path / "a.safetensors", ema=ema, config=dict(sizes=(1, (2, 3)), name="née 火"))
    back = load_checkpoint(tmp_path / "a.safetensors")
    assert back["config"] == dict(sizes=[1, [2, 3]], name="née 火")
    assert all(back["ema"][name].dtype == part.dtype and torch.allclose(back["ema"][name], part, equal_nan=True)
               for name, part in ema.items())


def test_the_suffix_may_be_in_capitals(folder, own_folder):
    pytest.importorskip("safetensors")
    assert call(export, "--checkpoint", folder / "typed.pt", "--to", "safetensors", "--output", "A.SAFETENSORS") == 0
    assert call(generate, "--checkpoint", "A.SAFETENSORS", "--num_images", 1, "--steps", 1, "--device", "cpu") == 0


def test_a_file_that_cannot_be_written_is_named_once(folder, own_folder, capsys):
    pytest.importorskip("safetensors")
    Path("file").write_text("mine")
    code = call(export, "--checkpoint", folder / "typed.pt", "--to", "safetensors", "--output", "file/a.safetensors")
    assert_one_line(code, capsys, "could not write file/a.safetensors (")
    assert code.count("a.safetensors") == code.count("could not") == 1 and Path("file").read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncated", "empty", "no metadata", "other metadata", "nested metadata"])
def test_a_damaged_safetensors_file_is_refused(folder, tmp_path, damage):
    package = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    metadata = {"no metadata": None, "other metadata": {"pokediff": "[1]"},
                "nested metadata": {"pokediff": "[" * 100_000}}.get(damage)
    content = package.save(dict(a=torch.ones(3)), metadata)
    path.write_bytes({"truncated": content[:-1], "empty": b""}.get(damage, content))
    with pytest.raises(CheckpointError, match="a.safetensors") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)
