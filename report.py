"""From figures to something to read: a table, plots over the epochs, and report.html with all pictures inside.

Every figure has an entry in `MEANINGS`, which says in words what it means and which way is better. A figure is a dict
with its "value", the 95 % interval "low" and "high" where there is one, and under "real" the same for real pictures in
the samples' place: what cannot be beaten honestly.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from pictures import grid, to_image

# name: (heading, how to print it, which way is better, what it means)
MEANINGS: dict[str, tuple[str, str, str, str]] = {
    "copies": (
        "copies", "%", "lower",
        "The share of samples that are as close to a training picture, once that is mirrored, turned, shifted and "
        "brightened to fit, as hardly any two different real pictures are. The limit is set so that about 1 % of "
        "honest new pictures are called copies too; clearly more means that the model has learned pictures by heart.",
    ),
    "copies_features": (
        "copies, by features", "%", "lower",
        "The same question about the same pairs, asked by colours and edges at full size instead of pixel by pixel. "
        "It overlooks more copies, but mistakes fewer plain shapes for them.",
    ),
    "precision": (
        "precision", "%", "higher",
        "The share of samples that look like real pictures: that lie among them in a space of colours and edges. "
        "Low: blurred, grainy or misshapen samples.",
    ),
    "recall": (
        "recall", "%", "higher",
        "The share of real pictures that lie among the samples. Low: the model leaves kinds of picture out.",
    ),
    "density": (
        "density", "2", "higher",
        "Like precision, but how firmly samples lie among real pictures; 1 is normal. It is not fooled by a few odd "
        "real pictures.",
    ),
    "coverage": (
        "coverage", "%", "higher",
        "The share of real pictures with a sample close by. Like recall, but not fooled by a few odd samples.",
    ),
    "wasserstein": (
        "patch distance", "3", "lower",
        "How differently small patches of samples and of real pictures are distributed (sliced Wasserstein "
        "distance, mean of all scales). 0 would be the same; the real pictures' own value is the best one can "
        "reach. Clearly below it would mean copies.",
    ),
    "wasserstein_fine": (
        "patch distance, finest detail", "3", "lower",
        "The same for the sharpest details alone: large when samples are blurred or grainy.",
    ),
    "wasserstein_coarse": (
        "patch distance, broad shapes", "3", "lower",
        "The same for the picture seen from far: large when colours or shapes are off.",
    ),
    "bits_train": (
        "bits, training pictures", "3", "lower",
        "How many bits for each colour value the model needs to write down a picture it was trained on (an upper "
        "bound). Fewer: it knows better what to expect.",
    ),
    "bits_held_out": (
        "bits, unseen pictures", "3", "lower",
        "The same for pictures it has never seen. When this rises while training goes on, the model has begun to "
        "learn its pictures by heart.",
    ),
    "bits_gap": (
        "bits, unseen less training", "3", "nearer to 0",
        "How many more bits an unseen picture takes, with allowance for how much detail each picture has. Clearly "
        "above 0: the first sign of memorising.",
    ),
    "black_corner": (
        "black corners", "%", "as the data",
        "The share of samples with a black corner: rotations filled with black have leaked.",
    ),
    "collapsed": (
        "collapsed", "%", "as the data",
        "The share of samples that are nearly black all over: sampling went wrong.",
    ),
    "clean": (
        "clean white background", "%", "as the data",
        "The share of samples with a white border; only for data that has one.",
    ),
    "border": (
        "brightness of the border", "2", "as the data",
        "From 0, black, to 1, white. Off: the background has drifted.",
    ),
    "brightness": (
        "brightness", "2", "as the data",
        "Of the whole picture, from 0 to 1.",
    ),
    "contrast": (
        "contrast", "2", "as the data",
        "Low: washed-out samples. High: garish ones.",
    ),
    "saturation": (
        "saturation", "2", "as the data",
        "How colourful: low means greyish, high garish.",
    ),
    "red_to_blue": (
        "warm or cold", "3", "as the data",
        "Mean red less mean blue. Off: a tint has leaked or colours have drifted.",
    ),
    "tilt": (
        "tilt in degrees", "1", "as the data",
        "How far pictures lean away from their own axis of symmetry. More than in the data: rotations have leaked.",
    ),
    "fid": (
        "FID", "1", "lower",
        "Distance of samples and real pictures in the features of a trained network (Inception).",
    ),
    "kid": (
        "KID", "4", "lower",
        "Like FID, by another distance, and fairer with few pictures.",
    ),
}
# figure, what to say if it is worse than that of real pictures beyond doubt, and what if it is not
COMPARED = (
    ("precision", "Fewer samples look like real pictures than real ones do", ""),
    ("density", "Samples look less like real pictures than real ones do",
     "Samples look as much like real pictures as real ones do"),
    ("recall", "Samples are less varied than real pictures", "Samples are as varied as real pictures"),
    ("coverage", "Some kinds of real picture have no sample near them", ""),
    ("wasserstein_fine", "Their finest details are softer or grainier than those of real pictures",
     "Their finest details are those of real pictures"),
)
OVER_TIME = ("bits_train", "bits_held_out", "copies", "precision", "recall", "coverage", "wasserstein",
             "wasserstein_fine", "saturation")


def number(x: float, style: str) -> str:
    return f"{100 * x:.1f}" if style == "%" else f"{x:.{style}f}"


def shown(figure: dict, style: str) -> tuple[str, str]:
    """A figure and its interval, as "4.1 %" and "3.0 to 5.5"; the latter is empty where there is none."""
    interval = f"{number(figure['low'], style)} to {number(figure['high'], style)}" if "low" in figure else ""
    return number(figure["value"], style) + (" %" if style == "%" else ""), interval


def table(run: dict) -> str:
    """The figures of one run as text, in the order of `MEANINGS`."""
    rows = [("", "samples", "real pictures", "better")]
    for name, (heading, style, better, _) in MEANINGS.items():
        if name in run["figures"]:
            figure = run["figures"][name]
            cells = [shown(of, style) if of else ("", "") for of in (figure, figure.get("real"))]
            rows.append((heading, *(value + f" ({interval})" * bool(interval) for value, interval in cells), better))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def chance(run: dict) -> float:
    """The share of copies to expect of honest samples: the false alarm, or what unseen pictures show beyond doubt."""
    return max(run["copies"]["alarm"], run["figures"]["copies"].get("real", {}).get("low", 0.0))


def verdict(run: dict) -> list[str]:
    """What the figures say, in sentences."""
    figures, lines = run["figures"], []
    if "copies" in figures:
        copies, alarm = figures["copies"], chance(run)
        count, n = round(copies["value"] * run["num_samples"]), run["num_samples"]
        counted = (f"{count:,} of {n:,} samples are called copies of training pictures; about {alarm * n:.0f} would be "
                   f"by mere chance.")
        if copies["low"] > alarm:
            lines.append(f"The model copies: {counted} Look at the pairs below and judge for yourself.")
        elif copies["high"] > 3 * alarm:
            lines.append(f"No copying can be shown: {counted} More samples would tell more.")
        else:
            lines.append(f"The model does not copy: {counted}")
    if "bits_gap" in figures:
        gap = figures["bits_gap"]
        lines.append(f"Unseen pictures cost {gap['value']:.3f} more bits for each colour value than training pictures: "
                     f"the first sign of memorising." if gap["low"] > 0 else
                     "Unseen pictures cost about as many bits as training pictures: no sign of memorising there.")
    for name, bad, good in COMPARED:
        if "real" in figures.get(name, {}):
            figure, real, (heading, style, better, _) = figures[name], figures[name]["real"], MEANINGS[name]
            worse = figure["high"] < real["low"] if better == "higher" else figure["low"] > real["high"]
            if worse or good:
                said = f"{heading} {shown(figure, style)[0]} against {shown(real, style)[0]}"
                lines.append(f"{bad if worse else good} ({said}).")
    looked_at = [name for name, meaning in MEANINGS.items() if meaning[2] == "as the data"
                 and "low" in figures.get(name, {}) and "low" in figures[name]["real"]]  # not so for a single picture
    drifted = [MEANINGS[name][0] for name in looked_at if figures[name]["low"] > figures[name]["real"]["high"]
               or figures[name]["high"] < figures[name]["real"]["low"]]
    if looked_at:
        lines.append(f"What differs from the data at a glance: {', '.join(drifted)}." if drifted else
                     "Nothing differs from the data at a glance: border, brightness, colours and tilt agree.")
    return lines


def epoch_to_keep(runs: Sequence[dict]) -> str:
    """Of several checkpoints, which one: the nearest to the data among those that do not copy beyond chance."""
    known = [run for run in runs if {"wasserstein", "copies"} <= run["figures"].keys()]
    if len(known) < 2:
        return ""
    honest = [run for run in known if run["figures"]["copies"]["low"] <= chance(run)]
    if not honest:
        return ("Every checkpoint copies more than chance explains: train for fewer epochs, augment more, or use more "
                "pictures.")
    best = min(honest, key=lambda run: run["figures"]["wasserstein"]["value"])
    bound = best["figures"]["wasserstein"]["high"]
    as_good = [run for run in honest if run["figures"]["wasserstein"]["value"] <= bound]
    first = min(as_good, key=lambda run: run["epoch"])
    text = (f"Keep epoch {best['epoch']}: of the checkpoints that do not copy beyond chance, its samples are nearest "
            f"to the data.")
    if first is not best:
        text += f" Epoch {first['epoch']} is as near within the error."
    copying = len(known) - len(honest)
    return text + (f" {copying} of {len(known)} copy, and were left out." if copying else "")


# ---------------------------------------------------------------------------------------------------------------------
# plots


def plot_over_time(runs: Sequence[dict], path: Path) -> None:
    """Every figure of OVER_TIME against the epoch, with its interval, and that of real pictures as a dashed line."""
    names = [name for name in OVER_TIME if any(name in run["figures"] for run in runs)]
    figure, axes = _figure(-(-len(names) // 3), 3)
    for axis, name in zip(axes, names):
        points = [(run["epoch"], run["figures"][name]) for run in runs if name in run["figures"]]
        factor = 100 if MEANINGS[name][1] == "%" else 1
        epochs, values = [epoch for epoch, _ in points], [factor * f["value"] for _, f in points]
        axis.plot(epochs, values, marker="o", color="C0")
        if all("low" in f for _, f in points):
            low, high = ([factor * f[end] for _, f in points] for end in ("low", "high"))
            axis.fill_between(epochs, low, high, alpha=0.2)
        if all("real" in f for _, f in points):
            axis.plot(epochs, [factor * f["real"]["value"] for _, f in points], "--", color="grey")
        heading, style, better, _ = MEANINGS[name]
        way = better if better == "as the data" else f"{better} is better"
        axis.set_title(f"{heading}{', %' if style == '%' else ''} ({way})", fontsize=9)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    for axis in axes[len(names):]:
        axis.axis("off")
    _save(figure, path)


def plot_bits(run: dict, path: Path) -> None:
    """The terms of the bound over t: what each timestep costs, for training and for unseen pictures."""
    figure, (axis,) = _figure(1, 1, width=7, height=3.4)
    for name, bits in run["bits"].items():
        middle = [(low + high) / 2 for low, high in bits["ranges"]]
        each = [value / (high - low + 1) for value, (low, high) in zip(bits["steps"], bits["ranges"])]
        axis.loglog(middle, each, marker=".", label={"train": "training pictures", "held_out": "unseen pictures"}[name])
    axis.set_xlabel("timestep t (0 is the least noise)")
    axis.set_ylabel("bits a colour value and timestep")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    _save(figure, path)


def _figure(rows: int, columns: int, width: float = 11, height: float = 2.5):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False)
    return figure, axes.flatten()


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def picture_pairs(samples: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Each sample with a picture on its right, uint8 [N, 3, S, 2 S + 2]."""
    gap = torch.full((*samples.shape[:3], 2), 255, dtype=torch.uint8)
    return torch.cat([samples, gap, pictures], dim=3)


# ---------------------------------------------------------------------------------------------------------------------
# report.html

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .4em .6em; text-align: left; vertical-align: top }
td.n { white-space: nowrap }
td { line-height: 1.35 }
small, figcaption { color: #666; font-size: .85em }
figure { margin: 1em 0 }
img { max-width: 100%; image-rendering: pixelated }
img.plot { image-rendering: auto }
.pairs { display: flex; flex-wrap: wrap; gap: 1em }
.pairs figure { margin: 0; padding: .3em; border: 2px solid #ddd; width: 146px; overflow-wrap: anywhere }
.pairs img { width: 100% }
.pairs .copy { border-color: #c33 }
.said { background: #f4f6f8; padding: .6em 1.2em; border-radius: .5em }
"""
HOW_TO_READ = (
    "Below each figure: between which values it lies with 95 % confidence; where those of two figures overlap, they "
    "can hardly be told apart. Real pictures: what the same measure says of real pictures in the samples' place; "
    "nobody can honestly do better.")
HOW_TO_READ_PAIRS = (
    "On the left the sample, on the right the training picture nearest to it, mirrored and turned as it fits best; the "
    "nearest pair first. A red frame: called a copy. The distance is the share of the sample's contrast that the "
    "training picture does not explain: 0 is the same picture, 1 nothing in common.")


def write_html(path: Path, report: dict, images: dict[str, Image.Image], pairs: Sequence[tuple[Image.Image, str, bool]],
               plots: dict[str, tuple[str, Path]]) -> None:
    """The whole report in one file. `images` by their captions; pairs are (picture, caption, is it a copy); `plots` by
    their headings, with what to say of them."""
    runs, last = report["runs"], report["runs"][-1]
    text = html.escape
    parts = [f"<h1>What did the model learn?</h1><p>{text(last['name'])}: {text(report['summary'])}</p>"]
    said = [report["epoch_to_keep"]] * bool(report["epoch_to_keep"]) + last["verdict"]
    parts.append("<div class=said><ul>" + "".join(f"<li>{text(line)}</li>" for line in said) + "</ul></div>")
    if report["notes"]:
        notes = "".join(f"<li>{text(note)}</li>" for note in report["notes"])
        parts.append(f"<h2>What was not measured</h2><ul>{notes}</ul>")
    parts += [f"<figure><img src='{_uri(image)}'><figcaption>{text(caption)}</figcaption></figure>"
              for caption, image in images.items()]

    of_epoch = f" of epoch {last['epoch']}" if len(runs) > 1 else ""
    parts.append(f"<h2>The figures{of_epoch}</h2><p><small>{text(HOW_TO_READ)}</small></p>")
    parts.append("<table><tr><th>figure<th>samples<th>real pictures<th>what it means</tr>")
    for name, (heading, style, better, meaning) in MEANINGS.items():
        if name in last["figures"]:
            figure = last["figures"][name]
            way = better if better == "as the data" else f"{better} is better"
            row = [(heading, way)] + [shown(of, style) if of else ("", "") for of in (figure, figure.get("real"))]
            cells = "".join(f"<td class=n>{text(main)}<br><small>{text(below)}</small>" for main, below in row)
            parts.append(f"<tr>{cells}<td><small>{text(meaning)}</small></tr>")
    parts.append("</table>")

    if pairs:
        parts.append(f"<h2>The closest pairs</h2><p>{text(last['copies']['words'])}</p>"
                     f"<p><small>{text(HOW_TO_READ_PAIRS)}</small></p><div class=pairs>")
        parts += [f"<figure{' class=copy' * copied}><img src='{_uri(image)}'><figcaption>{text(caption)}</figcaption>"
                  f"</figure>" for image, caption, copied in pairs]
        parts.append("</div>")
    for heading, (words, plot) in plots.items():
        with Image.open(plot) as image:
            parts.append(f"<h2>{text(heading)}</h2><p>{text(words)}</p><img class=plot src='{_uri(image)}'>")
    if len(runs) > 1:
        parts.append("<table><tr><th>figure" + "".join(f"<th>epoch {run['epoch']}" for run in runs) + "</tr>")
        for name, (heading, style, _, _) in MEANINGS.items():
            cells = [shown(run["figures"][name], style) if name in run["figures"] else ("", "") for run in runs]
            if any(value for value, _ in cells):
                row = "".join(f"<td class=n>{text(value)}<br><small>{text(below)}</small>" for value, below in cells)
                parts.append(f"<tr><td class=n>{text(heading)}{row}</tr>")
        parts.append("</table>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(last['name'])}</title><style>{STYLE}</style>"
    path.write_text("\n".join([head, *parts, "</html>\n"]), encoding="utf-8")


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
