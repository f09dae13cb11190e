"""The figures stay readable with few classes and with a thousand: drawn from simulated results, and measured."""

import warnings

import numpy as np
import pytest
import torch
from conftest import python
from matplotlib.text import Text
from PIL import Image

from experiment import plots
from experiment.metrics import COLUMNS


def class_rows(names: list[str], n: int = 20, **f1: list[float]) -> list[dict]:
    return [{"variant": v, "class": c, "label": c, "n": n, "f1": f1[v][i]} for i, c in enumerate(names) for v in f1]


def draw_results(folder, classes: list[dict], shares: dict[str, float], images: int) -> None:
    """The figures of an evaluation in which each variant is right on a share of the images."""
    chance = np.random.default_rng(0)
    plots.f1_difference(classes, folder / "f1_difference.png")
    plots.class_bars(classes, folder / "classes.png")
    rows = []
    for variant, share in shares.items():
        right = chance.random(images) < share
        rows += [{"image": str(i), "variant": variant, "correct": int(one)} for i, one in enumerate(right)]
    plots.decision_strip(rows, folder / "decisions.png")


@pytest.mark.parametrize(("classes", "per_class"), [(10, 30), (1000, 3)])
def test_figures_of_few_and_of_many_classes(tmp_path, classes, per_class):
    chance, shares = np.random.default_rng(0), {"Original": 0.75, "Bilinear": 0.4, "Pixels": 0.45, "DarioNet": 0.7}
    f1 = {variant: chance.binomial(per_class, share, classes) / per_class for variant, share in shares.items()}
    names = [f"a class with a rather long name {c}" for c in range(classes)]
    draw_results(tmp_path, class_rows(names, n=per_class, **f1), shares, classes * per_class)
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert 300 < image.width < 2500 and 200 < image.height < 1500, path.name
        assert (pixels < 128).mean() < 0.6 and (pixels < 250).mean() > 0.02, path.name


def small_grid(path) -> None:
    plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, path)


@pytest.fixture
def texts(monkeypatch) -> set[str]:
    """What the figures drawn in a test say; warnings are errors."""
    found: set[str] = set()
    draw = Text.draw

    def recording(self, *arguments, **options):
        found.add(self.get_text())
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Text, "draw", recording)
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 50)  # sooner
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


AWKWARD = ["$10_to_$20", "a$b$c", r"$\frac{1}{", r"\alpha_{2}^3", "x_$_y^", "#1 & 50 %", "{0}", "<b>&amp;", "~"]
SCRIPTS = ["\u043a\u043e\u0442", "\u0642\u0637\u0629", "cafe\u0301", "\u732b", "\ud55c\uad6d", "\U0001f9a5", "a\tb"]


def test_names_are_shown_as_they_are(tmp_path, texts):
    """Nothing is a formula, a mark-up or a format; what no font has is no error; what is no text is shown as codes.

    Every figure, with these names in every place that takes one.
    """
    names, ours, image = [*AWKWARD, *SCRIPTS, "a\udcff"], "$x$_net.pt", torch.rand(3, 16, 16)
    f1 = {"Original": [0.9] * len(names), "Bilinear": [0.2] * len(names), ours: [0.5] * len(names)}
    classes = class_rows(names, **f1)
    plots.f1_difference(classes, tmp_path / "f1_difference.png", ours)
    plots.class_bars(classes, tmp_path / "classes.png", count=20, ours=ours)
    rows = [{"image": n, "variant": v, "correct": 1} for n in names for v in ("Original", ours, "Bilinear")]
    plots.decision_strip(rows, tmp_path / "decisions.png", ours)
    few = names[:2]  # images are slow to draw
    plots.image_grid({name: [image] for name in few}, [[(n, "red") for n in few]], tmp_path / "grid.png")
    plots.image_grid({names[0]: [image] * 2}, None, tmp_path / "scales.png", few)
    plots.panels([(name, image, name) for name in few], 2, tmp_path / "panels.png")
    plots.pipeline_figure([(name, image) for name in few], [(n, 0.5) for n in names], tmp_path / "pipeline.png")
    keys = [key for _, form, *keys in COLUMNS for key in keys if form]
    variants = [{"name": name} | dict.fromkeys(keys, 0.5) for name in [*names, ours]]
    plots.results_table(variants, f"in {names[0]}", tmp_path / "table.png", ours)
    drawn = [(name, tmp_path / "table.png") for name in names]
    plots.report(names[0], "\n".join(names), {"data": {"test": names[0]}}, drawn, tmp_path / "report.pdf")
    assert {*AWKWARD, *SCRIPTS, r"a\udcff", ours} <= texts and len(list(tmp_path.iterdir())) == 9


@pytest.mark.parametrize("top", [1.5, 1000, 0.0, None, float("nan")])
def test_curves_of_any_history(tmp_path, texts, top):
    keys = ("train_loss", "val_loss", "train_psnr_db", "val_psnr_db", "val_accuracy", "val_agreement")
    for length in (0, 1, 3):
        history = [{"epoch": e} | dict.fromkeys(keys) | {"train_loss": top and top / e} for e in range(1, length + 1)]
        plots.training_curves(history, tmp_path / "curves.png")
    assert {"loss", "PSNR (dB)", "share of validation images", "epoch"} <= texts


WITHOUT_A_SCREEN = """
import sys
import experiment.evaluation
import torch
from pathlib import Path
from experiment import plots
assert "matplotlib" not in sys.modules
plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, Path("a.png"))
plots.show_window(Path("a.png"))
"""


def test_a_program_that_draws_nothing_starts_without_matplotlib(tmp_path, monkeypatch):
    """MPLBACKEND may name a module that is absent: figures are files."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    result = python(WITHOUT_A_SCREEN, tmp_path, MPLBACKEND="module://matplotlib_absent.backend_inline")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "a.png").is_file()


def test_a_window_where_there_is_a_screen(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "qtagg")
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().get_size_inches().tolist()))
    small_grid(tmp_path / "a.png")
    plots.show_window(tmp_path / "a.png")
    plt.close("all")
    assert len(shown) == 1 and shown[0][0] > 1


def test_one_image_per_class(tmp_path, texts):
    """Ties are said, and how much is chance."""
    names = [f"c{i}" for i in range(12)]
    classes = class_rows(names, n=1, Original=[1.0] * 12, Bilinear=[0.0] * 12, DarioNet=[0.0] * 12)
    note = "1 test image per class: a recall may be off by up to 0.98 by chance (95 %)"
    plots.f1_difference(classes, tmp_path / "f1.png")
    assert note in texts
    texts.clear()
    plots.class_bars(classes, tmp_path / "f1.png")
    assert {note, "hardest\n2 more tie with the last", "most improved over bilinear\nno class is", "c0"} <= texts
    for row, n in zip(classes, [30, 40] * 18, strict=True):
        row["n"] = n
    assert plots.sample_note(classes).startswith("30 to 40 test images per class: a recall may be off by up to 0.18")


@pytest.mark.parametrize("f1", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_few_classes_all_right_and_all_wrong(tmp_path, texts, f1, names):
    variants = ("Original", "Bilinear", "DarioNet")
    classes = class_rows(names, n=1, **{variant: [f1] * len(names) for variant in variants})
    draw_results(tmp_path, classes, dict.fromkeys(variants, int(f1)), 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_report_of_many_lines(tmp_path, texts):
    """Long lines are broken and long lists turned over, not cut off at the paper's edge."""
    rng = np.random.default_rng(0)
    parameters = {"section": {f"key_{i}": "".join(rng.choice([*"qxz"], 250)) for i in range(40)}}
    plots.report("title", "a " * 300, parameters, [], tmp_path / "report.pdf")
    assert sum(text.count(letter) for text in texts for letter in "qxz") == 40 * 250 and max(map(len, texts)) < 110
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page ") >= 3
