"""The results table, confidence intervals and per-class scores, all from the rows of predictions.csv."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

from models.files import write_text

RESAMPLES = 2000  # of the bootstrap
MEANS = ("cross_entropy", "psnr_db", "ssim", "top5", "agreement")


def summarise(rows: list[dict], seconds: dict[str, float], timed: dict[str, int], seed: int) -> list[dict]:
    """One dictionary per variant, in the order of the rows: the `variants` of results.json.

    Intervals are 95 % percentile intervals of a bootstrap over images, the same images drawn for every variant
    (Efron and Tibshirani 1993, chapter 13). Where a figure has no value it is None.
    """
    by_variant: dict[str, list[dict]] = {}
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
                "images_per_second": timed[name] / seconds[name],
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


def recovered_fraction(
    name: str, accuracy: dict[str, float], draws: dict[str, np.ndarray]
) -> tuple[float | None, float | None, float | None]:
    """(variant - bilinear) / (original - bilinear) with its interval; None where bilinear loses nothing."""
    if name in ("Original", "Bilinear", "Small") or not {"Original", "Bilinear"} <= accuracy.keys():
        return None, None, None
    lost = accuracy["Original"] - accuracy["Bilinear"]
    if lost <= 0:
        return None, None, None
    fraction = (accuracy[name] - accuracy["Bilinear"]) / lost
    lost_draws = draws["Original"] - draws["Bilinear"]
    if (lost_draws <= 0).any():  # the ratio has no interval where the loss itself may be nothing
        return fraction, None, None
    return fraction, *interval((draws[name] - draws["Bilinear"]) / lost_draws)


def mcnemar(rows: list[dict], first: str, second: str) -> dict:
    """McNemar's exact test (1947) of whether two variants are right equally often, on the images where they differ.

    `p` is the two-sided binomial probability of a split at least as uneven as the one found.
    """
    right = {(row["image"], row["variant"]): row["correct"] for row in rows}
    images = {row["image"] for row in rows}
    only_first = sum(right[i, first] > right[i, second] for i in images)
    only_second = sum(right[i, first] < right[i, second] for i in images)
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


def decisions(rows: list[dict]) -> list[dict]:
    """For every image, whether DarioNet flipped the decision on the bilinear image: the rows of decisions.csv."""
    right = {(row["image"], row["variant"]): row["correct"] for row in rows}
    names = {(0, 0): "stays wrong", (0, 1): "flipped to right", (1, 0): "flipped to wrong", (1, 1): "stays right"}
    return [
        {
            "image": row["image"],
            "class": row["class"],
            "original": row["correct"],
            "bilinear": right[row["image"], "Bilinear"],
            "darionet": right[row["image"], "DarioNet"],
            "decision": names[right[row["image"], "Bilinear"], right[row["image"], "DarioNet"]],
        }
        for row in rows
        if row["variant"] == "Original"
    ]


def worst_cases(rows: list[dict], count: int) -> list[str]:
    """Images that the classifier knows in the original and misreads most confidently when rebuilt by DarioNet."""
    known = {row["image"] for row in rows if row["variant"] == "Original" and row["correct"]}
    wrong = [r for r in rows if r["variant"] == "DarioNet" and not r["correct"] and r["image"] in known]
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
            table.append(
                {"variant": variant, "class": class_names[i], "label": labels[i], "n": int(counts[i]), **values}
            )
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


def read_csv(path: Path) -> list[dict]:
    """What `write_csv` wrote: numbers as numbers, empty fields as None."""

    def value(text: str) -> float | int | str | None:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text or None

    with path.open(encoding="utf-8", newline="") as file:
        texts = ("image", "variant", "class", "predicted", "label")
        return [{k: v if k in texts else value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys as a CSV file with a header, written atomically; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, values: object) -> None:
    """Values as JSON, written atomically. NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
