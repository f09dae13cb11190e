import json
import math

import numpy as np
import pytest
import torch

from experiment import metrics
from experiment.evaluation import score


def rows_of(variant: str, correct: list[int], **extra) -> list[dict]:
    base = {"variant": variant, "class": "a", "cross_entropy": 1.0, "psnr_db": 20.0, "ssim": 0.5}
    base |= {"top5": 1, "agreement": 1}
    return [{"image": str(i), "predicted": "ba"[c], "correct": c} | base | extra for i, c in enumerate(correct)]


def table(**correct: list[int]) -> dict[str, dict]:
    rows = [row for variant, values in correct.items() for row in rows_of(variant, values)]
    seconds = dict.fromkeys(correct, 2.0)
    timed = {variant: len(values) for variant, values in correct.items()}
    return {row["name"]: row for row in metrics.summarise(rows, seconds, timed, seed=0)}


def test_recovered_fraction():
    found = table(Original=[1] * 9 + [0], Bilinear=[1] * 4 + [0] * 6, DarioNet=[1] * 8 + [0] * 2)
    assert found["Original"]["accuracy"] == 0.9 and found["Bilinear"]["accuracy"] == 0.4
    assert found["DarioNet"]["recovered"] == pytest.approx((0.8 - 0.4) / (0.9 - 0.4))
    assert found["Original"]["recovered"] is None and found["Bilinear"]["recovered"] is None
    assert found["DarioNet"]["images_per_second"] == 5 and found["DarioNet"]["n"] == 10
    nothing_lost = table(Original=[1, 1, 0], Bilinear=[1, 1, 0], DarioNet=[1, 0, 0])["DarioNet"]
    assert nothing_lost["recovered"] is None and nothing_lost["recovered_low"] is None


def test_bootstrap_interval_is_that_of_a_proportion():
    found = table(Original=[1] * 700 + [0] * 300)["Original"]
    half = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert found["accuracy_low"] == pytest.approx(0.7 - half, abs=0.005)
    assert found["accuracy_high"] == pytest.approx(0.7 + half, abs=0.005)


def test_the_bootstrap_is_paired():
    """A variant that is right on the same images as the original has recovered everything, in every draw."""
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
    nothing = score(logits, torch.tensor([1, 2]), original, images, None)[0]
    assert nothing["psnr_db"] is None and nothing["ssim"] is None
    for height, width in ((10, 16), (16, 10), (1, 1)):  # no window fits
        parts = [x[..., :height, :width] for x in (images, rebuilt)]
        tiny = score(logits, torch.tensor([1, 2]), original, *parts)[0]
        assert tiny["psnr_db"] == pytest.approx(20, abs=1e-3) and tiny["ssim"] is None
    seven = torch.arange(7.0).repeat(2, 1)
    assert [row["top5"] for row in score(seven, torch.tensor([2, 1]), seven, images, None)] == [1, 0]


def window_by_window(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, section III B, in float64: the mean over every 11 x 11 window that lies within (3,H,W)."""
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    found = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        for i, j in np.ndindex(x.shape[0] - 10, x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            covariance = (weights * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
            found.append(luminance * (2 * covariance + 0.03**2) / (vp + vq + 0.03**2))
    return float(np.mean(found))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 30), (24, 17)])
def test_ssim_is_that_of_the_field(height, width):
    """Borders are neither reflected nor averaged in, at any size and in any batch."""
    generator = torch.Generator().manual_seed(height)
    images = torch.rand(3, 3, height, width, generator=generator)
    noise = 0.3 * torch.rand(images.shape, generator=generator) * torch.linspace(0, 1, width)
    rebuilt = (images + noise).clamp(0, 1)
    expected = [window_by_window(a, b) for a, b in zip(images.numpy(), rebuilt.numpy(), strict=True)]
    assert metrics.ssim(rebuilt, images).tolist() == pytest.approx(expected, abs=2e-6)
    assert metrics.ssim(images, images).tolist() == pytest.approx([1, 1, 1])


def test_per_class_scores():
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "c")]
    rows = [{"variant": "Original", "class": c, "predicted": p} for c, p in pairs]
    a, b = metrics.per_class(rows, ["a", "b", "c"], ["ant", "bee", "cow"])
    assert (a["label"], a["n"], a["precision"]) == ("ant", 3, 1)
    assert a["recall"] == pytest.approx(2 / 3) and a["f1"] == pytest.approx(0.8)
    assert (b["precision"], b["recall"]) == (0.5, 0.5)
    (only,) = metrics.per_class([{"variant": "Original", "class": "a", "predicted": "a"}] * 3, ["a"], ["ant"])
    assert (only["n"], only["f1"]) == (3, 1)


def test_table_shows_dashes_for_what_has_no_value():
    """And leaves out the columns that have none."""
    found = table(Original=[1, 0, 1], Bilinear=[1, 0, 0], DarioNet=[1, 0, 1])
    text = metrics.markdown_table(list(found.values()))
    assert "nan" not in text.lower() and "None" not in text and "–" in text
    assert "PSNR dB" in text and "Recovered" in text
    without = metrics.markdown_table([row | {"psnr_db": None, "recovered": None} for row in found.values()])
    assert "PSNR dB" not in without and "Recovered" not in without and "Accuracy" in without
    assert len({len(line) for line in text.splitlines()}) == 1


def test_files_hold_null_and_no_nan(tmp_path):
    metrics.write_json(tmp_path / "r.json", {"psnr_db": None})
    with pytest.raises(ValueError, match="JSON"):
        metrics.write_json(tmp_path / "r.json", {"psnr_db": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"psnr_db": None}
    metrics.write_csv(tmp_path / "r.csv", [{"image": "a\udcff,b.png", "psnr_db": None}])
    assert (tmp_path / "r.csv").read_bytes() == b'image,psnr_db\r\n"a\\udcff,b.png",\r\n'


def pair(only_first: int, only_second: int, both: int = 3) -> list[dict]:
    first = [1] * only_first + [0] * only_second + [1] * both
    second = [0] * only_first + [1] * only_second + [1] * both
    return rows_of("DarioNet", first) + rows_of("Bilinear", second)


PAIRS = [(10, 2, 79 / 2**11), (2, 10, 79 / 2**11), (5, 5, 1), (0, 0, 1), (1, 0, 1), (6, 0, 2 / 64)]


@pytest.mark.parametrize(("only_first", "only_second", "p"), PAIRS)
def test_mcnemar(only_first, only_second, p):
    found = metrics.mcnemar(pair(only_first, only_second), "DarioNet", "Bilinear")
    assert (found["only_first"], found["only_second"]) == (only_first, only_second)
    assert found["p"] == pytest.approx(p)


def test_mcnemar_of_many_images():
    """Against the normal approximation, where that is good."""
    found = metrics.mcnemar(pair(5200, 4800), "DarioNet", "Bilinear")
    assert found["p"] == pytest.approx(math.erfc((400 - 1) / 10000**0.5 / 2**0.5), rel=0.01)
    assert "p < 1e-15" in metrics.mcnemar_line(metrics.mcnemar(pair(3000, 10), "DarioNet", "Bilinear"))


def test_worst_cases():
    rows = rows_of("Original", [1, 1, 1, 1, 0]) + rows_of("Bilinear", [0, 1, 0, 1, 0])
    rows += rows_of("DarioNet", [1, 0, 0, 1, 0]) + rows_of("Other", [1, 1, 1, 1, 0])
    for row in rows:
        row["probability"] = 0.5 + 0.1 * int(row["image"])
    assert metrics.worst_cases(rows, 5) == ["2", "1"]  # 4 was wrong in the original too
    assert metrics.worst_cases(rows, 1) == ["2"]
    assert metrics.worst_cases(rows, 5, "Other") == []


@pytest.mark.parametrize("correct", [[1], [0], [1, 1, 1], [0, 0, 0]])
def test_one_image_all_right_and_all_wrong(tmp_path, correct):
    found = table(Original=correct, Bilinear=correct, DarioNet=correct)
    metrics.write_json(tmp_path / "r.json", list(found.values()))  # no NaN
    assert found["DarioNet"]["accuracy"] == correct[0] and found["DarioNet"]["recovered"] is None
    assert metrics.mcnemar(pair(0, 0, len(correct)), "DarioNet", "Bilinear")["p"] == 1
