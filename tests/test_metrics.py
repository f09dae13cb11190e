import json
import math

import numpy as np
import pytest
import torch

from experiment.evaluation import score
from experiment.metrics import (
    HEADINGS,
    decisions,
    markdown_table,
    mcnemar,
    mcnemar_line,
    per_class,
    read_csv,
    recovered_fraction,
    summarise,
    worst_cases,
    write_csv,
    write_json,
)


def rows_of(variant: str, correct: list[int], **extra) -> list[dict]:
    base = {"cross_entropy": 1.0, "psnr_db": 20.0, "ssim": 0.5, "top5": 1, "agreement": 1}
    return [
        {
            "image": str(i),
            "variant": variant,
            "class": "a",
            "predicted": "a" if c else "b",
            "correct": c,
            **base,
            **extra,
        }
        for i, c in enumerate(correct)
    ]


def table(**correct: list[int]) -> dict[str, dict]:
    rows = [row for variant, values in correct.items() for row in rows_of(variant, values)]
    seconds = dict.fromkeys(correct, 2.0)
    timed = {variant: len(values) for variant, values in correct.items()}
    return {row["name"]: row for row in summarise(rows, seconds, timed, seed=0)}


def test_recovered_fraction():
    found = table(Original=[1] * 9 + [0], Bilinear=[1] * 4 + [0] * 6, DarioNet=[1] * 8 + [0] * 2)
    assert found["Original"]["accuracy"] == 0.9 and found["Bilinear"]["accuracy"] == 0.4
    assert found["DarioNet"]["recovered"] == pytest.approx((0.8 - 0.4) / (0.9 - 0.4))
    assert found["Original"]["recovered"] is None and found["Bilinear"]["recovered"] is None
    assert found["DarioNet"]["images_per_second"] == 5 and found["DarioNet"]["n"] == 10


def test_published_figure():
    accuracy = {"Original": 0.7676, "Bilinear": 0.5446, "DarioNet": 0.7275}
    draws = {name: np.full(3, value) for name, value in accuracy.items()}
    assert recovered_fraction("DarioNet", accuracy, draws)[0] == pytest.approx(0.820, abs=5e-4)


def test_recovered_fraction_where_bilinear_loses_nothing():
    found = table(Original=[1, 1, 0], Bilinear=[1, 1, 0], DarioNet=[1, 0, 0])
    assert found["DarioNet"]["recovered"] is None and found["DarioNet"]["recovered_low"] is None


def test_bootstrap_interval_is_that_of_a_proportion():
    found = table(Original=[1] * 700 + [0] * 300)["Original"]
    half = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert found["accuracy_low"] == pytest.approx(0.7 - half, abs=0.005)
    assert found["accuracy_high"] == pytest.approx(0.7 + half, abs=0.005)


def test_the_bootstrap_is_paired():
    """A variant that is right exactly where the original is has recovered everything, in every draw."""
    right = [1] * 600 + [0] * 400
    found = table(Original=right, Bilinear=[1] * 300 + [0] * 700, DarioNet=right)["DarioNet"]
    assert (found["recovered"], found["recovered_low"], found["recovered_high"]) == (1, 1, 1)


def test_scores_of_one_batch():
    images = torch.rand(2, 3, 16, 16)
    rebuilt = images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    logits = torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    original = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    first, second = score(logits, torch.tensor([1, 2]), original, images, rebuilt)
    assert (first["correct"], first["agreement"], first["top5"]) == (1, 1, 1)
    assert (second["correct"], second["agreement"], second["prediction"]) == (0, 0, 0)
    assert first["psnr_db"] == pytest.approx(20, abs=1e-3) and second["psnr_db"] == pytest.approx(40, abs=1e-2)
    assert first["probability"] == pytest.approx(np.exp(2) / (np.exp(2) + 2))
    assert second["cross_entropy"] == pytest.approx(5 + np.log1p(2 * np.exp(-5)))
    assert first["ssim"] < second["ssim"] < 1
    same = score(logits, torch.tensor([1, 2]), original, images, images)[0]
    assert same["psnr_db"] is None and same["ssim"] is None
    assert score(logits, torch.tensor([1, 2]), original, images, images[..., :9, :9])[0]["psnr_db"] is None


def test_top5_counts_five():
    logits = torch.arange(7.0).repeat(2, 1)
    first, second = score(logits, torch.tensor([2, 1]), logits, logits, logits)
    assert (first["top5"], second["top5"]) == (1, 0)


def test_per_class_scores():
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "c")]
    rows = [{"variant": "Original", "class": c, "predicted": p} for c, p in pairs]
    a, b = per_class(rows, ["a", "b", "c"], ["ant", "bee", "cow"])
    assert (a["label"], a["n"], a["precision"]) == ("ant", 3, 1)
    assert a["recall"] == pytest.approx(2 / 3) and a["f1"] == pytest.approx(0.8)
    assert (b["precision"], b["recall"]) == (0.5, 0.5)


def test_table_shows_dashes_for_what_has_no_value():
    found = table(Original=[1, 0, 1], Bilinear=[1, 0, 0])
    text = markdown_table(list(found.values()))
    assert "nan" not in text.lower() and "None" not in text and "–" in text
    assert all(heading in text for heading in HEADINGS)
    assert len({len(line) for line in text.splitlines()}) == 1


def test_files_hold_null_and_no_nan(tmp_path):
    write_json(tmp_path / "r.json", {"psnr_db": None})
    assert json.loads((tmp_path / "r.json").read_text()) == {"psnr_db": None}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"psnr_db": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"psnr_db": None}
    write_csv(tmp_path / "r.csv", [{"image": "a\udcff,b.png", "psnr_db": None}])
    assert (tmp_path / "r.csv").read_bytes() == b'image,psnr_db\r\n"a\\udcff,b.png",\r\n'


def pair(only_first: int, only_second: int, both: int = 3) -> list[dict]:
    first = [1] * only_first + [0] * only_second + [1] * both
    second = [0] * only_first + [1] * only_second + [1] * both
    return rows_of("DarioNet", first) + rows_of("Bilinear", second)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (5, 5, 1),
        (0, 0, 1),
        (1, 0, 1),
        (6, 0, 2 / 64),
    ],
)
def test_mcnemar(only_first, only_second, p):
    found = mcnemar(pair(only_first, only_second), "DarioNet", "Bilinear")
    assert (found["only_first"], found["only_second"]) == (only_first, only_second)
    assert found["p"] == pytest.approx(p)


def test_mcnemar_of_many_images():
    """Against the normal approximation, where that is good."""
    found = mcnemar(pair(5200, 4800), "DarioNet", "Bilinear")
    z = (400 - 1) / 10000**0.5
    assert found["p"] == pytest.approx(math.erfc(z / 2**0.5), rel=0.01)
    assert "p = " in mcnemar_line(found)
    assert "p < 1e-15" in mcnemar_line(mcnemar(pair(3000, 10), "DarioNet", "Bilinear"))


def test_decisions_and_worst_cases():
    rows = rows_of("Original", [1, 1, 1, 1, 0]) + rows_of("Bilinear", [0, 1, 0, 1, 0])
    rows += rows_of("DarioNet", [1, 0, 0, 1, 0])
    for row in rows:
        row["probability"] = 0.5 + 0.1 * int(row["image"])
    names = [row["decision"] for row in decisions(rows)]
    assert names == ["flipped to right", "flipped to wrong", "stays wrong", "stays right", "stays wrong"]
    assert worst_cases(rows, 5) == ["2", "1"]  # 4 was wrong in the original too
    assert worst_cases(rows, 1) == ["2"]


def test_csv_round_trip(tmp_path):
    rows = [{"image": "7.png", "class": "12", "correct": 1, "psnr_db": 20.5, "ssim": None}]
    write_csv(tmp_path / "r.csv", rows)
    assert read_csv(tmp_path / "r.csv") == rows
