"""What did the model learn? Likelihood, distance to the data, copies, and the marks of training and sampling.

    python evaluate.py                                                            # the newest checkpoint
    python evaluate.py --checkpoint checkpoints/final_model.pt --num_samples 1000
    python evaluate.py --checkpoint checkpoints/epoch_*.pt --num_samples 500      # also: which epoch to keep?
    python evaluate.py --samples outputs/generated --data data/pokemon_jpg        # pictures that were made before

Prints a table and writes report.json and report.html, which explains every figure, to outputs/evaluation/. No trained
network is used, but with --fid. Each measure has its own file: likelihood.py, distances.py, features.py, copies.py and
marks.py. Everything is measured against the data that the checkpoint was trained on, and against those pictures of it
that were kept aside (`train.py --holdout 0.1`).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import report
from checkpoint import CheckpointError, load_checkpoint, load_model, newest_checkpoint
from copies import Limit, calibrate, feature_distance, nearest, warp, wilson
from dataset import DataError, ImageFolder, find_images, load_images
from devices import autocast, describe, memory_format, pick_device, pick_precision, use_fast_kernels
from distances import Score, compare, find_torch_fidelity, inception_distances, sets_to_compare
from features import FeatureSpace
from flags import Parser, finite, natural, positive
from forward_diffusion import seed_from
from likelihood import gap, png_bits, variational_bound
from marks import looks, marks
from pictures import enlarge, grid, save_picture, to_image, to_pixels
from reverse_diffusion import SAMPLERS, sample_seeds

FRESH_SEED = 3_000_003  # of critters that no model was trained on
MOST_UNSEEN = 500  # of them, and of the pictures kept aside that are searched for copies
PAIRS = 24
SHOWN = 64


@dataclass
class Data:
    """The pictures uint8 [N, 3, S, S] that the model was trained on, and others that it has not seen."""

    train: torch.Tensor
    names: list[str]
    unseen: torch.Tensor
    train_types: torch.Tensor | None = None  # float [N, K] for the checkpoint's K types, or None
    unseen_types: torch.Tensor | None = None
    words: str = ""  # what this is
    notes: list[str] = field(default_factory=list)  # what it cannot tell

    @cached_property
    def some(self) -> torch.Tensor:
        """Up to 2,000 real pictures in random order, for what does not need all."""
        generator = torch.Generator().manual_seed(seed_from(len(self.train), stream="evaluate"))
        real = torch.cat([self.train, self.unseen])
        return real[torch.randperm(len(real), generator=generator)[:2000]]

    @cached_property
    def space(self) -> FeatureSpace:
        return FeatureSpace(self.some)

    @cached_property
    def limits(self) -> dict[str, Limit]:
        return calibrate(self.train, self.space)


def main() -> None:
    args = parse_flags()
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        use_fast_kernels()
        if args.fid:
            find_torch_fidelity()  # what is missing should be known before minutes of sampling
        args.output.mkdir(parents=True, exist_ok=True)
        checkpoints = args.checkpoint or ([] if args.samples else [newest_checkpoint()])
        contents = [load_checkpoint(path) for path in checkpoints]
        data = find_data(args, contents)
        runs = []
        for path, content in zip(checkpoints, contents) if checkpoints else [(args.samples, None)]:
            print(f"{path}: {data.words}; on {describe(device)}, {precision}")
            runs.append(evaluate(path, content, data, args, device, precision))
            print(report.table(runs[-1]) + "\n")
            made = write(sorted(runs, key=lambda run: run["epoch"]), data, args)  # each time, lest a stop lose it all
        for line in [made["epoch_to_keep"]] * bool(made["epoch_to_keep"]) + made["runs"][-1]["verdict"] + made["notes"]:
            print(f"- {line}")
        print(f"wrote {args.output}/report.html and report.json")
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory; give a --batch_size smaller than {args.batch_size}")
    except KeyboardInterrupt:
        sys.exit(130)


def evaluate(path: Path, content: dict | None, data: Data, args, device: torch.device, precision: str) -> dict:
    """Everything about one checkpoint, or about a folder of samples: a dict of plain values, and its pictures."""
    run = dict(name=str(path), epoch=content["epoch"] if content else 0, figures={}, bits={}, notes=[])
    figures, notes = run["figures"], run["notes"]
    if args.samples:
        samples = in_memory(ImageFolder(args.samples, data.train.shape[-1]), args.samples)
    if content:
        model, scheduler, codec, config = load_model(path, device)
        if not args.samples:
            samples = draw_samples(model, scheduler, codec, config, data, args, device, precision, run)
        if args.num_likelihood:
            measure_bits(model, scheduler, codec, config, data, args, device, precision, run)
    run["num_samples"] = len(samples)

    print(f"measuring {len(samples):,} samples")
    try:
        ours, reference, yardstick = sets_to_compare(samples, data.train, data.unseen)
        scores, real = compare(ours, reference, data.space), compare(yardstick, reference, data.space)
        if args.fid:
            scores |= inception_distances(ours, reference, device.type == "cuda")
            real |= inception_distances(yardstick, reference, device.type == "cuda")
        levels = [name for name in scores if name.startswith("wasserstein_")]
        scores["wasserstein_fine"], real["wasserstein_fine"] = scores[levels[0]], real[levels[0]]
        scores["wasserstein_coarse"], real["wasserstein_coarse"] = scores[levels[-1]], real[levels[-1]]
        for name in scores:
            figures[name] = {**of_score(scores[name]), "real": of_score(real[name])}
            if name in ("precision", "recall", "coverage"):  # shares: they end at 1, and none is known exactly
                for share in (figures[name], figures[name]["real"]):
                    _, low, high = wilson(round(share["value"] * len(ours)), len(ours))
                    share |= dict(low=max(0.0, min(low, share["low"])), high=min(1.0, max(high, share["high"])))
        run["compared"] = len(ours)
    except ValueError as error:
        notes.append(f"Distances: {error}.")
    try:
        measure_copies(samples, data, run)
    except ValueError as error:
        notes.append(f"Copies: {error}.")
    for name, found in marks(samples).items():
        figures[name] = {**of_share(found), "real": of_share(marks(data.some)[name])}
    of_data = looks(data.some)
    for name, found in looks(samples).items():
        figures[name] = {**of_mean(found), "real": of_mean(of_data[name])}
    run["verdict"] = report.verdict(run)
    run["samples"] = samples
    return run


# ---------------------------------------------------------------------------------------------------------------------
# the data, and the samples


def find_data(args, contents: list[dict]) -> Data:
    """The data of the checkpoints, or --data; and what was kept aside of it, or fresh critters."""
    if not contents:
        if not args.data:
            raise ValueError("--samples needs --data, the pictures to compare with, or --checkpoint, which knows them")
        with Image.open(find_images(args.samples)[0]) as image:
            size = args.image_size or min(image.size)
        source = dict(data=args.data, image_size=size, labels="none", num_critters=2000, seed=0)
        held_out, types = [], ()
    else:
        configs = [content["config"] for content in contents]
        source = {name: configs[0].get(name) for name in ("data", "image_size", "labels", "num_critters", "seed")}
        held_out, types = contents[0].get("held_out", []), tuple(contents[0].get("types", ()))
        for content in contents[1:]:
            other = {name: content["config"].get(name) for name in source}
            if other != source or content.get("held_out", []) != held_out:
                raise ValueError("the checkpoints were trained on different data; evaluate them one at a time")
        if args.data and args.data != source["data"]:
            source |= dict(data=args.data, labels="auto")
        if args.labels:
            source["labels"] = args.labels
    everything = load_images(source["data"], source["image_size"], labels=source["labels"] or "auto",
                             num_critters=source["num_critters"], seed=source["seed"])
    images, aside = in_memory(everything, source["data"]), set(held_out)
    held = torch.tensor([name in aside for name in everything.names])
    if held_out and not held.any():
        raise ValueError(f"none of the {len(held_out)} pictures that the checkpoint's training kept aside is in "
                         f"{source['data']}; give the folder that it was trained on with --data")
    labels = columns(everything, types)
    names = [name for name, is_held in zip(everything.names, held) if not is_held]
    data = dict(train=images[~held], names=names, unseen=images[held])
    if types:
        data |= dict(train_types=labels[~held], unseen_types=labels[held])
    words = f"{len(names):,} training pictures of {source['image_size']} x {source['image_size']} from {source['data']}"
    if held.any():
        return Data(**data, words=f"{words}, {held.sum():,} kept aside")
    if source["data"] == "critters":
        count = min(MOST_UNSEEN, len(names))
        fresh = load_images("critters", source["image_size"], num_critters=count, seed=FRESH_SEED)
        data["unseen"] = fresh.images
        if types:
            data["unseen_types"] = columns(fresh, types)
        return Data(**data, words=f"{words}, {len(fresh):,} fresh ones that it has not seen")
    return Data(**data, words=f"{words}, none kept aside", notes=[
        "No pictures were kept aside from training (train.py --holdout 0.1 does that). So there are no bits of unseen "
        "pictures, and the false alarm of the copy test rests on the training pictures alone."])


def columns(dataset: ImageFolder, types: tuple[str, ...]) -> torch.Tensor:
    """The data's labels in the order of the checkpoint's types, float [N, K]."""
    labels = torch.zeros(len(dataset), len(types))
    for column, name in enumerate(types):
        if name in dataset.types:
            labels[:, column] = dataset.labels[:, dataset.types.index(name)].float()
    return labels


def in_memory(dataset: ImageFolder, folder) -> torch.Tensor:
    if dataset.images is None:
        raise ValueError(f"the {len(dataset)} images in {folder} do not fit in memory; give a smaller folder")
    return dataset.images


def draw_samples(model, scheduler, codec, config: dict, data: Data, args, device, precision: str, run: dict
                 ) -> torch.Tensor:
    """uint8 [num_samples, 3, S, S]. A model that knows types is asked for those of training pictures drawn at random,
    so that the samples have the data's mixture of types."""
    of_grids = config.get("sampler", "ddim")
    sampler = args.sampler or of_grids
    steps = args.steps or (config.get("sample_steps", 50) if sampler == of_grids else 50)
    steps = min(steps, scheduler.num_timesteps)
    types = None
    if data.train_types is not None and data.train_types.any():
        generator = torch.Generator().manual_seed(seed_from(args.seed, stream="types"))
        types = data.train_types[torch.randint(len(data.train_types), (args.num_samples,), generator=generator)]
    guidance = args.guidance if types is not None else 1.0
    run["sampling"] = dict(sampler=sampler, steps=steps, seed=args.seed, guidance=guidance)
    parts, size = [], args.batch_size
    total = steps * math.ceil(args.num_samples / size)
    with tqdm(total=total, desc="sampling", unit="step", dynamic_ncols=True) as bar:
        for low in range(0, args.num_samples, size):  # as bytes at once: floats would take four times the memory
            seeds = range(args.seed + low, args.seed + min(low + size, args.num_samples))
            images = sample_seeds(
                model, scheduler, seeds, config["image_size"], device, precision, codec=codec, batch_size=size,
                sampler=sampler, steps=steps, prediction=config["prediction"], guidance=guidance,
                types=None if types is None else types[low : low + size], callback=lambda *_: bar.update(),
            )
            parts.append(to_pixels(images))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# the measures


def measure_bits(model, scheduler, codec, config: dict, data: Data, args, device, precision: str, run: dict) -> None:
    """Bits a dimension of training and unseen pictures, and the gap between them."""
    def network(x_t: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return model(x_t.contiguous(memory_format=memory_format(device)), *others)

    def as_bytes(images: torch.Tensor) -> torch.Tensor:
        """The pictures as the model sees them, their numbers in 256 levels; of pixels, these are the pictures."""
        with autocast(device, precision):
            parts = [codec.encode(part.float() / 127.5 - 1).cpu() for part in images.split(args.batch_size)]
        return to_pixels(torch.cat(parts) / codec.limit)

    run["notes"] += codec.notes
    sets = {"train": (data.train, data.train_types), "held_out": (data.unseen, data.unseen_types)}
    bounds, details = {}, {}
    for name, (images, types) in sets.items():
        if len(images) < 2:
            continue
        generator = torch.Generator().manual_seed(seed_from(args.seed, stream=f"likelihood {name}"))
        chosen = torch.randperm(len(images), generator=generator)[: args.num_likelihood]
        with tqdm(total=len(chosen) * (1 + args.likelihood_steps), desc=f"bits, {name.replace('_', ' ')}", unit="pass",
                  dynamic_ncols=True) as bar:
            bounds[name] = variational_bound(
                network, scheduler, as_bytes(images[chosen]), limit=codec.limit, prediction=config["prediction"],
                types=None if types is None else types[chosen], num_timesteps=args.likelihood_steps, seed=args.seed,
                batch_size=args.batch_size, device=device, callback=bar.update,
            )
        bound, details[name] = bounds[name], png_bits(images[chosen])
        run["figures"][f"bits_{name}"] = of_score(Score(bound.mean, bound.stderr))
        run["bits"][name] = dict(num_images=len(chosen), prior=bound.prior.mean().item(), ranges=bound.ranges,
                                 steps=bound.steps.mean(dim=0).tolist(), decoder=bound.decoder.mean().item())
    if len(bounds) == 2:
        difference = gap(bounds["train"], bounds["held_out"], (details["train"], details["held_out"]))
        run["figures"]["bits_gap"] = of_score(Score(*difference))


def measure_copies(samples: torch.Tensor, data: Data, run: dict) -> None:
    """The share of copies among the samples, and among unseen pictures; and the closest pairs."""
    limits = data.limits
    found = {"samples": nearest(samples, data.train)}
    shares = {}
    for name, images in {"samples": samples, "unseen": data.unseen[:MOST_UNSEEN]}.items():
        if len(images):
            match = found.get(name) or nearest(images, data.train)
            shares[name] = (match.distance <= limits["pixels"].threshold,
                            feature_distance(images, data.train, match, data.space) <= limits["features"].threshold)
    for i, key in enumerate(("copies", "copies_features")):
        run["figures"][key] = of_share(shares["samples"][i])
        if "unseen" in shares:
            run["figures"][key]["real"] = of_share(shares["unseen"][i])
    limit, match = limits["pixels"], found["samples"]
    words = (f"A sample is called a copy if its distance is at most {limit.threshold:.3f}. So near to another one is "
             f"{100 * limit.alarm:.1f} % of {limit.compared - limit.duplicates:,} training pictures. Of copies planted "
             f"on purpose (turned, shifted, recoloured) {100 * limit.found[0]:.0f} % are found.")
    if limit.duplicates:
        words += (f" {limit.duplicates:,} of {limit.compared:,} training pictures have a duplicate among the others, "
                  f"as near as a copy, and were left out of this.")
    if "unseen" in shares:
        alarms = shares["unseen"][0]
        words += f" Of {len(alarms):,} pictures that the model has not seen, {alarms.sum():,} would be called copies."
    order = match.distance.argsort()[:PAIRS]
    run["copies"] = dict(
        words=words, threshold=limit.threshold, alarm=limit.alarm, planted_found=limit.found, compared=limit.compared,
        duplicates=limit.duplicates, features_threshold=limits["features"].threshold,
        features_planted_found=limits["features"].found,
        closest=[dict(sample=i, picture=data.names[match.index[i]], distance=match.distance[i].item(),
                      mirrored=match.pose[i, 0].item() < 0, degrees=match.pose[i, 1].item()) for i in order.tolist()],
    )
    laid = to_pixels(2 * warp(data.train[match.index[order]].float() / 255, match.pose[order]) - 1)
    run["pairs"] = report.picture_pairs(samples[order], laid)


def of_score(score: Score) -> dict:
    interval = {} if math.isnan(score.error) else dict(low=score.value - 1.96 * score.error,
                                                       high=score.value + 1.96 * score.error)
    return dict(value=score.value, **interval)


def of_mean(values: torch.Tensor) -> dict:
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
    return of_score(Score(values.mean().item(), error))


def of_share(found: torch.Tensor) -> dict:
    share, low, high = wilson(found.sum().item(), len(found))
    return dict(value=share, low=low, high=high)


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write(runs: list[dict], data: Data, args) -> dict:
    """report.json, whose content is returned, report.html, closest_pairs.png, and the plots."""
    folder, last, plots = args.output, runs[-1], {}
    samples, pairs = last["samples"], last.get("pairs")
    scale = max(1, 64 // samples.shape[-1])
    images = {f"The first {min(SHOWN, len(samples))} of {len(samples):,} samples": grid(samples[:SHOWN], 16, scale),
              f"{min(SHOWN, len(data.some))} real pictures": grid(data.some[:SHOWN], 16, scale)}
    closest = []
    if pairs is not None:
        save_picture(grid(pairs, 6, scale), folder / "closest_pairs.png")
        for pair, of in zip(pairs, last["copies"]["closest"]):
            turned = ", mirrored" if of["mirrored"] else ""
            closest.append((to_image(enlarge(pair, scale)), f"{of['distance']:.3f}: {of['picture']}{turned}",
                            of["distance"] <= last["copies"]["threshold"]))
    if last["bits"]:
        report.plot_bits(last, folder / "bits.png")
        plots["Bits by timestep"] = (
            "What each step of the way back from noise costs. Small t is the exact value of each pixel, large t the "
            "shape. Where unseen pictures cost more, the model knows its training pictures better.",
            folder / "bits.png")
    if len(runs) > 1:
        report.plot_over_time(runs, folder / "over_time.png")
        plots["Over time"] = (
            "Each figure against the epoch. Shaded: where it lies with 95 % confidence. Dashed: real pictures. Look "
            "for where quality stops growing, and where copies or the bits of unseen pictures begin to rise.",
            folder / "over_time.png")
    sampling = last.get("sampling")
    summary = f"{len(samples):,} samples against {data.words}." + (
        f" Drawn by {sampling['sampler']} in {sampling['steps']} steps." if sampling else "") + (
        f" Distances compare {last['compared']:,} of them with as many pictures." if "compared" in last else "")
    plain = [{key: value for key, value in run.items() if key not in ("samples", "pairs")} for run in runs]
    made = dict(summary=summary, epoch_to_keep=report.epoch_to_keep(runs), notes=data.notes + last["notes"], runs=plain)
    (folder / "report.json").write_text(json.dumps(made, indent=1) + "\n")
    report.write_html(folder / "report.html", made, images, closest, plots)
    return made


def parse_flags():
    parser = Parser(description="Measure what a model has learned: likelihood, distance to the data, copies, marks.")
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE", help="file of weights, or several of one "
                        "training, for figures over time (default: the newest in checkpoints/)")
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="measure these pictures, as `generate.py "
                        "--individual` writes them, instead of drawing samples")
    parser.add_argument("--data", help="folder of images, or 'critters' (default: what the checkpoint was trained on)")
    parser.add_argument("--labels", help="the images' types, as in train.py (default: as in the training)")
    parser.add_argument("--image_size", type=positive, help="side of the pictures, with --samples and no --checkpoint "
                        "(default: that of the first sample)")
    parser.add_argument("--num_samples", type=positive, default=1000, help="how many to draw (default: 1000)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: that of the training's own grids)")
    parser.add_argument("--steps", type=positive, help="network passes a sample (default: as for those grids; 50 for "
                        "another sampler)")
    parser.add_argument("--guidance", type=finite, default=1.0, help="how strongly samples are pushed towards types; "
                        "more than 1 makes them less varied than the data (default: 1)")
    parser.add_argument("--num_likelihood", type=natural, default=200, help="pictures whose bits are estimated, of the "
                        "training and as many unseen ones; 0: none (default: 200)")
    parser.add_argument("--likelihood_steps", type=positive, default=16, help="timesteps visited for each of them "
                        "(default: 16)")
    parser.add_argument("--fid", action="store_true", help="also FID and KID, with torch-fidelity, where installed")
    parser.add_argument("--seed", type=natural, default=0, help="sample i is drawn from seed + i (default: 0)")
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder for the report "
                        "(default: outputs/evaluation)")
    parser.add_device_flags()
    args = parser.parse_args()
    if args.samples and args.checkpoint and len(args.checkpoint) > 1:
        parser.error("--samples goes with one --checkpoint or none")
    return args


if __name__ == "__main__":
    main()
