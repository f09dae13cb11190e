import contextlib
import json
import math

import numpy as np
import pytest
import torch

from experiment.evaluation import score
from experiment.metrics import (
    CLASSES,
    HEADINGS,
    PREDICTIONS,
    decisions,
    markdown_table,
    mcnemar,
    mcnemar_line,
    per_class,
    read_csv,
    recovered_fraction,
    require_finite,
    summarise,
    worst_cases,
    write_csv,
    write_json,
)
from models.errors import InputError


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
    nothing = score(logits, torch.tensor([1, 2]), original, images, None)[0]
    assert nothing["psnr_db"] is None and nothing["ssim"] is None
    tiny = score(logits, torch.tensor([1, 2]), original, images[..., :9, :9], rebuilt[..., :9, :9])[0]
    assert tiny["psnr_db"] == pytest.approx(20, abs=1e-3) and tiny["ssim"] is None


def structural_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, section III B, in float64, window by window: every 11 x 11 window that lies within the image.

    (3,H,W) in [0,1]; a circular Gaussian of 1.5 pixels; the mean over windows and channels.
    """
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    found = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                covariance = (weights * (p - mp) * (q - mq)).sum()
                luminance = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
                found.append(luminance * (2 * covariance + 0.03**2) / (vp + vq + 0.03**2))
    return float(np.mean(found))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 30), (24, 17), (32, 32)])
def test_ssim_is_that_of_the_field(height, width):
    """Borders are neither reflected nor averaged in, at any size and in any batch."""
    generator = torch.Generator().manual_seed(height)
    images = torch.rand(3, 3, height, width, generator=generator)
    rebuilt = (images + 0.3 * torch.rand(images.shape, generator=generator) * torch.linspace(0, 1, width)).clamp(0, 1)
    logits = torch.zeros(3, 2)
    found = [row["ssim"] for row in score(logits, torch.zeros(3, dtype=torch.int64), logits, images, rebuilt)]
    expected = [structural_similarity(a, b) for a, b in zip(images.numpy(), rebuilt.numpy(), strict=True)]
    assert found == pytest.approx(expected, abs=2e-6)
    with contextlib.suppress(ImportError):
        from skimage.metrics import structural_similarity as reference

        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        a, b = images[0].double().numpy(), rebuilt[0].double().numpy()
        assert found[0] == pytest.approx(reference(a, b, channel_axis=0, **options), abs=2e-6)


def test_ssim_counts_a_corner_once():
    """A fault in a corner lies in one window of a 12 x 12 image's four."""
    images = torch.full((1, 3, 12, 12), 0.5)
    rebuilt = images.clone()
    rebuilt[..., 0, 0] = 1.0
    logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    found = score(logits, target, logits, images, rebuilt)[0]["ssim"]
    assert found == pytest.approx(structural_similarity(images[0].numpy(), rebuilt[0].numpy()), abs=2e-5)
    assert found > 0.9998  # with reflected borders it is in most windows


@pytest.mark.parametrize(("height", "width"), [(10, 10), (10, 64), (64, 10), (1, 1)])
def test_no_ssim_where_no_window_fits(height, width):
    images = torch.rand(1, 3, height, width)
    logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    row = score(logits, target, logits, images, images / 2)[0]
    assert row["ssim"] is None and row["psnr_db"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 9)])
def test_scores_that_are_not_finite(value, place):
    logits = torch.zeros(4, 10)
    require_finite(logits, "DarioNet's images")
    logits[place] = value
    with pytest.raises(InputError, match="^the scores on DarioNet's images are not finite: its weights are damaged$"):
        require_finite(logits, "DarioNet's images")


def test_top5_counts_five():
    logits = torch.arange(7.0).repeat(2, 1)
    first, second = score(logits, torch.tensor([2, 1]), logits, torch.rand(2, 3, 4, 4), None)
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


def predictions(path):
    rows = rows_of("Original", [1, 0, 1], probability=0.25) + rows_of("DarioNet", [1, 1, 0], probability=0.75)
    write_csv(path, rows)
    return rows


@pytest.mark.parametrize(
    ("separator", "encoding"),
    [(",", "utf-8-sig"), (";", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16"), (",", "utf-8")],
)
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_csv_that_a_spreadsheet_saved_again(tmp_path, separator, encoding, end):
    """A byte order mark, its language's separator and decimal comma, empty rows, no last line end."""
    rows = predictions(tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_bytes().decode().replace("\r\n", end)
    if separator != ",":
        text = text.replace(",", separator).replace("0.", "0,")
    text += separator * 10 + end + end
    for contents in (text, text.rstrip(separator + end)):
        (tmp_path / "p.csv").write_bytes(contents.encode(encoding))
        assert read_csv(tmp_path / "p.csv", PREDICTIONS) == rows


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("2,DarioNet,a", ["line 7", "3 fields, not 11"]),
        ("2,DarioNet,a,a,one,1.0,20.0,0.5,1,1,0.75", ["line 7", "correct is 'one', no number"]),
        ("2,DarioNet,a,a,,1.0,20.0,0.5,1,1,0.75", ["line 7", "no correct"]),
        ("2,,a,a,1,1.0,20.0,0.5,1,1,0.75", ["line 7", "no variant"]),
        ("2,DarioNet,a,a,1,1.0,nan,0.5,1,1,0.75", ["line 7", "psnr_db is 'nan'"]),
        ("2,DarioNet,a,a,1,1.0,20.0,0.5,1,1,0.75,6", ["line 7", "12 fields, not 11"]),
        ('"2,DarioNet,a,a,1,1.0', ["line 7", "1 fields, not 11"]),
    ],
)
def test_a_damaged_row_is_named(tmp_path, line, parts):
    predictions(tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    (tmp_path / "p.csv").write_text("\n".join([*lines[:-1], line]))
    with pytest.raises(InputError) as error:
        read_csv(tmp_path / "p.csv", PREDICTIONS)
    for part in [str(tmp_path / "p.csv"), *parts]:
        assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("contents", "part"),
    [
        (b"", "no rows"),
        (b"image,variant,class,correct\r\n", "line 1: no column predicted"),
        (b"image,variant,class,predicted,correct\r\n", "no rows"),
        (b"image,variant,class,predicted,correct\n\xe9.png,Original,a,a,1\n", "not in UTF-8"),
        (b"\x00\x01\x02", "no column image"),
    ],
)
def test_files_that_are_no_predictions(tmp_path, contents, part):
    (tmp_path / "p.csv").write_bytes(contents)
    with pytest.raises(InputError, match=part):
        read_csv(tmp_path / "p.csv", PREDICTIONS)


def test_any_cut_of_the_predictions(tmp_path):
    """Wherever the file ends: the same rows, fewer whole rows that are then missed, or one line."""
    rows = predictions(tmp_path / "p.csv")
    contents = (tmp_path / "p.csv").read_bytes()
    outcomes = set()
    for length in range(len(contents)):
        (tmp_path / "p.csv").write_bytes(contents[:length])
        try:
            found = read_csv(tmp_path / "p.csv", PREDICTIONS)
            decisions(found)
            outcomes.add(len(found))
            assert [r["correct"] for r in found] == [r["correct"] for r in rows[: len(found)]]
        except InputError as error:
            assert "\n" not in str(error)
    assert outcomes == {1, 2, 3, 6}  # of one variant alone, and all


def test_incomplete_predictions_are_named():
    rows = rows_of("Original", [1, 0]) + rows_of("Bilinear", [1])
    with pytest.raises(InputError, match="no row Bilinear of the image 1"):
        decisions(rows)


def test_two_darionets_in_one_table():
    found = table(Original=[1] * 4, Bilinear=[0] * 4, A=[1, 0, 0, 0], B=[1, 1, 1, 0])
    assert (found["A"]["recovered"], found["B"]["recovered"]) == (0.25, 0.75)
    rows = rows_of("Original", [1, 1]) + rows_of("Bilinear", [0, 1])
    rows += rows_of("A", [1, 0], probability=0.9) + rows_of("B", [0, 1], probability=0.9)
    assert [row["decision"] for row in decisions(rows, "A")] == ["flipped to right", "flipped to wrong"]
    assert [row["decision"] for row in decisions(rows, "B")] == ["stays wrong", "stays right"]
    assert (worst_cases(rows, 5, "A"), worst_cases(rows, 5, "B"), worst_cases(rows, 5)) == (["1"], ["0"], [])


@pytest.mark.parametrize("left_out", ["Original", "Bilinear", "DarioNet"])
def test_decisions_where_a_variant_is_missing(left_out):
    rows = [r for v in ("Original", "Bilinear", "DarioNet") if v != left_out for r in rows_of(v, [1, 0], probability=1)]
    found = decisions(rows)
    assert [row[left_out.lower()] for row in found] == [None, None]
    assert [row["decision"] for row in found] == (
        [None] * 2 if left_out != "Original" else ["stays right", "stays wrong"]
    )
    assert worst_cases(rows, 3) == []


@pytest.mark.parametrize("correct", [[1], [0], [1, 1, 1], [0, 0, 0]])
def test_one_image_all_right_and_all_wrong(tmp_path, correct):
    found = table(Original=correct, Bilinear=correct, DarioNet=correct)
    write_json(tmp_path / "r.json", list(found.values()))  # no NaN
    assert found["DarioNet"]["accuracy"] == correct[0] and found["DarioNet"]["recovered"] is None
    assert mcnemar(pair(0, 0, len(correct)), "DarioNet", "Bilinear")["p"] == 1


def test_nothing_at_all(tmp_path):
    assert summarise([], {}, {}, 0) == [] and decisions([]) == [] and per_class([], ["a"], ["a"]) == []
    write_csv(tmp_path / "r.csv", [])
    assert read_csv(tmp_path / "r.csv") == []
    assert markdown_table([]).count("|") > 0


def test_one_class():
    rows = [{"variant": "Original", "class": "a", "predicted": "a"}] * 3
    found = per_class(rows, ["a"], ["ant"])
    assert [(row["n"], row["f1"]) for row in found] == [(3, 1)] and set(CLASSES) <= found[0].keys()
