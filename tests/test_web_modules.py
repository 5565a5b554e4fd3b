"""The page's JavaScript without a browser: sampler, seeded noise, links and PNG files, run by node."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gaussian
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT

from forward_diffusion import NoiseScheduler
from reverse_diffusion import SAMPLERS, sample, slerp
from utils.images import read_settings

WEB = ROOT / "web"
MODEL = dict(types=["fire", "water", "flying"], max_types=2, guidance=3.0, timesteps=1000, name="test",
             sampler=dict(name="sde-dpm++", steps=20), sha256={"model.onnx": "0123456789abcdef"})


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str, Any], Any]]:
    """Return a function that calls a task of web_modules.mjs with an argument; one node serves all tests."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    with subprocess.Popen(["node", Path(__file__).with_name("web_modules.mjs")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, encoding="utf-8") as node:
        def ask(task: str, argument: Any) -> Any:
            node.stdin.write(json.dumps([task, argument]) + "\n")
            node.stdin.flush()
            line = node.stdout.readline()
            assert line, f"node ended in {task}"
            return json.loads(line)

        yield ask
        node.stdin.close()


def alpha_bar(scheduler: NoiseScheduler) -> list[float]:
    return [scheduler.alpha_bar(t) for t in range(scheduler.num_timesteps)]


# ---------------------------------------------------------------------------------------------------------------------
# sampler


CASES = [dict(schedule="cosine", steps=20), dict(schedule="linear", steps=20), dict(schedule="linear", steps=1),
         dict(schedule="cosine", steps=20, guidance=3.0), dict(schedule="cosine", steps=7, clip=0.5),
         dict(schedule="cosine", steps=12, start=599), dict(schedule="linear", steps=20, zero_terminal_snr=True),
         dict(schedule="linear", steps=3, start=2),
         *(dict(sampler="consistency", schedule="cosine", steps=steps) for steps in (1, 2, 4, 9)),
         dict(sampler="consistency", schedule="linear", steps=2, start=599, guidance=3.0),
         dict(schedule="cosine", steps=20, guidance=2.0, worse=1.5), dict(schedule="linear", steps=5, worse=1.5),
         dict(schedule="cosine", steps=20, guidance=2.0, worse=1.5, typed=False)]


def test_the_sampler_follows_that_of_python(run):
    """On Gaussian pixels, whose optimal network is known, from the same noise: every x_t and x_0 agrees."""
    inputs, expected = [], []
    for case in CASES:
        scheduler = NoiseScheduler(schedule=case["schedule"], zero_terminal_snr=case.get("zero_terminal_snr", False))
        guidance, clip, start = case.get("guidance", 1.0), case.get("clip", True), case.get("start")
        x_T = gaussian.start(1)
        noises = torch.randn(case["steps"], 1, 1, 2, 2, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(2))
        labels = torch.ones(1, 1) if guidance != 1 and case.get("typed", True) else None
        worse_std = case["worse"] * gaussian.STD if "worse" in case else None  # of an earlier network
        worse = None if worse_std is None else gaussian.exact(scheduler, "x0", std=worse_std)
        draw, path = iter(noises), []
        sampler = case.get("sampler", "sde-dpm++")
        sample(gaussian.exact(scheduler, "x0"), scheduler, x_T, sampler=sampler, steps=case["steps"],
               prediction="x0", labels=labels, guidance=guidance, worse=worse, start=start, clip=clip,
               draw_noise=lambda draw=draw: next(draw),
               callback=lambda i, x_t, x_0, path=path: path.append([x_t.flatten().tolist(), x_0.flatten().tolist()]))
        expected.append(path)
        inputs.append(dict(alphaBar=alpha_bar(scheduler), mean=gaussian.MEAN.flatten().tolist(),
                           std=gaussian.STD.flatten().tolist(), x=x_T.flatten().tolist(),
                           worseStd=None if worse_std is None else worse_std.flatten().tolist(),
                           noises=noises.flatten(1).tolist(), labels=None if labels is None else [1.0],
                           guidance=guidance, sampler=sampler, steps=case["steps"], clip=float(clip),
                           **({} if start is None else dict(start=start))))
    for case, steps, path in zip(CASES, run("trajectory", inputs), expected):
        ours = [[step["x_t"], step["x_0"]] for step in steps]
        assert np.abs(np.array(ours) - np.array(path)).max() < 1e-5, case
        assert steps[-1]["t"] == -1 and steps[-1]["x_t"] == steps[-1]["x_0"]


def test_timesteps_starts_and_noise_are_those_of_python(run):
    pairs = [(T, steps) for T in (2, 7, 50, 600, 1000) for steps in (1, 2, 3, 8, 20, 50, 400) if steps <= T]
    for sampler in ("sde-dpm++", "consistency"):
        spaced = [SAMPLERS[sampler].timesteps(T, steps) for T, steps in pairs]
        assert run("timesteps", dict(sampler=sampler, pairs=pairs)) == spaced

    inputs = [dict(strength=strength, steps=steps, T=1000) for strength in (0.0005, 0.05, 0.125, 0.5, 0.6, 1)
              for steps in (1, 3, 20, 100)]
    for given, found in zip(inputs, run("starts", inputs)):  # as generate.py --init_image has it
        start = max(0, round(given["strength"] * 1000) - 1)
        assert found["start"] == start
        assert found["steps"] == min(start + 1, max(1, round(given["strength"] * given["steps"])))

    scheduler, generator = NoiseScheduler(schedule="cosine"), torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 4, 4, generator=generator)
    weights = [0, 0.25, 0.5, 1]
    ours = run("slerp", dict(a=a.flatten().tolist(), b=b.flatten().tolist(), weights=weights))
    assert np.allclose(ours, [slerp(a, b, weight).flatten().tolist() for weight in weights], atol=1e-6)
    noisy = run("addNoise", dict(alphaBar=alpha_bar(scheduler), x=a.flatten().tolist(), noise=b.flatten().tolist(),
                                 t=300))
    assert np.allclose(noisy, scheduler.add_noise(a[None], torch.tensor([300]), b[None]).flatten(), atol=1e-6)


def test_the_jumps_fall_from_the_last_timestep_for_any_number(run):
    pairs = [(T, steps) for T in (1, 2, 7, 50, 600, 1000) for steps in (1, 2, 3, 4, 5, 7, 8, 50, 999) if steps <= T]
    for (T, steps), found in zip(pairs, run("timesteps", dict(sampler="consistency", pairs=pairs))):
        assert len(found) == steps and found[0] == T - 1 and found[-1] >= 0, (T, steps)
        assert all(t > s for t, s in zip(found, found[1:])), (T, steps)
    assert run("timesteps", dict(sampler="consistency", pairs=[(1000, 8), (600, 4)])) == [
        [999, 875, 750, 590, 430, 315, 200, 100], [599, 450, 258, 120]]


def test_a_tuned_model_is_drawn_by_its_own_sampler_alone(run):
    """And no other model by that, whatever its sampler is called."""
    tuned = MODEL | dict(sampler=dict(name="consistency", steps=4), samplers=["consistency"])
    models = [tuned, tuned | dict(sampler=dict(name="ddim", steps=50)), MODEL | dict(sampler=tuned["sampler"]), MODEL,
              tuned | dict(samplers=["new", "consistency"]), MODEL | dict(samplers=["new"]), tuned | dict(timesteps=3)]
    assert run("samplers", models) == [["consistency", 4, 8], ["consistency", 2, 8], ["sde-dpm++", 20, 100],
                                       ["sde-dpm++", 20, 100], ["consistency", 4, 8], ["sde-dpm++", 20, 100],
                                       ["consistency", 3, 3]]
    (link,) = run("links", dict(model=tuned, hashes=["#steps=20"]))
    assert link["settings"]["steps"] == 8 and "not between 1 and 8" in link["notes"][0]


# ---------------------------------------------------------------------------------------------------------------------
# noise


def test_the_noise_is_standard_normal(run):
    x = np.array(run("normals", dict(seed=1, stream="x_T", count=200_000)))
    moments = [x.mean(), x.var(), (x**3).mean(), (x**4).mean()]
    tolerances = [5 * math.sqrt(variance / len(x)) for variance in (1, 2, 15, 96)]  # five standard errors
    assert np.all(np.abs(np.array(moments) - [0, 1, 0, 3]) < tolerances)
    inside = [np.mean(np.abs(x) < z) for z in (0.1, 1, 2, 3)]
    assert np.allclose(inside, [math.erf(z / math.sqrt(2)) for z in (0.1, 1, 2, 3)], atol=0.006)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.012


def test_a_seed_is_noise_of_its_own(run):
    """Neighbouring seeds, and the streams of one seed, have nothing in common."""
    parts = [run("noise", dict(seed=seed, size=3072)) for seed in (0, 1, 2**32 - 1)]
    flat = np.array(parts).reshape(9, 3072)
    assert np.abs(np.corrcoef(flat) - np.eye(9)).max() < 5 / math.sqrt(3072)


def test_links_keep_their_creatures(run):
    """These numbers are fixed for good: with others, every link that people have would show another creature."""
    expected = [-0.47943108039368837, -0.3152760860549359, -0.9060366467726055, 0.2323642248099491]
    assert run("normals", dict(seed=7, stream="x_T", count=4)) == expected


def test_the_logarithm(run):
    values = [10.0**k for k in range(-300, 300, 7)] + [1 + d for d in (-0.3, -1e-9, 0, 1e-9, 0.4, 0.42)]
    assert np.allclose(run("ln", values), np.log(values), rtol=1e-15, atol=0)


def test_the_ends_between_two_seeds_are_those_of_the_seeds(run):
    """In the noise of the steps, too, so that they are the same creatures to the bit."""
    between = [run("between", {"from": 3, "to": 8, "weight": weight, "size": 48}) for weight in (0, 0.5, 1)]
    assert between[0] == run("noise", dict(seed=3, size=48))
    assert between[2] == run("noise", dict(seed=8, size=48))
    assert abs(np.std(between[1]) - 1) < 0.3 and between[1] not in (between[0], between[2])


# ---------------------------------------------------------------------------------------------------------------------
# links


def test_links(run):
    everything = ("mode=drawing&types=fire+flying&seed=4294967295&n=16&guidance=2.5&steps=100&strength=0.35"
                  "&drawing=ab_c-d&model=01234567")
    hashes = ["#" + everything, "", "#seed=-5&n=500&steps=0&guidance=1e9&strength=7", "#seed=abc&n=&steps=NaN",
              "#types=fire+dragon+water+flying+fire&seed=1.7", "#mode=paint", "#model=ffffffff", "#%E0%A4%A&seed=3",
              "#mode=morph&seed=1&to=2&frames=99", "#guidance=Infinity&steps=1e3", "#types=" + "x" * 10_000,
              "#types=__proto__&n=0x10"]
    (full, first, beyond, words, types, mode, model, damaged, morph, infinite, long, odd) = run(
        "links", dict(model=MODEL, hashes=hashes))

    assert full["notes"] == []
    assert full["settings"] == dict(mode="drawing", types=["fire", "flying"], seed=2**32 - 1, to=1, count=16, frames=8,
                                    guidance=2.5, steps=100, strength=0.35, drawing="ab_c-d")
    for link in (full, first, beyond, words, types, mode, model, damaged, morph, infinite, long, odd):
        assert link["again"] == dict(link=link["link"], notes=[])  # a link is read as it was written
    assert first["settings"] == run("defaults", MODEL) and first["notes"] == []
    settings = beyond["settings"]
    assert [settings[name] for name in ("seed", "count", "steps", "guidance", "strength")] == [0, 16, 1, 10, 1]
    assert len(beyond["notes"]) == 5 and "500" in beyond["notes"][1] and "16" in beyond["notes"][1]
    assert len(words["notes"]) == 3 and "“abc”" in words["notes"][0]
    assert types["settings"]["types"] == ["fire", "water"] and types["settings"]["seed"] == 2
    assert len(types["notes"]) == 2 and "dragon" in types["notes"][0] and "first 2" in types["notes"][1]
    assert mode["settings"]["mode"] == "noise" and "paint" in mode["notes"][0]
    assert "another model" in model["notes"][0]
    assert damaged["settings"]["seed"] == 3
    assert morph["settings"]["frames"] == 16 and morph["settings"]["to"] == 2
    assert infinite["settings"]["guidance"] == 10 and infinite["settings"]["steps"] == 100
    assert len(long["notes"][0]) < 200
    assert odd["settings"]["types"] == [] and odd["settings"]["count"] == 16


def test_models_without_types_or_with_another_sampler(run):
    plain = MODEL | dict(types=[], max_types=0, guidance=1.0, sampler=dict(name="ddpm", steps=1000))
    settings = run("defaults", plain)
    assert settings["guidance"] == 1 and settings["steps"] == 20  # not 1000 steps of a sampler that is not here
    (link,) = run("links", dict(model=plain, hashes=["#types=fire&guidance=3"]))
    assert link["settings"]["types"] == [] and "fire" in link["notes"][0]
    assert run("defaults", MODEL | dict(sampler=dict(name="toString", steps=3)))["steps"] == 20


def test_guidance_away_from_an_earlier_network_needs_no_types(run):
    for types in ([], MODEL["types"]):
        model = MODEL | dict(types=types, max_types=min(2, len(types)), guide="earlier")
        default, chosen = run("links", dict(model=model, hashes=["", "#guidance=2"]))
        assert (default["settings"]["guidance"], chosen["settings"]["guidance"]) == (3, 2)
        assert "guidance=2" in chosen["link"] and not chosen["notes"]
    (by_types,) = run("links", dict(model=MODEL | dict(guide="types"), hashes=["#guidance=2"]))
    assert "guidance" not in by_types["link"]


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_a_saved_picture_and_its_settings(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    texts = dict(PokeDiff=json.dumps(dict(types=["fire flying"], name="née 火"), ensure_ascii=False))
    png = base64.b64decode(run("png", dict(width=7, height=5, rgba=pixels.flatten().tolist(), texts=texts)))
    (tmp_path / "creature.png").write_bytes(png)
    with Image.open(io.BytesIO(png)) as image:
        image.verify()  # checksums
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels[..., :3])
    assert read_settings(tmp_path / "creature.png") == dict(types=["fire flying"], name="née 火")


def test_a_drawing_in_a_link(run):
    drawing = np.full((32, 32, 3), 255, np.uint8)
    drawing[8:20, 10:24] = (58, 116, 228)
    packed = run("packed", drawing.flatten().tolist())
    assert packed["again"] == drawing.flatten().tolist()
    assert re.fullmatch(r"[\w-]+", packed["text"]) and len(packed["text"]) < 300

    text = packed["text"]
    damaged = [[text[:40], 3072], ["", 3072], ["!", 3072], [text, 3073], [text, 3071], ["A" * 99, 3]]
    errors = run("unpackErrors", damaged)
    assert all(errors), errors
    bomb = run("bomb", dict(megabytes=50, size=3072))  # a short text that would fill the memory
    assert bomb["length"] < 100_000 and "more than 3072 bytes" in bomb["error"]


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def test_the_page_is_small_and_fetches_nothing_from_elsewhere():
    files = [path for path in WEB.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400 and max(map(len, text.splitlines())) <= 120, path.name
        addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
        assert addresses <= {"http://localhost:8000", "http://www.w3.org/2000/svg"}, (path.name, addresses)
        wanted = re.findall(r"(?:from|import) \"\./([\w.]+)\"|(?:src|href)=\"([\w.]+)\"", text)
        assert all((WEB / (a or b)).is_file() for a, b in wanted), path.name
        if path.suffix == ".js":
            assert not re.search(r"\b(eval|innerHTML|document\.write)\b", text), path.name
