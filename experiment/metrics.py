"""The results table, confidence intervals and per-class scores, all from the rows of predictions.csv."""

import contextlib
import csv
import io
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

from models.errors import InputError
from models.files import write_text

# What the rows of the results are called: images as they are, reduced, enlarged again, and rebuilt by a DarioNet.
ORIGINAL, SMALL, BASELINE, OURS = "Original", "Small", "Bilinear", "DarioNet"
RESAMPLES = 2000  # of the bootstrap
MEANS = ("cross_entropy", "psnr_db", "ssim", "top5", "agreement")
TEXTS = ("image", "variant", "class", "predicted", "label", "reason", "decision")  # columns; all others are numbers
PREDICTIONS = ("image", "variant", "class", "predicted", "correct")  # what the figures need of predictions.csv
CLASSES = ("variant", "class", "label", "n", "f1")  # and of classes.csv


def require_finite(logits: torch.Tensor, what: str) -> None:
    """Called wherever a class is read off the scores: of those that are not finite argmax would make class 0.

    Raises:
        InputError: not all of the scores on `what`, such as "DarioNet's images", are finite.
    """
    if not torch.isfinite(logits).all():
        raise InputError(f"the scores on {what} are not finite: its weights are damaged")


def summarise(rows: list[dict], seconds: dict[str, float], timed: dict[str, int], seed: int) -> list[dict]:
    """One dictionary per variant, in the order of the rows: the `variants` of results.json.

    Intervals are 95 % percentile intervals of a bootstrap over images, the same images drawn for every variant
    (Efron and Tibshirani 1993, chapter 13). Where a figure has no value it is None.
    """
    by_variant: dict[str, list[dict]] = {}
    if not rows:
        return []
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    correct = {name: np.array([row["correct"] for row in own], dtype=float) for name, own in by_variant.items()}
    accuracy, draws = bootstrap(correct, seed)
    table = []
    for name, own in by_variant.items():
        low, high = interval(draws[name])
        recovered, recovered_low, recovered_high = recovered_fraction(name, accuracy, draws)
        table.append(
            {
                "name": name,
                "n": len(own),
                **{key: mean([row[key] for row in own]) for key in MEANS},
                "accuracy": accuracy[name],
                "accuracy_low": low,
                "accuracy_high": high,
                "recovered": recovered,
                "recovered_low": recovered_low,
                "recovered_high": recovered_high,
                "seconds": seconds[name],
                "images_per_second": timed[name] / max(seconds[name], 1e-9),
            }
        )
    return table


def mean(values: list[float | None]) -> float | None:
    return math.fsum(values) / len(values) if None not in values and all(map(math.isfinite, values)) else None


def bootstrap(correct: dict[str, np.ndarray], seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Accuracy of every variant, and RESAMPLES accuracies of each on images drawn with replacement, paired."""
    n = len(next(iter(correct.values())))
    rng = np.random.default_rng(seed)
    stacked = np.stack(list(correct.values()), 1)
    draws = np.stack([rng.multinomial(n, np.full(n, 1 / n)) @ stacked for _ in range(RESAMPLES)]) / n
    return (
        {name: float(values.mean()) for name, values in correct.items()},
        {name: draws[:, i] for i, name in enumerate(correct)},
    )


def interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def recovered_draws(
    name: str, accuracy: dict[str, float], draws: dict[str, np.ndarray]
) -> tuple[float | None, np.ndarray | None]:
    """(variant - bilinear) / (original - bilinear), and the same of every draw; None where bilinear loses nothing."""
    if name in (ORIGINAL, BASELINE, SMALL) or not {ORIGINAL, BASELINE} <= accuracy.keys():
        return None, None
    lost = accuracy[ORIGINAL] - accuracy[BASELINE]
    if lost <= 0:
        return None, None
    fraction = (accuracy[name] - accuracy[BASELINE]) / lost
    lost_draws = draws[ORIGINAL] - draws[BASELINE]
    if (lost_draws <= 0).any():  # the ratio has no interval where the loss itself may be nothing
        return fraction, None
    return fraction, (draws[name] - draws[BASELINE]) / lost_draws


def recovered_fraction(
    name: str, accuracy: dict[str, float], draws: dict[str, np.ndarray]
) -> tuple[float | None, float | None, float | None]:
    """The recovered fraction with its interval; None where there is none: see recovered_draws."""
    fraction, drawn = recovered_draws(name, accuracy, draws)
    return fraction, *((None, None) if drawn is None else interval(drawn))


def right_or_wrong(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Image -> variant -> 1 where it was read correctly, else 0, in the order of the rows.

    Raises:
        InputError: an image lacks a variant that others have.
    """
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        table.setdefault(row["image"], {})[row["variant"]] = row["correct"]
    variants = {row["variant"]: None for row in rows}
    for image, found in table.items():
        if len(found) < len(variants):
            missing = next(variant for variant in variants if variant not in found)
            raise InputError(f"the predictions are not complete: no row {missing} of the image {image}")
    return table


def mcnemar(rows: list[dict], first: str, second: str) -> dict:
    """McNemar's exact test (1947) of whether two variants are right equally often, on the images where they differ.

    `p` is the two-sided binomial probability of a split at least as uneven as the one found.
    """
    pairs = [(right[first], right[second]) for right in right_or_wrong(rows).values()]
    only_first, only_second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    n = only_first + only_second
    log_choose = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1))
    tail = [
        math.exp(value - n * math.log(2)) for k, value in enumerate(log_choose) if k <= min(only_first, only_second)
    ]
    p = min(1.0, 2 * math.fsum(tail))
    return {"first": first, "second": second, "only_first": only_first, "only_second": only_second, "p": p}


def mcnemar_line(test: dict) -> str:
    """A sentence that says what `mcnemar` found."""
    p = f"p = {test['p']:.2g}" if test["p"] >= 1e-15 else "p < 1e-15"
    return (
        f"{test['first']} alone is right on {test['only_first']} images, "
        f"{test['second']} alone on {test['only_second']}: McNemar's exact test gives {p}."
    )


def decisions(rows: list[dict], ours: str = OURS) -> list[dict]:
    """For every image, whether DarioNet flipped the decision on the bilinear image: the rows of decisions.csv.

    `ours` is DarioNet's variant. What a variant that is not there would say is None.
    """
    names = {(0, 0): "stays wrong", (0, 1): "flipped to right", (1, 0): "flipped to wrong", (1, 1): "stays right"}
    classes = {row["image"]: row["class"] for row in rows}
    return [
        {
            "image": image,
            "class": classes[image],
            "original": right.get(ORIGINAL),
            "bilinear": right.get(BASELINE),
            "darionet": right.get(ours),
            "decision": names.get((right.get(BASELINE), right.get(ours))),
        }
        for image, right in right_or_wrong(rows).items()
    ]


def worst_cases(rows: list[dict], count: int, ours: str = OURS) -> list[str]:
    """Images that the classifier knows in the original and misreads most confidently when rebuilt by DarioNet."""
    known = {row["image"] for row in rows if row["variant"] == ORIGINAL and row["correct"]}
    wrong = [r for r in rows if r["variant"] == ours and not r["correct"] and r["image"] in known]
    return [row["image"] for row in sorted(wrong, key=lambda r: -r["probability"])[:count]]


def per_class(rows: list[dict], class_names: list[str], labels: list[str]) -> list[dict]:
    """Precision, recall and F1 of every class that has test images, for every variant: the rows of classes.csv."""
    indices = {name: i for i, name in enumerate(class_names)}
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        target = torch.tensor([indices[row["class"]] for row in own])
        predicted = torch.tensor([indices[row["predicted"]] for row in own])
        options = {"num_classes": len(class_names), "average": "none"}
        counts = torch.bincount(target, minlength=len(class_names))
        if len(class_names) == 1:  # torchmetrics wants two classes at least
            scores = [torch.ones(1)] * 3
        else:
            scores = [
                f(predicted, target, **options) for f in (multiclass_precision, multiclass_recall, multiclass_f1_score)
            ]
        for i in counts.nonzero()[:, 0].tolist():
            values = dict(zip(("precision", "recall", "f1"), (float(s[i]) for s in scores), strict=True))
            names = {"variant": variant, "index": i, "class": class_names[i], "label": labels[i]}
            table.append(names | {"n": int(counts[i])} | values)
    return table


HEADINGS = (
    "Variant",
    "Accuracy",
    "95 % interval",
    "Top-5",
    "Agreement",
    "Recovered",
    "95 % interval",
    "PSNR dB",
    "SSIM",
)


def table_cells(variants: list[dict]) -> list[list[str]]:
    """The results table as text, a row a variant, a dash where a figure has no value; the columns are HEADINGS."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def between(low: float | None, high: float | None, form: str) -> str:
        return "–" if low is None else f"{low:{form}} to {high:{form}}"

    return [
        [
            v["name"],
            number(v["accuracy"], ".4f"),
            between(v["accuracy_low"], v["accuracy_high"], ".3f"),
            number(v["top5"], ".4f"),
            number(v["agreement"], ".4f"),
            number(v["recovered"], ".1%"),
            between(v["recovered_low"], v["recovered_high"], ".0%"),
            number(v["psnr_db"], ".2f"),
            number(v["ssim"], ".3f"),
        ]
        for v in variants
    ]


def markdown_table(variants: list[dict]) -> str:
    """The results table in Markdown, its columns padded so that it reads well in a terminal too."""
    rows = [list(HEADINGS), *table_cells(variants)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def read_csv(path: Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """What `write_csv` wrote, also where a spreadsheet saved it again: numbers as numbers, empty fields as None.

    Raises:
        InputError: one of the columns `needed` is not there or has an empty field; a row is damaged or cut short.
    """
    contents = path.read_bytes()
    try:
        text = contents.decode("utf-16" if contents[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not in UTF-8: save it as CSV UTF-8, or evaluate again") from None
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)  # a spreadsheet's depends on its language
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows: list[dict] = []
    columns: list[str] = []

    def value(column: str, field: str) -> float | int | str | None:
        if not field and column in needed:
            raise ValueError(f"no {column}")
        if column in TEXTS or not field:
            return field or None
        number = field.replace(",", ".") if separator != "," else field
        with contextlib.suppress(ValueError):
            return int(number)
        with contextlib.suppress(ValueError):
            if math.isfinite(float(number)):
                return float(number)
        raise ValueError(f"{column} is {field[:40]!r}, no number")

    try:
        for fields in reader:
            if not columns:
                columns = fields
                for column in needed:
                    if column not in columns:
                        raise ValueError(f"no column {column}")
            elif any(fields):  # spreadsheets add empty rows
                if len(fields) != len(columns):
                    raise ValueError(f"{len(fields)} fields, not {len(columns)}")
                rows.append({column: value(column, field) for column, field in zip(columns, fields, strict=True)})
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {max(1, reader.line_num)}: {error}; mend it, or evaluate again") from None
    if needed and not rows:
        raise InputError(f"{path}: no rows: evaluate again")
    return rows


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


def log_to_tensorboard(folder: Path, row: dict, strip: Path) -> None:
    """Adds a row of history.csv, and the picture `strip` where it was drawn, to what TensorBoard shows of a run."""
    from torch.utils.tensorboard import SummaryWriter  # no part of requirements.txt

    with SummaryWriter(folder) as writer:
        for key, value in row.items():
            if key != "epoch" and value is not None:
                writer.add_scalar(key, value, row["epoch"])
        if strip.is_file():
            writer.add_image("samples", np.array(Image.open(strip).convert("RGB")), row["epoch"], dataformats="HWC")


def write_json(path: Path, values: object) -> None:
    """Values as JSON, written atomically. NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
