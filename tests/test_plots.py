"""The figures stay readable with few classes and with a thousand: drawn from simulated results, and measured."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiment import plots


def simulated(classes: int, per_class: int) -> tuple[list[dict], list[dict]]:
    """Rows of predictions.csv and classes.csv with plausible accuracies."""
    rng = np.random.default_rng(0)
    rows, table = [], []
    skill = rng.beta(6, 2, classes)
    for variant, factor in (("Original", 1.0), ("Bilinear", 0.55), ("Pixels", 0.6), ("DarioNet", 0.9)):
        for c in range(classes):
            right = rng.random(per_class) < skill[c] * factor
            rows += [{"image": f"c{c}/{i}", "variant": variant, "correct": int(r)} for i, r in enumerate(right)]
            label = f"a class with a rather long name {c}"
            table.append({"variant": variant, "class": f"c{c}", "label": label, "f1": float(right.mean())})
    return rows, table


@pytest.mark.parametrize(("classes", "per_class"), [(10, 30), (1000, 3)])
def test_figures_of_few_and_of_many_classes(tmp_path, classes, per_class):
    rows, table = simulated(classes, per_class)
    plots.f1_difference(table, tmp_path / "f1_difference.png")
    plots.f1_density(table, tmp_path / "f1_density.png")
    plots.class_bars(table, tmp_path / "classes.png")
    plots.decision_strip(rows, tmp_path / "decisions.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert 300 < image.width < 2500 and 200 < image.height < 1500, path.name
        assert (pixels < 128).mean() < 0.6 and (pixels < 250).mean() > 0.02, path.name


def test_saved_atomically(tmp_path, monkeypatch):
    plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", no_space)
    with pytest.raises(OSError, match="No space"):
        plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
