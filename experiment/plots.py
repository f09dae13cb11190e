"""Every figure; the only module that imports matplotlib, and only to draw, so that scripts start sooner."""

import contextlib
import json
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from experiment.metrics import BASELINE, ORIGINAL, OURS, SMALL, right_or_wrong, table_cells
from models.errors import InputError
from models.files import write_atomically

GOOD, BAD, PLAIN = "#1a7f37", "#c0392b", "#30363d"
COLOURS = {ORIGINAL: PLAIN, SMALL: "#8b949e", BASELINE: "#d1700a", "Bicubic": "#b5a642", OURS: "#0b6fb8"}
SERIES = ("#0b6fb8", "#d1700a", "#b5a642", "#7b3fa0", "#1a7f37", "#c0392b")
# Those that are installed. A character that none of them has is drawn as a box.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans Thai", "Noto Emoji", "Arial Unicode MS", "Microsoft YaHei")
STYLE = {
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3},
    **{"axes.axisbelow": True, "figure.dpi": 100, "savefig.dpi": 150, "text.usetex": False},
    "text.parse_math": False,  # names of classes and files are shown as they are: "$" begins no formula
}
A4, MARGIN = (8.27, 11.69), 0.08  # inches; of the width
LINE, LINES = 94, 66  # characters of a line, lines of a page


@contextlib.contextmanager
def styled(**style) -> Iterator[list[str]]:
    """Sets matplotlib up for one figure, `style` over ours; yields the fonts."""
    try:
        import matplotlib
    except ValueError as error:  # MPLBACKEND names what it does not know
        raise InputError(f"matplotlib can't start: {error}") from None
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    fonts = [name for name in FONTS if name in installed]
    with matplotlib.rc_context(STYLE | {"font.family": fonts} | style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield fonts


@contextlib.contextmanager
def drawing(path: Path, rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], style=None, **options):
    """A figure and its axes, as pyplot's subplots, without a window; the end of the block writes a PNG, atomically."""
    with styled(**style or {}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=figsize, layout="constrained")
        yield figure, figure.subplots(rows, columns, **options)
        write_atomically(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight", facecolor="white"))


def show_window(path: Path) -> None:
    """Shows a PNG file in a window and waits until it is closed; does nothing if there is no screen."""
    with contextlib.suppress(Exception), styled():  # the figure is a file already
        import matplotlib.pyplot as plt  # here alone: it looks for a screen

        if plt.get_backend().lower() == "agg":
            return
        pixels = plt.imread(path)
        figure = plt.figure(figsize=(pixels.shape[1] / 150, pixels.shape[0] / 150))
        figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[]).imshow(pixels)
        plt.show()


def colour_of(variant: str) -> str:
    return COLOURS.get(variant, COLOURS[OURS])


def legible(text: str) -> str:
    """`text` with the codes of what is no character, such as bytes of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


def shorten(text: str, length: int = 22) -> str:
    text = legible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def show_image(axes, image: Tensor, title: str = "", colour: str = PLAIN, nearest: bool = True) -> None:
    """Draws a (3,H,W) image in [0,1], its pixels as squares unless `nearest` is False."""
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axes.imshow(pixels, interpolation="nearest" if nearest else None)
    axes.set_title(legible(title), color=colour, fontsize=8, y=1)  # without y every draw looks for a free place, slowly
    axes.set_axis_off()


def training_curves(history: list[dict], path: Path) -> None:
    """Loss, PSNR, and accuracy with agreement, over the epochs of history.csv."""
    epochs = [row["epoch"] for row in history]
    panels = {
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "PSNR (dB)": {"train_psnr_db": "training", "val_psnr_db": "validation"},
        "share of validation images": {"val_accuracy": "accuracy", "val_agreement": "agreement"},
    }
    with drawing(path, 1, 3, figsize=(12, 3.4), style={"text.parse_math": True}) as (_, places):
        for axes, (title, lines) in zip(places, panels.items(), strict=True):
            for (key, label), colour in zip(lines.items(), SERIES, strict=False):
                values = [np.nan if row[key] is None else row[key] for row in history]
                if not np.isnan(values).all():
                    axes.plot(epochs, values, "o-", ms=3, color=colour, label=label)
            axes.set_xlabel("epoch")
            axes.set_title(title)
            axes.locator_params(axis="x", integer=True)
            if axes.lines:
                axes.legend(frameon=False)
        if min((row["train_loss"] or 0 for row in history), default=0) > 0:
            places[0].set_yscale("log")


def image_grid(
    columns: dict[str, list[Tensor]],
    titles: list[list[tuple[str, str]]] | None,
    path: Path,
    notes: list[str] | None = None,
) -> None:
    """Rows of images under named columns. `titles`: (text, colour) above every image; `notes`: a line per row."""
    rows = len(next(iter(columns.values())))
    size = 1.9 * len(columns), (2.15 + 0.2 * bool(notes) if titles else 1.95) * rows
    with drawing(path, rows, len(columns), figsize=size, squeeze=False) as (figure, axes):
        if notes:
            figure.get_layout_engine().set(h_pad=0.22)  # inches
        for c, (name, images) in enumerate(columns.items()):
            for r, image in enumerate(images):
                text, colour = titles[r][c] if titles else ("", PLAIN)
                show_image(axes[r, c], image, shorten(text), colour)
            place, style = (0.5, 1.16 if titles else 1.04), {"ha": "center", "fontsize": 10, "fontweight": "bold"}
            axes[0, c].annotate(legible(name), place, xycoords="axes fraction", **style)
        if notes:  # longer than an image is wide: they come after the layout, which would make room for them
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            at = {"xycoords": "axes fraction", "va": "top", "fontsize": 7, "color": PLAIN}
            for first, note in zip(axes[:, 0], notes, strict=True):
                first.annotate(legible(note), (0, -0.02), **at)


def results_table(variants: list[dict], caption: str, path: Path, ours: str = OURS) -> None:
    """The results table as a figure, the row of `ours` in bold."""
    headings, *cells = ([legible(cell) for cell in row] for row in table_cells(variants))
    widths = [max(map(len, column)) + 2 for column in zip(headings, *cells, strict=True)]
    columns = {"colLabels": headings, "colWidths": [w / sum(widths) for w in widths]}
    with drawing(path, figsize=(0.085 * sum(widths), 0.3 * (len(cells) + 2))) as (_, axes):
        axes.set_axis_off()
        table = axes.table(cells, cellLoc="right", loc="center", edges="horizontal", **columns)
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.scale(1, 1.45)
        for (row, column), cell in table.get_celld().items():
            cell.set_edgecolor("#d0d7de")
            if column == 0:
                cell.set_text_props(ha="left")
            if row == 0 or variants[row - 1]["name"] == ours:
                cell.set_text_props(fontweight="bold")
        axes.set_title(legible(caption), fontsize=9, color=PLAIN)


def panels(images: list[tuple[str, Tensor, str]], columns: int, path: Path) -> None:
    """Images with what they are above and what the classifier says below."""
    rows = -(-len(images) // columns)
    at = {"xycoords": "axes fraction", "ha": "center", "va": "top", "fontsize": 9}
    with drawing(path, rows, columns, figsize=(3.1 * columns, 3.5 * rows), squeeze=False) as (_, axes):
        for place in axes.flat:
            place.set_axis_off()
        for place, (title, image, verdict) in zip(axes.flat, images, strict=False):
            show_image(place, image, nearest=max(image.shape[-2:]) < 128)
            place.set_title(legible(title), fontsize=9, fontweight="bold")
            place.annotate(legible(verdict), (0.5, -0.02), **at)


def by_class(classes: list[dict]) -> dict[str, dict[str, float]]:
    """Variant -> class -> F1, from the rows of `per_class`."""
    variants = dict.fromkeys(row["variant"] for row in classes)
    return {v: {row["class"]: row["f1"] for row in classes if row["variant"] == v} for v in variants}


def sample_note(classes: list[dict]) -> str:
    """How many images a class has, and how far its share of correct ones may be off by chance."""
    low, high = min(row["n"] for row in classes), max(row["n"] for row in classes)
    images = f"{low}" if low == high else f"{low} to {high}"
    half = min(1.0, 1.96 * 0.5 / low**0.5)  # the normal approximation's, at its widest
    return f"{images} test image{'s' * (high > 1)} per class: a recall may be off by up to {half:.2f} by chance (95 %)"


def f1_difference(classes: list[dict], path: Path, ours: str = OURS) -> None:
    """Distribution over the classes of what rebuilding costs: F1 on the original minus F1 on the rebuilt image."""
    f1 = by_class(classes)
    differences = {v: np.array([f1[ORIGINAL][c] - f1[v][c] for c in f1[v]]) for v in (BASELINE, ours)}
    everything = np.concatenate(list(differences.values()))
    bins = np.linspace(min(everything.min(), -0.05), max(everything.max(), 0.05), 25)
    with drawing(path, figsize=(7, 3.6)) as (_, axes):
        for variant, values in differences.items():
            label = f"mean {values.mean():.3f}: {legible(variant)}"
            axes.hist(values, bins, color=colour_of(variant), alpha=0.55, label=label)
            axes.axvline(values.mean(), color=colour_of(variant), lw=1.5)
        axes.axvline(0, color=PLAIN, lw=0.8)
        axes.set_title(sample_note(classes), fontsize=8)
        axes.set_xlabel("F1 on the original - F1 on the rebuilt image")
        axes.set_ylabel(f"classes, of {len(f1[ORIGINAL])}")
        axes.locator_params(axis="y", integer=True)
        axes.legend(frameon=False)


def lowest(scores: dict[str, float], count: int) -> tuple[list[str], str]:
    """The `count` classes with the lowest scores, and a note on how many others tie with the last of them."""
    scores = {name: round(score, 9) for name, score in scores.items()}  # 0.1 + 0.2 ties with 0.3
    order = sorted(scores, key=scores.get)
    tied = sum(scores[name] == scores[order[count - 1]] for name in order[count:])
    return order[:count], f"{tied} more tie with the last" if tied else "" if order else "no class is"


def class_bars(classes: list[dict], path: Path, count: int = 10, ours: str = OURS) -> None:
    """The classes that are hardest for DarioNet, those it improves most over bilinear, those it worsens most."""
    f1, labels = by_class(classes), {row["class"]: row["label"] for row in classes}
    variants = [variant for variant in (ORIGINAL, ours, BASELINE) if variant in f1]
    mine, bilinear = f1[ours], f1[BASELINE]
    reference, name = (f1[ORIGINAL], "the original") if ORIGINAL in f1 else (bilinear, "bilinear")
    choices = {
        "hardest": mine,
        "most improved over bilinear": {c: bilinear[c] - mine[c] for c in mine if mine[c] > bilinear[c]},
        f"furthest below {name}": {c: mine[c] - reference[c] for c in mine if reference[c] > mine[c]},
    }
    size = 13, 0.36 * min(count, len(mine)) + 1.6
    with drawing(path, 1, 3, figsize=size, sharex=True) as (figure, places):
        for axes, (title, scores) in zip(places, choices.items(), strict=True):
            names, note = lowest(scores, count)
            for offset, variant in zip((-0.27, 0, 0.27), variants, strict=False):
                heights = [f1[variant][c] for c in names]
                axes.barh(np.arange(len(names)) + offset, heights, 0.25, color=colour_of(variant))
            axes.set_yticks(range(len(names)), [shorten(labels[c], 24) for c in names])
            axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
            axes.set_xlim(0, 1)
            axes.set_xlabel("F1")
            axes.set_title(f"{title}\n{note}", fontsize=9)
            axes.grid(axis="y", visible=False)
        figure.suptitle(sample_note(classes), fontsize=9)
        bars, names = places[0].containers, [shorten(variant, 40) for variant in variants]
        figure.legend(bars, names, loc="outside lower center", ncols=3, frameon=False)


def decision_strip(rows: list[dict], path: Path, ours: str = OURS) -> None:
    """Every image as a column: right or wrong for every variant, sorted so that equal fates are side by side."""
    right = right_or_wrong(rows)
    variants = list(next(iter(right.values())))
    images = sorted(right, key=lambda i: [-right[i][v] for v in (ORIGINAL, ours, BASELINE) if v in variants])
    grid = np.array([[right[i][v] for i in images] for v in variants])
    before, after = grid[variants.index(BASELINE)], grid[variants.index(ours)]
    pixels = np.array([[192, 57, 43], [159, 211, 172]], dtype=np.uint8)[grid]
    with drawing(path, figsize=(10, 0.42 * len(variants) + 1.4)) as (_, axes):
        axes.imshow(pixels, aspect="auto", interpolation="nearest" if len(images) < 3000 else "antialiased")
        names = [f"{legible(v)}: {share:.1%} right" for v, share in zip(variants, grid.mean(1), strict=True)]
        axes.set_yticks(range(len(variants)), names)
        axes.set_xlabel(f"{len(images)} images, sorted by who is right")
        axes.locator_params(axis="x", integer=True)
        axes.grid(visible=False)
        flips = f"{(before < after).sum()} decisions on the bilinear image to right, {(before > after).sum()} to wrong"
        axes.set_title(f"{shorten(ours, 40)} flips {flips}")


def pipeline_figure(stages: list[tuple[str, Tensor]], scores: list[tuple[str, float]], path: Path) -> None:
    """What happens to one image, stage by stage, and the classifier's five highest probabilities at the end."""
    at = {"xycoords": "axes fraction", "fontsize": 16, "ha": "center", "va": "center"}
    with drawing(path, 1, len(stages) + 1, figsize=(2.7 * (len(stages) + 1), 2.9)) as (_, places):
        for axes, (title, image) in zip(places, stages, strict=False):
            show_image(axes, image, f"{title}\n{image.shape[-1]} x {image.shape[-2]}")
            axes.annotate("→", (1.06, 0.5), **at)
        axes = places[-1]
        axes.barh(range(len(scores)), [p for _, p in scores], color=COLOURS[OURS])
        axes.set_yticks(range(len(scores)), [shorten(name, 18) for name, _ in scores], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title("frozen classifier\nprobability", fontsize=8)
        axes.grid(visible=False)


def report(title: str, text: str, parameters: dict, figures: list[tuple[str, Path]], path: Path) -> None:
    """A PDF of A4 pages: title and text, every figure (a heading and a PNG file) on its own page, the parameters."""
    with styled() as fonts:
        from matplotlib.backends.backend_pdf import PdfPages
        from matplotlib.figure import Figure

        def pages_of(heading: str, body: str) -> Iterator[Figure]:
            wrapped = (textwrap.wrap(legible(line), LINE, subsequent_indent="    ") for line in body.split("\n"))
            lines = [piece for pieces in wrapped for piece in pieces or [""]]
            for first in range(0, len(lines), LINES):
                page = Figure(figsize=A4)
                page.text(MARGIN, 0.95, legible(heading), fontsize=14, fontweight="bold", va="top")
                for n, line in enumerate(lines[first : first + LINES]):
                    page.text(MARGIN, 0.92 - 0.013 * n, line, fontsize=8, va="top", family=["DejaVu Sans Mono", *fonts])
                yield page

        pages = [*pages_of(title, text)]
        for heading, png in figures:
            pages += pages_of(heading, "")
            pixels = np.asarray(Image.open(png))
            width = (1 - 2 * MARGIN) * min(1, pixels.shape[1] / 1100)  # a narrow figure is not blown up
            axes = pages[-1].add_axes((MARGIN, 0.05, width, 0.87), anchor="N")
            axes.imshow(pixels)
            axes.set_axis_off()
        pages += pages_of("Parameters", json.dumps(parameters, ensure_ascii=False, indent=4))

        def save(file) -> None:
            with PdfPages(file) as pdf:
                for page in pages:
                    pdf.savefig(page, dpi=100)

        write_atomically(path, save)


def degradation(rows: list[dict], original: float, path: Path) -> None:
    """Accuracy per way of reducing, the `rows` of examples/degradation.py: a panel per scale, a bar per variant, and
    the accuracy on the `original` images as a line across."""
    names, scales = list(rows[0]["accuracy"]), list(dict.fromkeys(row["scale"] for row in rows))
    palette = dict(zip(names, [COLOURS[BASELINE], *SERIES[2:4], *SERIES[:1], *SERIES[4:]], strict=False))
    size = len(rows) + 2, 3.4
    with drawing(path, 1, len(scales), figsize=size, squeeze=False, sharey=True) as (figure, (places,)):
        for axes, scale in zip(places, scales, strict=True):
            own = [row for row in rows if row["scale"] == scale]
            for i, name in enumerate(names):
                x = np.arange(len(own)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
                heights = [row["accuracy"][name] for row in own]
                axes.bar(x, heights, 0.8 / len(names), color=palette.get(name), label=name)
            axes.axhline(original, color=PLAIN, linestyle="--", linewidth=1, label=ORIGINAL)
            axes.set_xticks(range(len(own)), [row["reduction"].replace(", ", "\n") for row in own], fontsize=7)
            axes.set_title(f"x{scale:.3g}")
        places[0].set_ylabel("accuracy")
        handles = places[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False)
