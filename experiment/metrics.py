"""The results table, confidence intervals, SSIM and per-class scores."""

import csv
import io
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import InputError
from models.files import write_text

# What the rows of the results are called: images as they are, reduced, enlarged again, and rebuilt by a DarioNet.
ORIGINAL, SMALL, BASELINE, OURS = "Original", "Small", "Bilinear", "DarioNet"
RESAMPLES = 2000  # of the bootstrap
WINDOW = 11  # pixels: the side of SSIM's Gaussian window
MEANS = ("cross_entropy", "psnr_db", "ssim", "top5", "agreement")
COLUMNS = (  # of the table: heading, format, keys of a variant
    ("Variant", "", "name"),
    ("Accuracy", ".4f", "accuracy"),
    ("95 % interval", ".3f", "accuracy_low", "accuracy_high"),
    ("Top-5", ".4f", "top5"),
    ("Agreement", ".4f", "agreement"),
    ("Recovered", ".1%", "recovered"),
    ("95 % interval", ".0%", "recovered_low", "recovered_high"),
    ("PSNR dB", ".2f", "psnr_db"),
    ("SSIM", ".3f", "ssim"),
)


def require_finite(logits: Tensor, what: str) -> None:
    """Raises InputError if scores on `what` are not finite: read as a class by argmax, they would be class 0."""
    if not torch.isfinite(logits).all():
        raise InputError(f"the scores on {what} are not finite: its weights are damaged")


def ssim(found: Tensor, expected: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image, (N,C,H,W) in [0,1] -> (N).

    The window is a Gaussian of 1.5 pixels; only windows that lie within the image count.
    """
    gauss = [math.exp(-((k - WINDOW // 2) ** 2) / (2 * 1.5**2)) for k in range(WINDOW)]
    x, y = found.float() - 0.5, expected.float() - 0.5  # smaller squares, so less is lost to rounding
    means = torch.stack([x, y, x * x, y * y, x * y])
    for axis in (-1, -2):
        length = means.shape[axis] - WINDOW + 1
        parts = [means.narrow(axis, k, length) for k in range(WINDOW)]
        means = torch.zeros_like(parts[0])
        for part, weight in zip(parts, gauss, strict=True):
            means.add_(part, alpha=weight / sum(gauss))
    mx, my, xx, yy, xy = means
    structure = (2 * (xy - mx * my) + 0.03**2) / (xx - mx * mx + yy - my * my + 0.03**2)
    mx, my = mx + 0.5, my + 0.5
    return ((2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2) * structure).mean((1, 2, 3))


def summarise(rows: list[dict], seconds: dict[str, float], timed: dict[str, int], seed: int) -> list[dict]:
    """One dictionary per variant, in the order of the rows: the `variants` of results.json.

    Intervals are 95 % percentile intervals of a bootstrap over images, the same images drawn for every variant
    (Efron and Tibshirani 1993, chapter 13). A figure without a value is None.
    """
    names = dict.fromkeys(row["variant"] for row in rows)
    by_variant = {name: [row for row in rows if row["variant"] == name] for name in names}
    correct = {name: np.array([row["correct"] for row in own], dtype=float) for name, own in by_variant.items()}
    accuracy, draws = bootstrap(correct, seed)
    table = []
    for name, own in by_variant.items():
        figures = {"name": name, "n": len(own)} | {key: mean([row[key] for row in own]) for key in MEANS}
        low, high = interval(draws[name])
        figures |= {"accuracy": accuracy[name], "accuracy_low": low, "accuracy_high": high}
        recovered, drawn = recovered_draws(name, accuracy, draws)
        low, high = (None, None) if drawn is None else interval(drawn)
        figures |= {"recovered": recovered, "recovered_low": low, "recovered_high": high, "seconds": seconds[name]}
        table.append(figures | {"images_per_second": timed[name] / max(seconds[name], 1e-9)})
    return table


def mean(values: list[float | None]) -> float | None:
    return math.fsum(values) / len(values) if None not in values and all(map(math.isfinite, values)) else None


def bootstrap(correct: dict[str, np.ndarray], seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Accuracy of every variant, and RESAMPLES accuracies of each on images drawn with replacement, paired."""
    n = len(next(iter(correct.values())))
    rng = np.random.default_rng(seed)
    stacked = np.stack(list(correct.values()), 1)
    draws = np.stack([rng.multinomial(n, np.full(n, 1 / n)) @ stacked for _ in range(RESAMPLES)]) / n
    accuracy = {name: float(values.mean()) for name, values in correct.items()}
    return accuracy, {name: draws[:, i] for i, name in enumerate(correct)}


def interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def recovered_draws(
    name: str, accuracy: dict[str, float], draws: dict[str, np.ndarray]
) -> tuple[float | None, np.ndarray | None]:
    """(variant - bilinear) / (original - bilinear), and the same of every draw; None if bilinear loses nothing."""
    if name in (ORIGINAL, BASELINE, SMALL) or not {ORIGINAL, BASELINE} <= accuracy.keys():
        return None, None
    lost = accuracy[ORIGINAL] - accuracy[BASELINE]
    if lost <= 0:
        return None, None
    fraction = (accuracy[name] - accuracy[BASELINE]) / lost
    lost_draws = draws[ORIGINAL] - draws[BASELINE]
    if (lost_draws <= 0).any():  # the loss may be nothing: its ratio has no interval
        return fraction, None
    return fraction, (draws[name] - draws[BASELINE]) / lost_draws


def right_or_wrong(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Image -> variant -> 1 if the classifier was right, else 0, in the order of the rows."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        table.setdefault(row["image"], {})[row["variant"]] = row["correct"]
    return table


def mcnemar(rows: list[dict], first: str, second: str) -> dict:
    """McNemar's exact test (1947) of whether two variants are right equally often, on the images where they differ.

    `p` is the two-sided binomial probability of a split at least as uneven as the one found.
    """
    pairs = [(right[first], right[second]) for right in right_or_wrong(rows).values()]
    only_first, only_second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    n, fewer = only_first + only_second, min(only_first, only_second)
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1))
    p = min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in logs))
    return {"first": first, "second": second, "only_first": only_first, "only_second": only_second, "p": p}


def mcnemar_line(test: dict) -> str:
    """A sentence that says what `mcnemar` found."""
    p = f"p = {test['p']:.2g}" if test["p"] >= 1e-15 else "p < 1e-15"
    alone = f"{test['first']} alone is right on {test['only_first']} images, {test['second']} alone on"
    return f"{alone} {test['only_second']}: McNemar's exact test gives {p}."


def worst_cases(rows: list[dict], count: int, ours: str = OURS) -> list[str]:
    """Images that the classifier knows in the original, if there is one, and misreads most confidently when rebuilt."""
    lost = {row["image"] for row in rows if row["variant"] == ORIGINAL and not row["correct"]}
    wrong = [r for r in rows if r["variant"] == ours and not r["correct"] and r["image"] not in lost]
    return [row["image"] for row in sorted(wrong, key=lambda r: -r["probability"])[:count]]


def per_class(rows: list[dict], class_names: list[str], labels: list[str]) -> list[dict]:
    """Precision, recall and F1 per variant and class that has test images: the rows of classes.csv."""
    index = {name: i for i, name in enumerate(class_names)}
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        pairs = np.array([(index[r["class"]], index[r["predicted"]]) for r in rows if r["variant"] == variant])
        hits = np.bincount(pairs[pairs[:, 0] == pairs[:, 1], 0], minlength=len(index)).tolist()
        images, predicted = (np.bincount(column, minlength=len(index)).tolist() for column in pairs.T)
        for i in np.unique(pairs[:, 0]).tolist():
            row = {"variant": variant, "index": i, "class": class_names[i], "label": labels[i], "n": images[i]}
            row |= {"precision": hits[i] / max(predicted[i], 1), "recall": hits[i] / images[i]}
            table.append(row | {"f1": 2 * hits[i] / (images[i] + predicted[i])})
    return table


def table_cells(variants: list[dict]) -> list[list[str]]:
    """The results table as text: headings, then a row per variant, a dash for no value; without columns of dashes."""

    def cell(form: str, *values: float | str | None) -> str:
        return "–" if None in values else " to ".join(format(value, form) for value in values)

    columns = [column for column in COLUMNS if any(v[column[2]] is not None for v in variants)]
    headings = [heading for heading, *_ in columns]
    return [headings, *([cell(form, *(v[key] for key in keys)) for _, form, *keys in columns] for v in variants)]


def markdown_table(variants: list[dict]) -> str:
    """The results table in Markdown, its columns padded so that it reads well in a terminal too."""
    rows = table_cells(variants)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys as a CSV file with a header, written atomically; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys() if rows else ())
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def require_tensorboard(wanted: bool) -> None:
    if wanted and find_spec("tensorboard") is None:
        raise InputError("training.tensorboard: TensorBoard is not installed; pip install tensorboard")


def log_to_tensorboard(folder: Path, row: dict, picture: Path | None) -> None:
    """Adds a row of history.csv, and a picture if it was drawn, to what TensorBoard shows of a run."""
    from torch.utils.tensorboard import SummaryWriter  # no part of requirements.txt

    with SummaryWriter(folder) as writer:
        for key, value in row.items():
            if key != "epoch" and value is not None:
                writer.add_scalar(key, value, row["epoch"])
        if picture and picture.is_file():
            writer.add_image("samples", np.array(Image.open(picture).convert("RGB")), row["epoch"], dataformats="HWC")


def write_json(path: Path, values: object) -> None:
    """Values as JSON, written atomically. NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
