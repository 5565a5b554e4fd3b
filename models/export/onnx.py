"""ONNX: a network, or an autoencoder's half, as one file for any runtime.

    write_file(pipeline, "critters", Path("critters.onnx"))

The batch is free, everything else fixed. Weights may be stored as float16; they are cast in the graph, and all
arithmetic is in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.export.description import describe
from models.pipeline import Pipeline
from utils.errors import UserError, first_line
from utils.files import replacing, replacing_folder
from utils.packages import optional_package

LARGEST_FILE = 2**31 - 1  # bytes: a limit of the format
REQUIREMENTS = "requirements-export.txt"
# Largest difference from PyTorch, in units of the output's largest value (at least 1), that a file may have.
TOLERANCE = {"float32": 1e-3, "float16": 0.1}


class Denoiser(nn.Module):
    """The network with its timestep as a number: (x, t[, labels]) -> x_0, or what the network predicts.

    Shapes:
        x: [B, C, H, W]; t: float32 [B], whole numbers 0 ... T-1; labels: float32 [B, K], multi-hot, for a model with
        types; a row of zeros is any type.
    """

    def __init__(self, net: nn.Module, pipeline: Pipeline, output: str):
        super().__init__()
        if output not in ("x_0", "prediction"):
            raise ValueError(f"unknown output {output!r}: choose x_0 or prediction")
        self.net, self.scheduler, self.prediction = net, pipeline.scheduler, pipeline.prediction
        self.output = output
        # Fills the scheduler's copies of its tables, which an export would otherwise fill with tensors of its own.
        self.scheduler.to_eps(torch.zeros(1), torch.zeros(1), 0)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        prediction = self.net(x, t) if labels is None else self.net(x, t, labels)
        if self.output == "prediction":
            return prediction
        return self.scheduler.to_x_0(self.prediction, prediction, x, t.long())


class Encoder(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] to normalised latents, the posterior's mean."""

    def __init__(self, pipeline: Pipeline):
        super().__init__()
        self.autoencoder = pipeline.space.autoencoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.encode(image)


class Decoder(nn.Module):
    """Normalised latents to images [B, 3, S, S] in [-1, 1]."""

    def __init__(self, pipeline: Pipeline):
        super().__init__()
        self.autoencoder = pipeline.space.autoencoder

    def forward(self, x_0: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(x_0)


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_file(pipeline: Pipeline, name: str, path: Path, half: bool = False) -> None:
    """Write a model of pixels as one file, with its description as JSON in the metadata, at "pokediff".

    Raises:
        UserError: for a model that ONNX cannot hold in one file, and for a missing package.
        OSError: if the file cannot be written.
    """
    if pipeline.space.is_latent:
        raise UserError(f"a model of latents is three networks, not one file: give --output a folder, not {path}")
    description = describe(pipeline, name, with_earlier=False) | dict(output="prediction")
    with replacing(path, sync=True) as temporary:
        graph = denoiser_graph(pipeline.net, pipeline, "prediction", half)
        graph.metadata_props.add(key="pokediff", value=json.dumps(description, allow_nan=False))
        temporary.write_bytes(graph.SerializeToString())


def write_folder(pipeline: Pipeline, name: str, folder: Path, half: bool = False) -> None:
    """Write a folder as `write_model` fills it, whole or not at all."""
    with replacing_folder(folder) as temporary:
        write_model(pipeline, name, temporary, "prediction", half)


def write_model(pipeline: Pipeline, name: str, folder: Path, output: str, half: bool, max_types: int = 2) -> None:
    """Write model.onnx and model.json into a folder.

    Beside them go earlier.onnx, the network to guide away from, if there is one, and for a model of latents
    encoder.onnx and decoder.onnx.

    Args:
        output: of model.onnx, see `denoiser_graph`.
    """
    graphs = {"model.onnx": denoiser_graph(pipeline.net, pipeline, output, half)}
    if pipeline.earlier is not None:
        graphs["earlier.onnx"] = denoiser_graph(pipeline.earlier, pipeline, output, half)
    if pipeline.space.is_latent:
        graphs |= autoencoder_graphs(pipeline, half)
    description = describe(pipeline, name, max_types) | dict(output=output, bytes={}, sha256={})
    for file_name, graph in graphs.items():
        content = graph.SerializeToString()
        (folder / file_name).write_bytes(content)
        description["bytes"][file_name] = len(content)
        description["sha256"][file_name] = hashlib.sha256(content).hexdigest()
    (folder / "model.json").write_text(json.dumps(description, allow_nan=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# graphs


def require_packages() -> None:
    """Raise UserError for a package that is missing, before minutes of work."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        optional_package(name, "an ONNX file", REQUIREMENTS)


def denoiser_graph(net: nn.Module, pipeline: Pipeline, output: str, half: bool = False) -> Any:
    """Return a network as an `onnx.ModelProto`, with the inputs x, t and, for a model with types, labels.

    Args:
        net: the pipeline's own, or its earlier one.
        output: "x_0", the clean image that the network's output implies, not clipped, or "prediction", that output.
        half: store the weights as float16.

    Raises:
        UserError: for a model that ONNX cannot hold, and for a missing package.
    """
    scheduler = pipeline.scheduler
    if output == "x_0" and pipeline.prediction == "eps" and scheduler.zero_terminal_snr:
        raise UserError("a model that predicts eps with a zero terminal SNR cannot give x_0 at its last timestep; "
                        "--to onnx exports what it predicts")
    inputs = dict(x=torch.randn(2, *pipeline.space.shape(pipeline.image_size)),
                  t=torch.tensor([0.0, scheduler.num_timesteps // 2]))
    if pipeline.class_names:
        inputs["labels"] = torch.eye(2, len(pipeline.class_names))
    return build_graph(Denoiser(net, pipeline, output), inputs, output, half)


def autoencoder_graphs(pipeline: Pipeline, half: bool = False) -> dict[str, Any]:
    """Return the encoder and the decoder of a latent model as `onnx.ModelProto`, by the names of their files."""
    size = pipeline.image_size
    image = torch.rand(2, 3, size, size) * 2 - 1
    x_0 = torch.randn(2, *pipeline.space.shape(size))
    return {"decoder.onnx": build_graph(Decoder(pipeline), dict(x_0=x_0), "image", half),
            "encoder.onnx": build_graph(Encoder(pipeline), dict(image=image), "x_0", half)}


def build_graph(module: nn.Module, inputs: dict[str, torch.Tensor], output: str, half: bool = False) -> Any:
    """Translate a module to ONNX and check the result against PyTorch.

    Args:
        inputs: an example of each, a batch of 2, by name in the order of the module's arguments.
        output: name of the output.

    Raises:
        UserError: if a package is missing, the file would be too large, or onnxruntime disagrees with PyTorch.
    """
    require_packages()
    stored = 2 if half else 4
    if sum(part.numel() for part in module.state_dict().values()) * stored > LARGEST_FILE - 2**20:
        raise UserError("the network is larger than the 2 GB that an ONNX file can hold"
                        + ("" if half else "; --half takes half of the bytes"))
    module = module.eval().requires_grad_(False)
    try:
        with _quiet():
            graph = _translate(module, inputs, output)
    except Exception as error:  # versions of torch and onnxscript that do not go together can raise nearly anything
        raise UserError(f"torch {torch.__version__} cannot translate this network to ONNX ({first_line(error)}); "
                        f"another version may, and --to safetensors can hold it") from error
    _remove_traces(graph)
    if half:
        halve_weights(graph)
    difference = _check(graph, module, inputs, TOLERANCE["float16" if half else "float32"])
    print(f"{type(module).__name__.lower()}: onnxruntime and PyTorch differ by {difference:.1e} at most")
    return graph


def _translate(module: nn.Module, inputs: dict[str, torch.Tensor], output: str) -> Any:
    """Return a module as an `onnx.ModelProto` with a free batch."""
    import onnx

    names: dict[str, Any] = dict(input_names=list(inputs), output_names=[output])
    if torch.__version__ >= (2, 9):
        batch = torch.export.Dim("batch", min=1)
        return torch.onnx.export(module, tuple(inputs.values()), dynamo=True, external_data=False, verbose=False,
                                 dynamic_shapes={name: {0: batch} for name in inputs}, **names).model_proto
    # The exporter of earlier versions: the newer one is there, but fixes the batch with the onnxscript of today.
    file = io.BytesIO()
    torch.onnx.export(module, tuple(inputs.values()), file, dynamo=False, opset_version=18,
                      dynamic_axes={name: {0: "batch"} for name in [*inputs, output]}, **names)
    return onnx.load_from_string(file.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes of the exporter about itself."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what it could not do, it raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _remove_traces(graph: Any) -> None:
    """Remove the exporter's notes, which hold paths of this machine and a third of a small file's bytes."""
    parts = [graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.value_info,
             *graph.graph.initializer, *graph.functions]
    for part in parts:
        for field in ("metadata_props", "doc_string"):
            if hasattr(part, field):
                part.ClearField(field)


def halve_weights(graph: Any) -> None:
    """Store matrices and kernels as float16, cast to float32 where they are used.

    Biases, norms and the schedule's tables stay: they are few, and small errors in them shift whole images.
    """
    import onnx
    from onnx import numpy_helper

    casts = []
    for stored in graph.graph.initializer:
        is_weight = stored.data_type == onnx.TensorProto.FLOAT and sum(size > 1 for size in stored.dims) >= 2
        if not is_weight:
            continue
        weight = numpy_helper.to_array(stored)
        if abs(weight).max() > np.finfo(np.float16).max:
            continue  # it would become infinite
        name = stored.name
        stored.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast",
                                           to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)


def _check(graph: Any, module: nn.Module, inputs: dict[str, torch.Tensor], tolerance: float) -> float:
    """Return the largest difference of onnxruntime's outputs from PyTorch's, for batches of 2 and of 3.

    Raises:
        UserError: if it is beyond the tolerance.
    """
    import onnx
    import onnxruntime

    advice = "another version of torch, onnxscript or onnxruntime may help"
    batches = [{name: part[torch.arange(size) % 2] for name, part in inputs.items()} for size in (2, 3)]
    with torch.no_grad():
        ours = [module(*rows.values()).numpy() for rows in batches]
    try:
        onnx.checker.check_model(graph, full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is also raised
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        theirs = [session.run(None, {name: part.numpy() for name, part in rows.items()})[0] for rows in batches]
        differences = [abs(a - b).max().item() for a, b in zip(ours, theirs)]
    except Exception as error:  # of classes that the packages do not publish
        raise UserError(f"onnxruntime cannot run the exported file ({first_line(error)}); {advice}") from error
    largest = max(1.0, *(abs(part).max().item() for part in ours))
    if not all(difference <= tolerance * largest for difference in differences):
        raise UserError(f"onnxruntime computes something else than PyTorch from the exported file; {advice}")
    return max(differences)
