"""The report of an evaluation: table, verdict, choice of epoch, report.json, and the files around report.html.

    print(table(measurement))
    report = write_report(measurements, data, Path("outputs/evaluation"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.data import EvaluationData
from evaluation.meanings import MEANINGS, format_figure, table_rows
from evaluation.measure import Measurement
from evaluation.plots import plot_bits, plot_gap, plot_over_time
from evaluation.report_html import Pair, Plot, write_html
from utils.files import write_json
from utils.images import enlarge, image_grid, save_image, to_pil

GRID_IMAGES = 64
GRID_COLUMNS = 16
PAIR_COLUMNS = 6
# Figures that are compared with real images in the verdict: what to say if samples are worse than real images beyond
# the intervals, and what to say otherwise (nothing, where another figure says it).
COMPARED = {
    "precision": ("A smaller fraction of samples than of real images looks real", ""),
    "density": ("Samples resemble real images less than real images resemble each other",
                "Samples resemble real images as much as real images resemble each other"),
    "recall": ("Samples are less varied than real images", "Samples are as varied as real images"),
    "coverage": ("Some kinds of real image have no sample close to them", ""),
    "wasserstein_fine": ("The finest details of samples are softer or grainier than those of real images",
                         "The finest details of samples match those of real images"),
    "efficientnet_kid": ("The outside network tells samples from real images",
                         "The outside network cannot tell samples from real images"),
}
BITS_PLOT = (
    "Bits by timestep",
    "Cost of each step of the reverse process. Small t encodes the exact pixel values, large t the shape. Where unseen "
    "images cost more than training images, the model knows its training images better.")
GAP_PLOT = (
    "Unseen against training images, by noise level",
    "The network's error on images that it has not seen, as a multiple of that on training images. Flat at 1: it has "
    "learned what the images have in common. A hump at medium noise is the first sign that it knows single images.")
OVER_TIME_PLOT = (
    "Figures over the training",
    "Each figure against the epoch. Shaded: 95 % confidence interval. Dashed: real images. Look for the epoch at which "
    "quality stops improving, and for the one at which copies or the bits of unseen images begin to rise.")


# ---------------------------------------------------------------------------------------------------------------------
# text


def table(measurement: Measurement) -> str:
    """Return the figures of one measurement as text, in the order of `MEANINGS`, below the name of the data set."""
    rows = table_rows(measurement.figures)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if measurement.trained_on is not None:
        lines.insert(0, f"model trained on: {measurement.trained_on}")
    return "\n".join(lines)


def verdict(measurement: Measurement) -> list[str]:
    """Return what the figures say, in sentences."""
    lines = []
    if "copies" in measurement.figures:
        lines.append(_copies_verdict(measurement))
    if "copies_guided" in measurement.figures:
        lines.append(_guided_verdict(measurement))
    if "bits_gap" in measurement.figures:
        gap = measurement.figures["bits_gap"]
        if gap["low"] > 0:
            lines.append(f"Unseen images cost {gap['value']:.3f} bits per value more than training images: the first "
                         f"sign of memorisation.")
        else:
            lines.append(f"Bits show no sign of memorisation: unseen images cost {gap['value']:.3f} per value more "
                         f"than training images ({gap['low']:.3f} to {gap['high']:.3f}).")
    if "membership_auc" in measurement.figures:
        lines.append(_membership_verdict(measurement.figures))
    lines += _comparisons(measurement.figures)
    lines += _differences_from_data(measurement.figures)
    return lines


def _copies_verdict(measurement: Measurement) -> str:
    copies, expected, total = measurement.figures["copies"], _expected_copies(measurement), len(measurement.samples)
    counted = (f"{round(copies['value'] * total):,} of {total:,} samples count as copies of training images; about "
               f"{expected * total:.0f} are expected by chance.")
    if copies["low"] > expected:
        return f"The model copies training images: {counted} Check the closest pairs."
    if copies["high"] > 3 * expected:
        return f"No copying is evident, but there are too few samples to exclude it: {counted}"
    return f"The model does not copy training images: {counted}"


def _guided_verdict(measurement: Measurement) -> str:
    figure, expected = measurement.figures["copies_guided"], _expected_copies(measurement)
    percent = f"{100 * figure['value']:.1f} % of samples count as copies"
    guided = f"At guidance 3 ({measurement.guided_by})"
    if figure["low"] > expected:
        return f"{guided}, {percent}, more than by chance: look at the copies by type, if there are types."
    return f"{guided}, {percent}, no more than by chance."


def _membership_verdict(figures: dict[str, dict]) -> str:
    auc, found = figures["membership_auc"], figures["membership_found"]
    by_error = "can be told from unseen ones by their error"
    measured = f"AUC {auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f}; 0.5 is chance)"
    if auc["low"] <= 0.5:
        return f"It is not shown that training images {by_error}: {measured}."
    return (f"Training images {by_error}, {measured}: {100 * found['value']:.0f} % of them if 1 % of the others may be "
            f"mistaken for one.")


def _expected_copies(measurement: Measurement) -> float:
    """Return the fraction of copies that is expected by chance.

    This is the false alarm rate, or the lower end of the interval on unseen images if that is higher.
    """
    real = measurement.figures["copies"].get("real", {})
    return max(measurement.copies["alarm"], real.get("low", 0.0))


def _comparisons(figures: dict[str, dict]) -> list[str]:
    """Compare the figures of COMPARED with those of real images."""
    lines = []
    for name, (worse_text, otherwise_text) in COMPARED.items():
        if "real" not in figures.get(name, {}):
            continue
        figure, real, meaning = figures[name], figures[name]["real"], MEANINGS[name]
        is_worse = figure["high"] < real["low"] if meaning.better == "higher" else figure["low"] > real["high"]
        text = worse_text if is_worse else otherwise_text
        if text:
            value, real_value = format_figure(figure, meaning.style)[0], format_figure(real, meaning.style)[0]
            lines.append(f"{text} ({meaning.heading} {value}, real images {real_value}).")
    return lines


def _differences_from_data(figures: dict[str, dict]) -> list[str]:
    """Name the artifacts and image statistics whose interval does not overlap that of the data."""
    # A mean of a single image has no interval.
    compared = [name for name, meaning in MEANINGS.items() if meaning.better == "as the data"
                and "low" in figures.get(name, {}) and "low" in figures[name]["real"]]
    if not compared:
        return []
    different = [MEANINGS[name].heading for name in compared if figures[name]["low"] > figures[name]["real"]["high"]
                 or figures[name]["high"] < figures[name]["real"]["low"]]
    if different:
        return [f"Samples differ from the data in: {', '.join(different)}."]
    return ["Samples agree with the data in border, brightness, colours and tilt."]


def epoch_to_keep(measurements: Sequence[Measurement]) -> str:
    """Say which of several checkpoints is the best: the nearest to the data of those that do not copy.

    By KID in the outside features where it was measured, which sees bodies; else by patch distance, which sees
    textures.
    Empty for fewer than two checkpoints with both figures.
    """
    known = [m for m in measurements if "wasserstein" in m.figures and "copies" in m.figures]
    if len(known) < 2:
        return ""
    candidates = [m for m in known if m.figures["copies"]["low"] <= _expected_copies(m)]
    if not candidates:
        return ("Every checkpoint copies more than is expected by chance: train for fewer epochs, augment more, or use "
                "more images.")
    has_outside = all("efficientnet_kid" in m.figures for m in candidates)
    distance = "efficientnet_kid" if has_outside else "wasserstein"
    best = min(candidates, key=lambda m: m.figures[distance]["value"])
    limit = best.figures[distance]["high"]
    earliest = min((m for m in candidates if m.figures[distance]["value"] <= limit), key=lambda m: m.epoch)
    text = (f"Keep epoch {best.epoch}: its samples are the nearest to the data ({MEANINGS[distance].heading}) of the "
            f"checkpoints that do not copy more than is expected by chance.")
    if earliest is not best:
        text += f" Epoch {earliest.epoch} is as near, within the error."
    if len(candidates) < len(known):
        text += f" {len(known) - len(candidates)} of {len(known)} checkpoints copy, and were left out."
    return text


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_report(measurements: Sequence[Measurement], data: EvaluationData, folder: Path) -> dict[str, Any]:
    """Write report.json, report.html, closest_pairs.png and plots into `folder`.

    Args:
        measurements: by epoch; the page is about the last one.

    Returns:
        The content of report.json.
    """
    last = measurements[-1]
    report = _report_content(measurements, data)
    write_json(folder / "report.json", report)

    # Images
    scale = max(1, 64 // last.samples.shape[-1])
    shown_samples, shown_real = last.samples[:GRID_IMAGES], data.real[:GRID_IMAGES]
    grids = {
        f"The first {len(shown_samples)} of {len(last.samples):,} samples": image_grid(shown_samples, GRID_COLUMNS,
                                                                                       scale),
        f"{len(shown_real)} real images": image_grid(shown_real, GRID_COLUMNS, scale),
    }
    pairs = []
    if last.pairs is not None:
        save_image(image_grid(last.pairs, PAIR_COLUMNS, scale), folder / "closest_pairs.png")
        for pixels, pair in zip(last.pairs, last.copies["closest"]):
            mirrored = ", mirrored" if pair["mirrored"] else ""
            pairs.append(Pair(to_pil(enlarge(pixels, scale)), f"{pair['distance']:.3f}: {pair['image']}{mirrored}",
                              pair["distance"] <= last.copies["threshold"]))

    # Plots
    plots = []
    if last.bits:
        plot_bits(last, folder / "bits.png")
        plots.append(Plot(*BITS_PLOT, folder / "bits.png"))
    if last.gap_by_noise:
        plot_gap([measurement for measurement in measurements if measurement.gap_by_noise], folder / "gap.png")
        plots.append(Plot(*GAP_PLOT, folder / "gap.png"))
    if len(measurements) > 1:
        plot_over_time(measurements, folder / "over_time.png")
        plots.append(Plot(*OVER_TIME_PLOT, folder / "over_time.png"))
    write_html(folder / "report.html", report, grids, pairs, plots)
    return report


def _guidance(sampling: dict[str, Any]) -> str:
    if sampling["built_in_guidance"] != 1:
        return f", guidance {sampling['built_in_guidance']:g} built in by its training"
    return f", guidance {sampling['guidance']:g} ({sampling['guide']})" if sampling["guide"] else ""


def _report_content(measurements: Sequence[Measurement], data: EvaluationData) -> dict[str, Any]:
    last = measurements[-1]
    summary = f"{len(last.samples):,} samples, compared with {data.description}."
    if last.sampling:
        summary += f" Drawn by {last.sampling['sampler']} in {last.sampling['steps']} steps{_guidance(last.sampling)}."
    if last.compared:
        summary += f" The distances compare {last.compared:,} of them with as many real images."
    return dict(trained_on=last.trained_on, summary=summary, epoch_to_keep=epoch_to_keep(measurements),
                notes=data.notes + last.notes, runs=[_as_dict(measurement) for measurement in measurements])


def _as_dict(measurement: Measurement) -> dict[str, Any]:
    """Return what report.json has of a measurement; what was not measured has no key."""
    content = dict(
        name=measurement.name, epoch=measurement.epoch, trained_on=measurement.trained_on,
        num_samples=len(measurement.samples), sampling=measurement.sampling, figures=measurement.figures,
        bits=measurement.bits, gap_by_noise=measurement.gap_by_noise or None, compared=measurement.compared,
        copies=measurement.copies, copies_by_type=measurement.copies_by_type or None,
        guided_by=measurement.guided_by, notes=measurement.notes, verdict=verdict(measurement),
    )
    return {key: value for key, value in content.items() if value is not None}
