"""The figures stay readable with few classes and with a thousand: drawn from simulated results, and measured."""

import os
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import Image

from experiment import plots
from models.errors import InputError


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
            row = {"variant": variant, "index": c, "class": f"c{c}", "label": label, "n": per_class}
            table.append(row | {"f1": float(right.mean())})
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


@pytest.fixture
def texts(monkeypatch) -> set[str]:
    """What the figures drawn in a test say."""
    found: set[str] = set()
    draw = Text.draw

    def recording(self, *arguments, **options):
        found.add(self.get_text())
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Text, "draw", recording)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 50)  # sooner
    return found


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def class_rows(names: list[str], labels: list[str], n: int = 20, **f1: list[float]) -> list[dict]:
    rows = zip(range(len(names)), names, labels, strict=True)
    return [
        {"variant": v, "index": i, "class": c, "label": name, "n": n, "f1": f1[v][i]} for i, c, name in rows for v in f1
    ]


def draw_all(folder, names: list[str], ours: str = "DarioNet") -> None:
    """Every figure with these names in every place that takes one."""
    image = torch.rand(3, 16, 16)
    f1 = {"Original": [0.9] * len(names), "Bilinear": [0.2] * len(names), ours: [0.5] * len(names)}
    classes = class_rows(names, names, **f1)
    plots.f1_difference(classes, folder / "f1_difference.png", ours)
    plots.f1_density(classes, folder / "f1_density.png", ours)
    plots.class_bars(classes, folder / "classes.png", ours=ours)
    rows = [{"image": n, "variant": v, "class": n, "correct": 1} for n in names for v in ("Original", ours, "Bilinear")]
    plots.decision_strip(rows, folder / "decisions.png", ours)
    few = names[:2]  # images are slow to draw
    plots.image_grid({name: [image] for name in few}, [[(n, "red") for n in few]], folder / "grid.png")
    plots.scales([(name, [image]) for name in few], [names[0]], folder / "scales.png")
    plots.panels([(name, image, name) for name in few], 2, folder / "panels.png")
    plots.pipeline_figure([(name, image) for name in few], [(n, 0.5) for n in names], folder / "pipeline.png")
    figures = ("accuracy", "accuracy_low", "accuracy_high", "top5", "agreement", "recovered", "recovered_low")
    figures += ("recovered_high", "psnr_db", "ssim")
    variants = [{"name": name} | dict.fromkeys(figures, 0.5) for name in [*names, ours]]
    plots.results_table(variants, f"in {names[0]}", folder / "table.png", ours)
    drawn = [(name, folder / "table.png") for name in names]
    plots.report(names[0], "\n".join(names), {"data": {"test": names[0]}}, drawn, folder / "report.pdf")


def test_the_line_under_the_last_row_is_whole(tmp_path):
    notes = ["Photograph: somebody with quite a long name, CC BY 2.0, example.org/a/page/with/a/long/address"] * 2
    few = {"a": [torch.full((3, 8, 8), 0.9)] * 2, "b": [torch.full((3, 8, 8), 0.9)] * 2}
    plots.image_grid(few, [[("x", "red")] * 2] * 2, tmp_path / "a.png", notes)
    ink = np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 128
    rows = np.flatnonzero(ink.any(axis=1))
    assert len(ink) - rows[-1] > 10 and not ink[:, -5:].any()  # a margin below the letters and beside them
    assert ink[rows[-1] - 25 : rows[-1] + 1, :400].sum() > 500


AWKWARD = [
    "$10_to_$20",
    "a$b$c",
    r"$\frac{1}{",
    r"\alpha_{2}^3",
    "x_$_y^",
    "#1 & 50 %",
    "_underscore",
    "{0}",
    "<b>&amp;",
    "~",
]


def test_names_are_shown_as_they_are(tmp_path, texts, no_warnings):
    """Nothing is a formula, a mark-up or a format: in titles, ticks, legends, annotations, tables and the report."""
    draw_all(tmp_path, AWKWARD, ours="$x$_net.pt")
    for name in AWKWARD:
        assert {name, f"1= {name}"} <= texts, name  # as a title and as a tick
    assert "$x$_net.pt" in texts and len(list(tmp_path.iterdir())) == 10


def test_a_logarithmic_axis_without_formulas(tmp_path, texts, no_warnings):
    for top in (1.5, 1000):
        history = [{"epoch": e, "train_loss": top / e, "val_loss": 1.0} for e in (1, 2, 3)]
        for row in history:
            row |= dict.fromkeys(("train_psnr_db", "val_psnr_db", "val_accuracy", "val_agreement"))
        plots.training_curves(history, tmp_path / "curves.png")
    assert {"1", "10", "100", "1000", "0.6"} <= texts and not any("$" in text for text in texts)


CHINESE, JAPANESE, KOREAN, THAI = ["\u732b", "\u72ac"], ["\u306d\u3053"], ["\ud55c\uad6d"], ["\u0e41\u0e2b"]
ARABIC, EMOJI = ["\u0642\u0637\u0629", "\u0643\u0644\u0628"], ["\U0001f9a5", "\U0001fabf"]
NO_TEXT = ["a\udcff", "tab\there"]


@pytest.fixture
def fonts(monkeypatch):
    """Installs fonts for one test: a list of matplotlib's own and those given, everything forgotten afterwards."""

    def install(*paths):
        own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in str(f.fname)]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
        for path in paths:
            font_manager.fontManager.addfont(path)
        plots.other_fonts.cache_clear()
        plots.drawable.cache_clear()
        monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans"])

    yield install
    plots.other_fonts.cache_clear()
    plots.drawable.cache_clear()


def made_font(path, characters: str):
    """A font in which each of the characters is a box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = [".notdef", *(f"u{ord(c):X}" for c in characters)]
    pen = TTGlyphPen(None)
    for i, point in enumerate([(50, 0), (50, 700), (700, 700), (700, 0)]):
        pen.lineTo(point) if i else pen.moveTo(point)
    pen.closePath()
    box = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in characters})
    font.setupGlyf(dict.fromkeys(names, box))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)
    return path


def test_scripts_that_a_font_has(tmp_path, texts, no_warnings, fonts):
    names = [*CHINESE, *JAPANESE, *KOREAN, *THAI, *EMOJI]
    fonts(made_font(tmp_path / "Made.ttf", "".join(CHINESE + EMOJI)), made_font(tmp_path / "Other.ttf", "".join(names)))
    draw_all(tmp_path, names)
    assert set(names) <= texts and {f"1= {name}" for name in names} <= texts


def test_scripts_that_no_font_has(tmp_path, texts, no_warnings, fonts):
    """Classes by their numbers, other names by the codes of their characters: told apart, and without warnings."""
    names = [*CHINESE, *EMOJI, *NO_TEXT]
    fonts()
    draw_all(tmp_path, names)
    codes = [name.encode("unicode_escape").decode() for name in names]
    assert {f"1= class {i}" for i in range(len(names))} | set(codes) <= texts
    assert not any(name in text for name in names for text in texts)


def test_scripts_that_the_plain_font_has(tmp_path, texts, no_warnings, fonts):
    fonts()
    names = [*ARABIC, "\u043a\u043e\u0442", "\u03b3\u03ac\u03c4\u03b1", "cafe\u0301", "\u05d7"]
    draw_all(tmp_path, names)
    assert set(names) <= texts


def test_what_a_class_is_called(fonts):
    fonts()
    assert plots.class_label("goldfish", "n01443537", 1) == "goldfish"
    assert plots.class_label("\u91d1\u9b5a", "n01443537", 1) == "n01443537"
    assert plots.class_label("\u91d1\u9b5a", "\u91d1\u9b5a", 1) == "class 1"
    assert plots.class_label(None, "n01443537", 1) == "n01443537"


@pytest.mark.parametrize("backend", ["module://matplotlib_absent.backend_inline", "nonsense"])
def test_a_backend_that_is_not_there(tmp_path, backend):
    """Figures are files; where no window can be had there is none."""
    script = """
import experiment.evaluation
import torch
from pathlib import Path
from experiment import plots
plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, Path("a.png"))
plots.show_window(Path("a.png"))
import matplotlib.pyplot
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "a.png").is_file()


def test_a_window_where_there_is_a_screen(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "qtagg")
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().get_size_inches().tolist()))
    plots.image_grid({"a": [torch.rand(3, 8, 8)]}, None, tmp_path / "a.png")
    plots.show_window(tmp_path / "a.png")
    plt.close("all")
    assert len(shown) == 1 and shown[0][0] > 1


def test_ties_are_said():
    """Ranks as in sports, and how many of equal ones are not shown."""
    scores = {"a": 0.5, "b": 0.1 + 0.2, "c": 0.3, "d": 0.0, "e": 0.5, "f": 0.5}
    assert plots.ranking(scores, 4) == (
        [("d", "1"), ("b", "2="), ("c", "2="), ("a", "4=")],
        "3 of 4 tie (=), 2 more tie with the last",
    )
    assert plots.ranking({"a": 0.1, "b": 0.2}, 10) == ([("a", "1"), ("b", "2")], "no ties")
    assert plots.ranking({"a": 0.1}, 10) == ([("a", "1")], "no ties")
    assert plots.ranking(dict.fromkeys("abc", 1.0), 2)[1] == "2 of 2 tie (=), 1 more tie with the last"


def test_one_image_a_class(tmp_path, texts):
    names = [f"c{i}" for i in range(12)]
    same = [0.0] * 12
    classes = class_rows(names, names, n=1, Original=[1.0] * 12, Bilinear=same, DarioNet=same)
    plots.class_bars(classes, tmp_path / "classes.png")
    assert "hardest\n10 of 10 tie (=), 2 more tie with the last" in texts and "1= c0" in texts
    assert "most improved over bilinear\nno class is" in texts
    note = "1 test image a class: a recall may be off by up to 0.98 by chance (95 %)"
    assert note in texts
    for draw in (plots.f1_density, plots.f1_difference):
        texts.clear()
        draw(classes, tmp_path / "f1.png")
        assert note in texts
    plots.f1_density(classes, tmp_path / "f1.png")
    assert "c0\nc1\nc2\nand 9 more" in texts  # one above the other none could be read
    for row, n in zip(classes, [30, 40] * 18, strict=True):
        row["n"] = n
    assert plots.sample_note(classes).startswith("30 to 40 test images a class: a recall may be off by up to 0.18")


def test_only_classes_that_gain_are_shown_as_improved(tmp_path, texts):
    names = ["up", "same", "down"]
    f1 = {"Original": [0.9, 0.5, 0.1], "Bilinear": [0.1, 0.5, 0.9], "DarioNet": [0.5] * 3}
    classes = class_rows(names, names, **f1)
    plots.class_bars(classes, tmp_path / "classes.png")
    assert {"1 up", "1= up", "1= same", "1= down"} <= texts and not {"2 same", "3 down", "2 down"} & texts


@pytest.mark.parametrize("left_out", ["Original", "Bilinear", "DarioNet"])
def test_figures_of_what_is_there(tmp_path, left_out, no_warnings):
    """Where a variant is absent the others are drawn, and what can't be compared is left out."""
    rows, classes = simulated(3, 2)
    rows, classes = ([r for r in table if r["variant"] != left_out] for table in (rows, classes))
    plots.f1_difference(classes, tmp_path / "f1_difference.png")
    plots.f1_density(classes, tmp_path / "f1_density.png")
    plots.class_bars(classes, tmp_path / "classes.png")
    plots.decision_strip(rows, tmp_path / "decisions.png")
    drawn = {"Original": {"classes"}, "Bilinear": {"f1_difference", "f1_density", "classes"}}
    expected = drawn.get(left_out, {"f1_difference"}) | {"decisions"}
    assert {path.stem for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("f1", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_few_classes_all_right_and_all_wrong(tmp_path, no_warnings, f1, names):
    values = [f1] * len(names)
    classes = class_rows(names, names, n=1, Original=values, Bilinear=values, DarioNet=values)
    plots.f1_difference(classes, tmp_path / "f1_difference.png")
    plots.f1_density(classes, tmp_path / "f1_density.png")
    plots.class_bars(classes, tmp_path / "classes.png")
    rows = [{"image": "a", "variant": v, "correct": int(f1)} for v in ("Original", "DarioNet", "Bilinear")]
    plots.decision_strip(rows, tmp_path / "decisions.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_to_draw(tmp_path, no_warnings):
    plots.f1_difference([], tmp_path / "a.png")
    plots.f1_density([], tmp_path / "a.png")
    plots.class_bars([], tmp_path / "a.png")
    plots.decision_strip([], tmp_path / "a.png")
    plots.results_table([], "", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    plots.report("nothing", "", {}, [], tmp_path / "report.pdf")
    keys = ("train_loss", "val_loss", "train_psnr_db", "val_psnr_db", "val_accuracy", "val_agreement")
    for history in ([], [{"epoch": 1} | dict.fromkeys(keys)], [{"epoch": 1} | dict.fromkeys(keys, float("nan"))]):
        plots.training_curves(history, tmp_path / "curves.png")


def test_a_report_of_many_lines(tmp_path, texts):
    """Long lines are broken and long lists turned over, not cut off at the paper's edge."""
    rng = np.random.default_rng(0)
    parameters = {"section": {f"key_{i}": "".join(rng.choice([*"qxz"], 250)) for i in range(40)}}
    plots.report("title", "a " * 300, parameters, [], tmp_path / "report.pdf")
    assert sum(text.count(letter) for text in texts for letter in "qxz") == 40 * 250 and max(map(len, texts)) < 110
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page ") >= 3


def test_predictions_that_were_cut_are_no_figure(tmp_path):
    rows, _ = simulated(2, 2)
    with pytest.raises(InputError, match="no row DarioNet of the image c1/1"):
        plots.decision_strip(rows[:-1], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
