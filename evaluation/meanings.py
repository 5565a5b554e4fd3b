"""The figures of the report: their headings, how to print them, and what they mean."""

from __future__ import annotations

from typing import Any, NamedTuple

SCALES = {"%": 100, "x1000": 1000}  # of the styles that print a multiple of the figure


class Meaning(NamedTuple):
    """What a reader needs to know of a figure.

    heading: its name in tables and plots.
    style: "%" for fractions that are printed as percentages, "x1000" for numbers that are printed in thousandths, else
        the number of decimals.
    better: "lower", "higher", "nearer to 0", or "as the data".
    text: what it means, in sentences.
    """

    heading: str
    style: str
    better: str
    text: str

    @property
    def scale(self) -> int:
        """What the figure is multiplied by to be printed."""
        return SCALES.get(self.style, 1)

    @property
    def direction(self) -> str:
        return self.better if self.better == "as the data" else f"{self.better} is better"


MEANINGS: dict[str, Meaning] = {
    "copies": Meaning(
        "copies", "%", "lower",
        "Fraction of samples that are closer to a training image (after mirroring, rotating, shifting and matching "
        "brightness) than 99 % of the training images are to each other. The threshold is set so that about 1 % of "
        "new images count as copies by chance; a clearly higher fraction means that the model has memorised images.",
    ),
    "copies_ratio": Meaning(
        "copies, by the ratio 1/3", "%", "lower",
        "Fraction of samples whose distance to the nearest training image is less than a third of that to the second "
        "nearest: the yardstick of the literature, with distances after the same fit. Far fewer than 1 % of new images "
        "are called copies by it; it misses copies of images that have a duplicate.",
    ),
    "copies_features": Meaning(
        "copies, by features", "%", "lower",
        "As copies, for the same pairs, but compared by colours and edges at full size instead of pixel by pixel. It "
        "misses more copies, but mistakes fewer plain shapes for copies.",
    ),
    "copies_guided": Meaning(
        "copies, at guidance 3", "%", "lower",
        "As copies, for samples with guidance 3.",
    ),
    "precision": Meaning(
        "precision", "%", "higher",
        "Fraction of samples that lie among the real images in a space of colours and edges. Low values mean blurred, "
        "grainy or misshapen samples.",
    ),
    "recall": Meaning(
        "recall", "%", "higher",
        "Fraction of real images that lie among the samples. Low values mean that the model omits kinds of image.",
    ),
    "density": Meaning(
        "density", "2", "higher",
        "How densely real images surround a sample; 1 is typical of real images. Similar to precision, but robust to a "
        "few unusual real images.",
    ),
    "coverage": Meaning(
        "coverage", "%", "higher",
        "Fraction of real images with a sample close by. Similar to recall, but robust to a few unusual samples.",
    ),
    "wasserstein": Meaning(
        "patch distance", "3", "lower",
        "Sliced Wasserstein distance between small patches of samples and of real images, averaged over all scales. 0 "
        "means equal distributions; the value of real images is the best that can be expected, and a value clearly "
        "below it indicates copies.",
    ),
    "wasserstein_fine": Meaning(
        "patch distance, finest detail", "3", "lower",
        "The patch distance of the finest scale alone. Blur and grain increase it.",
    ),
    "wasserstein_coarse": Meaning(
        "patch distance, broad shapes", "3", "lower",
        "The patch distance of the coarsest scale alone. Wrong colours and shapes increase it.",
    ),
    "efficientnet_kid": Meaning(
        "KID × 1000, EfficientNet", "x1000", "lower",
        "Kernel distance of samples and real images in the features of an outside network that was trained on "
        "photographs. 0 means equal distributions, on average over other samples; it sees grain, blur and misshapen "
        "bodies that colours and edges miss.",
    ),
    "efficientnet_precision": Meaning(
        "precision, EfficientNet", "%", "higher",
        "As precision, in the features of the outside network.",
    ),
    "efficientnet_recall": Meaning(
        "recall, EfficientNet", "%", "higher",
        "As recall, in the features of the outside network.",
    ),
    "efficientnet_density": Meaning(
        "density, EfficientNet", "2", "higher",
        "As density, in the features of the outside network.",
    ),
    "efficientnet_coverage": Meaning(
        "coverage, EfficientNet", "%", "higher",
        "As coverage, in the features of the outside network.",
    ),
    "bits_train": Meaning(
        "bits, training images", "3", "lower",
        "Upper bound of the bits per colour value that the model needs to encode a training image. Fewer bits mean "
        "that the model predicts the image better.",
    ),
    "bits_held_out": Meaning(
        "bits, unseen images", "3", "lower",
        "The same for images that the model was not trained on. If it rises during training, the model has begun to "
        "memorise its training images.",
    ),
    "bits_gap": Meaning(
        "bits, unseen minus training", "3", "nearer to 0",
        "How many more bits an unseen image costs, corrected for the amount of detail in each image. Clearly above 0 "
        "is the first sign of memorisation.",
    ),
    "membership_auc": Meaning(
        "membership, AUC", "2", "nearer to 0.5",
        "Probability that a training image is predicted better than an unseen one, at all noise levels together and "
        "corrected for the amount of detail. 0.5 is chance; 1 means that every training image can be told.",
    ),
    "membership_found": Meaning(
        "membership, found at 1 %", "%", "lower",
        "Fraction of training images that can be told to be ones by their error if 1 % of unseen images (or one of "
        "them) may be mistaken for one. About 1 % are by chance.",
    ),
    "black_corner": Meaning(
        "black corners", "%", "as the data",
        "Fraction of samples with a black corner, as left by rotations that are filled with black.",
    ),
    "collapsed": Meaning(
        "collapsed", "%", "as the data",
        "Fraction of samples that are almost entirely black: sampling has failed.",
    ),
    "clean": Meaning(
        "clean white background", "%", "as the data",
        "Fraction of samples with a white border. Only meaningful for data with a white background.",
    ),
    "border": Meaning(
        "brightness of the border", "2", "as the data",
        "From 0 (black) to 1 (white). A difference means that the background has drifted.",
    ),
    "brightness": Meaning(
        "brightness", "2", "as the data",
        "Mean brightness of the image, from 0 to 1.",
    ),
    "contrast": Meaning(
        "contrast", "2", "as the data",
        "Standard deviation of the brightness. Low values mean washed-out samples, high values garish ones.",
    ),
    "saturation": Meaning(
        "saturation", "2", "as the data",
        "Strength of the colours. Low values mean greyish samples, high values garish ones.",
    ),
    "red_to_blue": Meaning(
        "warm or cold", "3", "as the data",
        "Mean red minus mean blue. A difference means a colour cast.",
    ),
    "tilt": Meaning(
        "tilt in degrees", "1", "as the data",
        "Angle between the vertical and an image's axis of symmetry. A higher value than that of the data means that "
        "rotations of the augmentation have leaked.",
    ),
    "fid": Meaning(
        "FID", "1", "lower",
        "Fréchet Inception distance: distance of samples and real images in the features of a trained network.",
    ),
    "kid": Meaning(
        "KID", "4", "lower",
        "Kernel Inception distance: like FID with another distance, and unbiased for small sets.",
    ),
}


def format_number(x: float, style: str) -> str:
    """Format a number as the `style` of a Meaning says, without the per cent sign."""
    return f"{SCALES[style] * x:.1f}" if style in SCALES else f"{x:.{style}f}"


def format_figure(figure: dict | None, style: str) -> tuple[str, str]:
    """Format a figure and its interval, as ("4.1 %", "3.0 to 5.5"); empty strings for what is missing."""
    if figure is None:
        return "", ""
    value = format_number(figure["value"], style)
    if style == "%":
        value += " %"
    if "low" not in figure:
        return value, ""
    return value, f"{format_number(figure['low'], style)} to {format_number(figure['high'], style)}"


def table_rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return a table of figures, in the order of `MEANINGS`, its heading first."""
    rows = [("", "samples", "real images", "better")]
    for name, meaning in MEANINGS.items():
        if name in figures:
            cells = [_cell(figure, meaning.style) for figure in (figures[name], figures[name].get("real"))]
            rows.append((meaning.heading, *cells, meaning.better))
    return rows


def _cell(figure: dict | None, style: str) -> str:
    value, interval = format_figure(figure, style)
    return f"{value} ({interval})" if interval else value
