"""Every figure; the only module that imports matplotlib."""

import contextlib
import json
import os
import re
import textwrap
import warnings
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor

from experiment import BACKEND
from experiment.metrics import BASELINE, HEADINGS, ORIGINAL, OURS, SMALL, right_or_wrong, table_cells
from models.files import write_atomically

GOOD, BAD, PLAIN = "#1a7f37", "#c0392b", "#30363d"
COLOURS = {ORIGINAL: PLAIN, SMALL: "#8b949e", BASELINE: "#d1700a", "Bicubic": "#b5a642", OURS: "#0b6fb8"}
FEW = 40  # classes: up to here each is a point with a name, above they are a density
SERIES = ("#0b6fb8", "#d1700a")
PLACEHOLDERS = re.compile("last ?resort|fallback|blank|tofu", re.IGNORECASE)  # fonts that have a box for everything
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
matplotlib.rcParams.update({"axes.axisbelow": True, "grid.alpha": 0.3, "figure.dpi": 100, "savefig.dpi": 150})
# Names of classes and files are shown as they are: "$" and "\\" begin no formula.
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False, "font.family": ["DejaVu Sans"]})


def use_backend(name: str) -> None:
    """Has windows opened by the backend that MPLBACKEND names, where matplotlib knows it."""
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = name
        os.environ["MPLBACKEND"] = name


if BACKEND:
    use_backend(BACKEND)


@lru_cache(maxsize=1)
def other_fonts() -> dict[int, str]:
    """Character -> the family of an installed font that has it."""
    found: dict[int, str] = {}
    for font in fontManager.ttflist:
        if font.style == "normal" and not PLACEHOLDERS.search(font.name):
            with contextlib.suppress(OSError, RuntimeError):  # damaged, or gone since matplotlib looked
                found = dict.fromkeys(get_font(font.fname).get_charmap(), font.name) | found
    return found


@cache
def drawable(character: str) -> bool:
    """Whether a font has the character; from now on figures use that font beside their own."""
    own = [findfont(FontProperties(weight=weight)) for weight in ("normal", "bold")]
    if character == "\n" or all(get_font(path).get_char_index(ord(character)) for path in own):
        return True
    family = other_fonts().get(ord(character))
    if family and family not in matplotlib.rcParams["font.family"]:
        matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], family]
    return family is not None


def legible(text: str) -> str:
    """`text` with the codes of those characters that no font has."""
    return "".join(c if drawable(c) else c.encode("unicode_escape").decode() for c in text)


def class_label(label: str | None, name: str, index: int) -> str:
    """What a class is called in figures: its label, else its folder's name, else its number, whichever fonts have."""
    return next((text for text in (label, name) if text and all(map(drawable, text))), f"class {index}")


class PlainLogFormatter(LogFormatter):
    """The numbers of a logarithmic axis without formulas."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options):
    """As pyplot's, but no window is behind it: a run must not end because a screen does."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def show_window(path: Path) -> None:
    """Shows a PNG file in a window and waits until it is closed; does nothing where no window can be had."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # the figure is a file already
        import matplotlib.pyplot as plt  # here alone: it looks for a screen

        if plt.get_backend().lower() == "agg":
            return
        pixels = plt.imread(path)
        figure = plt.figure(figsize=(pixels.shape[1] / 150, pixels.shape[0] / 150))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(pixels)
        axes.set_axis_off()
        plt.show()


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight", facecolor="white"))


def show_image(axes: Axes, image: Tensor, title: str = "", colour: str = PLAIN, nearest: bool = True) -> None:
    """Draws a (3,H,W) image in [0,1], its pixels as squares unless `nearest` is False."""
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axes.imshow(pixels, interpolation="nearest" if nearest else None)
    axes.set_title(legible(title), color=colour, fontsize=8, y=1)  # without y every draw looks for a free place, slowly
    axes.set_axis_off()


def shorten(text: str, length: int = 22) -> str:
    text = legible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def training_curves(history: list[dict], path: Path) -> None:
    """Loss, PSNR, and accuracy with agreement, over the epochs of history.csv."""
    epochs = [row["epoch"] for row in history]
    figure, (loss, psnr, share) = subplots(1, 3, figsize=(12, 3.4))
    for axes, name, keys in (
        (loss, "loss", ("train_loss", "val_loss")),
        (psnr, "PSNR (dB)", ("train_psnr_db", "val_psnr_db")),
        (share, "share of validation images", ("val_accuracy", "val_agreement")),
    ):
        for key, colour in zip(keys, SERIES, strict=True):
            values = [np.nan if row[key] is None else row[key] for row in history]
            if not np.isnan(values).all():
                kind, what = key.split("_")[:2]
                label = what if axes is share else {"train": "training", "val": "validation"}[kind]
                axes.plot(epochs, values, "o-", ms=3, color=colour, label=label)
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(frameon=False)
    if min((row["train_loss"] or 0 for row in history), default=0) > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_formatter(PlainLogFormatter())
        loss.yaxis.set_minor_formatter(PlainLogFormatter())
    save(figure, path)


def image_grid(
    columns: dict[str, list[Tensor]],
    titles: list[list[tuple[str, str]]] | None,
    path: Path,
    notes: list[str] | None = None,
) -> None:
    """Rows of images under named columns; `titles` may add a (text, colour) above every image, row by row, and
    `notes` a line under each row."""
    rows = len(next(iter(columns.values())))
    figure, axes = subplots(
        rows,
        len(columns),
        figsize=(1.9 * len(columns), (2.15 + 0.2 * bool(notes) if titles else 1.95) * rows),
        squeeze=False,
    )
    if notes:
        figure.get_layout_engine().set(h_pad=0.22)  # inches
    for c, (name, images) in enumerate(columns.items()):
        for r, image in enumerate(images):
            text, colour = titles[r][c] if titles else ("", PLAIN)
            show_image(axes[r, c], image, shorten(text), colour)
        place = (0.5, 1.16 if titles else 1.04)
        style = {"ha": "center", "fontsize": 10, "fontweight": "bold"}
        axes[0, c].annotate(legible(name), place, xycoords="axes fraction", **style)
    if notes:  # longer than an image is wide: they come after the layout, which would make room for them
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        at = {"xycoords": "axes fraction", "va": "top", "fontsize": 7, "color": PLAIN}
        for first, note in zip(axes[:, 0], notes, strict=True):
            first.annotate(legible(note), (0, -0.02), **at)
    save(figure, path)


def results_table(variants: list[dict], caption: str, path: Path, ours: str = OURS) -> None:
    """The results table as a figure, the row of `ours` set off; none where there are no variants."""
    if not variants:
        return
    cells = [[legible(cell) for cell in row] for row in table_cells(variants)]
    widths = [max(len(row[i]) for row in [HEADINGS, *cells]) + 2 for i in range(len(HEADINGS))]
    figure, axes = subplots(figsize=(0.085 * sum(widths), 0.3 * (len(cells) + 2)))
    axes.set_axis_off()
    table = axes.table(
        cells,
        colLabels=HEADINGS,
        cellLoc="right",
        loc="center",
        colWidths=[w / sum(widths) for w in widths],
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.45)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#d0d7de")
        if column == 0:
            cell.set_text_props(ha="left")
        if row == 0 or variants[row - 1]["name"] == ours:
            cell.set_text_props(fontweight="bold")
        if row and variants[row - 1]["name"] == ours:
            cell.set_facecolor("#e8f1fa")
    axes.set_title(legible(caption), fontsize=9, color=PLAIN)
    save(figure, path)


def scales(rows: list[tuple[str, list[Tensor]]], headings: list[str], path: Path) -> None:
    """What is left of an image at several scales: a row of images per scale, named at its left."""
    figure, axes = subplots(len(rows), len(headings), figsize=(2.2 * len(headings), 2.2 * len(rows)), squeeze=False)
    for r, (name, images) in enumerate(rows):
        for c, image in enumerate(images):
            show_image(axes[r, c], image, headings[c] if r == 0 else "")
        axes[r, 0].annotate(legible(name), (-0.06, 0.5), xycoords="axes fraction", rotation=90, va="center", ha="right")
    save(figure, path)


def panels(images: list[tuple[str, Tensor, str]], columns: int, path: Path) -> None:
    """Images with what they are above and what the classifier says below."""
    rows = -(-len(images) // columns)
    figure, axes = subplots(rows, columns, figsize=(3.1 * columns, 3.5 * rows), squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for place, (title, image, verdict) in zip(axes.flat, images, strict=False):
        show_image(place, image, nearest=max(image.shape[-2:]) < 128)
        place.set_title(legible(title), fontsize=9, fontweight="bold")
        place.annotate(legible(verdict), (0.5, -0.02), xycoords="axes fraction", ha="center", va="top", fontsize=9)
    save(figure, path)


def by_class(classes: list[dict]) -> dict[str, dict[str, float]]:
    """Variant -> class -> F1, from the rows of classes.csv."""
    table: dict[str, dict[str, float]] = {}
    for row in classes:
        table.setdefault(row["variant"], {})[row["class"]] = row["f1"]
    return table


def class_labels(classes: list[dict]) -> dict[str, str]:
    """Class -> what figures call it, from the rows of classes.csv."""
    names = list(dict.fromkeys(row["class"] for row in classes))
    indices = {row["class"]: row.get("index", names.index(row["class"])) for row in classes}
    return {row["class"]: class_label(row["label"], row["class"], indices[row["class"]]) for row in classes}


def sample_note(classes: list[dict]) -> str:
    """How many images stand behind a class, and how far its share of correct ones may be off by chance."""
    counts = [row["n"] for row in classes]
    low, high = min(counts), max(counts)
    images = f"{low}" if low == high else f"{low} to {high}"
    half = min(1.0, 1.96 * 0.5 / low**0.5)  # the normal approximation's, at its widest
    return f"{images} test image{'s' * (high > 1)} a class: a recall may be off by up to {half:.2f} by chance (95 %)"


def f1_difference(classes: list[dict], path: Path, ours: str = OURS) -> None:
    """Distribution over the classes of what rebuilding costs: F1 on the original minus F1 on the rebuilt image.

    This figure and the next two are left out where `classes` lacks the variants that they compare.
    """
    f1 = by_class(classes)
    shown = [variant for variant in (BASELINE, ours) if variant in f1]
    if ORIGINAL not in f1 or not shown:
        return
    figure, axes = subplots(figsize=(7, 3.6))
    original = f1[ORIGINAL]
    differences = {v: np.array([original[c] - f1[v][c] for c in original]) for v in shown}
    everything = np.concatenate(list(differences.values()))
    bins = np.linspace(min(everything.min(), -0.05), max(everything.max(), 0.05), 25)
    for variant, values in differences.items():
        colour = COLOURS.get(variant, COLOURS[OURS])
        axes.hist(values, bins, color=colour, alpha=0.55, label=f"mean {values.mean():.3f}: {legible(variant)}")
        axes.axvline(values.mean(), color=colour, lw=1.5)
    axes.axvline(0, color=PLAIN, lw=0.8)
    axes.set_title(sample_note(classes), fontsize=8)
    axes.set_xlabel("F1 on the original - F1 on the rebuilt image")
    axes.set_ylabel(f"classes, of {len(original)}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    save(figure, path)


def f1_density(classes: list[dict], path: Path, ours: str = OURS) -> None:
    """The same difference against the F1 on the original: a named point a class, or a density where they are many."""
    f1, labels = by_class(classes), class_labels(classes)
    if not {ORIGINAL, ours} <= f1.keys():
        return
    names = list(f1[ORIGINAL])
    x = np.array([f1[ORIGINAL][c] for c in names])
    y = x - np.array([f1[ours][c] for c in names])
    figure, axes = subplots(figsize=(7, 5))
    if len(names) > FEW:
        density = axes.hexbin(x, y, gridsize=28, mincnt=1, cmap="viridis")
        figure.colorbar(density, label="classes")
    else:
        axes.scatter(x, y, color=COLOURS[OURS])
        places: dict[tuple[float, float], list[str]] = {}
        for name, *place in zip(names, x, y, strict=True):
            places.setdefault(tuple(place), []).append(shorten(labels[name], 18))
        for place, tied in places.items():  # classes on one and the same point share a note
            text = "\n".join(tied[:3] + [f"and {len(tied) - 3} more"] * (len(tied) > 3))
            axes.annotate(text, place, (4, 3), textcoords="offset points", fontsize=8)
        axes.margins(0.12)
    axes.axhline(0, color=PLAIN, lw=0.8)
    axes.set_title(sample_note(classes), fontsize=8)
    axes.set_xlabel("F1 on the original")
    axes.set_ylabel(f"F1 on the original - F1 on {shorten(ours)}'s image")
    save(figure, path)


def ranking(scores: dict[str, float], count: int) -> tuple[list[tuple[str, str]], str]:
    """The `count` classes with the lowest scores, each with its rank ("3", or "3=" where others have its score).

    Also a note on ties: how many others have the score of the last one, without being shown.
    """
    scores = {name: round(score, 9) for name, score in scores.items()}  # 0.1 + 0.2 ties with 0.3
    order = sorted(scores, key=scores.get)
    values = [scores[name] for name in order]
    ranks = [f"{values.index(value) + 1}{'=' * (values.count(value) > 1)}" for value in values]
    shown = list(zip(order, ranks, strict=True))[:count]
    hidden = sum(value == values[count - 1] for value in values[count:])
    tied = sum("=" in rank for _, rank in shown)
    note = f"{tied} of {len(shown)} tie (=)" if tied else "no ties"
    return shown, note + (f", {hidden} more tie with the last" if hidden else "")


def class_bars(classes: list[dict], path: Path, count: int = 10, ours: str = OURS) -> None:
    """The classes that are hardest for DarioNet, those it improves most over bilinear, those it worsens most."""
    f1, labels = by_class(classes), class_labels(classes)
    variants = [variant for variant in (ORIGINAL, ours, BASELINE) if variant in f1]
    if ours not in f1:
        return
    mine = f1[ours]

    def differences(lower: str, upper: str) -> dict[str, float]:
        """Minus what the classes gain, of those that gain."""
        low, high = f1.get(lower, mine), f1.get(upper, mine)
        return {c: low[c] - high[c] for c in mine if high[c] > low[c]}

    choices = (
        ("hardest", mine),
        ("most improved over bilinear", differences(BASELINE, ours)),
        ("furthest below the original", differences(ours, ORIGINAL)),
    )
    shown = min(count, len(mine))
    figure, places = subplots(1, 3, figsize=(13, 0.36 * shown + 1.6), sharex=True)
    for axes, (title, scores) in zip(places, choices, strict=True):
        ranks, note = ranking(scores, count) if scores else ([], "no class is")
        rows = np.arange(len(ranks))
        for offset, variant in zip((-0.27, 0, 0.27), variants, strict=False):
            heights = [f1[variant][c] for c, _ in ranks]
            axes.barh(rows + offset, heights, 0.25, color=COLOURS.get(variant, COLOURS[OURS]))
        axes.set_yticks(rows, [f"{rank} {shorten(labels[c], 24)}" for c, rank in ranks])
        axes.set_ylim(max(len(ranks), 1) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("F1")
        axes.set_title(f"{title}\n{note}", fontsize=9)
        axes.grid(axis="y", visible=False)
    figure.suptitle(sample_note(classes), fontsize=9)
    bars = [matplotlib.patches.Patch(color=COLOURS.get(v, COLOURS[OURS])) for v in variants]
    figure.legend(bars, [f"{shorten(v, 40)} " for v in variants], loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def decision_strip(rows: list[dict], path: Path, ours: str = OURS) -> None:
    """Every image as a column: right or wrong for every variant, sorted so that equal fates stand together."""
    right = right_or_wrong(rows)
    if not right:
        return
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    key = [v for v in (ORIGINAL, ours, BASELINE) if v in variants]
    images = sorted(right, key=lambda i: [-right[i][v] for v in key])
    grid = np.array([[right[i][v] for i in images] for v in variants])
    figure, axes = subplots(figsize=(10, 0.42 * len(variants) + 1.4))
    colours = matplotlib.colors.ListedColormap([BAD, "#9fd3ac"])
    axes.imshow(
        grid,
        aspect="auto",
        cmap=colours,
        vmin=0,
        vmax=1,
        interpolation="nearest" if len(images) < 3000 else "antialiased",
    )
    axes.set_yticks(range(len(variants)), [f"{legible(v)}: {grid[r].mean():.1%} right" for r, v in enumerate(variants)])
    axes.set_xlabel(f"{len(images)} images, sorted by who is right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    if {BASELINE, ours} <= set(variants):
        b, d = grid[variants.index(BASELINE)], grid[variants.index(ours)]
        axes.set_title(
            f"{shorten(ours, 40)} flips {int(((b == 0) & (d == 1)).sum())} decisions on the bilinear image to right, "
            f"{int(((b == 1) & (d == 0)).sum())} to wrong"
        )
    save(figure, path)


def pipeline_figure(stages: list[tuple[str, Tensor]], scores: list[tuple[str, float]], path: Path) -> None:
    """What happens to one image, stage by stage, and the classifier's five highest probabilities at the end."""
    figure, places = subplots(1, len(stages) + 1, figsize=(2.7 * (len(stages) + 1), 2.9))
    for axes, (title, image) in zip(places, stages, strict=False):
        show_image(axes, image, f"{title}\n{image.shape[-1]} x {image.shape[-2]}")
        axes.annotate("→", (1.06, 0.5), xycoords="axes fraction", fontsize=16, ha="center", va="center")
    axes = places[-1]
    axes.barh(range(len(scores)), [p for _, p in scores], color=COLOURS[OURS])
    axes.set_yticks(range(len(scores)), [shorten(name, 18) for name, _ in scores], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("frozen classifier\nprobability", fontsize=8)
    axes.grid(visible=False)
    save(figure, path)


A4 = 8.27, 11.69  # inches
MARGIN = 0.7


def report(title: str, text: str, parameters: dict, figures: list[tuple[str, Path]], path: Path) -> None:
    """A PDF of A4 pages: title, text, figures (a heading and a PNG file each) one below the other, the parameters."""
    width, height = A4[0] - 2 * MARGIN, A4[1] - MARGIN

    def pages(file) -> None:
        with PdfPages(file) as pdf:
            page, top = Figure(figsize=A4), MARGIN

            def write(line: str, size: float, **style) -> None:
                nonlocal top
                characters = int(width * 72 / (0.61 * size))  # as wide as a monospaced one
                for piece in textwrap.wrap(legible(line), characters, subsequent_indent="    ") or [""]:
                    if top + size * 1.6 / 72 > height:
                        turn()
                    page.text(MARGIN / A4[0], 1 - top / A4[1], piece, fontsize=size, va="top", **style)
                    top += size * 1.6 / 72

            def turn() -> None:
                nonlocal page, top
                pdf.savefig(page, dpi=100)
                page, top = Figure(figsize=A4), MARGIN

            write(title, 20, fontweight="bold")
            for line in text.splitlines():
                write(line, 9)
            for heading, png in figures:
                pixels = matplotlib.image.imread(png)
                shown = min(width, width * pixels.shape[1] / 1100)  # a narrow figure is not blown up
                tall = shown * pixels.shape[0] / pixels.shape[1]
                if top + tall + 0.5 > height:
                    turn()
                top += 0.15
                write(heading, 12, fontweight="bold")
                axes = page.add_axes((MARGIN / A4[0], 1 - (top + tall) / A4[1], shown / A4[0], tall / A4[1]))
                axes.imshow(pixels)
                axes.set_axis_off()
                top += tall
            turn()
            write("Parameters", 12, fontweight="bold")
            for line in flattened(parameters):
                write(line, 8, family=["monospace", *matplotlib.rcParams["font.family"]])
            turn()

    write_atomically(path, pages)


def flattened(values: dict, prefix: str = "") -> list[str]:
    """A line `section.key  value` for every parameter."""
    lines = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        text = json.dumps(value, ensure_ascii=False)
        lines += flattened(value, f"{name}.") if isinstance(value, dict) else [f"{name:55} {text}"]
    return lines


def degradation(rows: list[dict], original: float, path: Path) -> None:
    """Accuracy over the scale, a panel a way of reducing and a line a variant; at one scale a group of bars a way.

    `rows` are those of examples/degradation.py, `original` is the accuracy on the original images, a line across.
    """
    ways, names = list(dict.fromkeys(row["reduction"] for row in rows)), list(rows[0]["accuracy"])
    several = len({row["scale"] for row in rows}) > 1
    figure, places = subplots(1, len(ways) if several else 1, figsize=(3 * len(ways), 3.2), squeeze=False, sharey=True)
    palette = dict(zip(names, ("#d1700a", "#b5a642", "#7b3fa0", "#0b6fb8", "#1a7f37", "#c0392b"), strict=False))
    if several:
        for axes, way in zip(places[0], ways, strict=True):
            own = sorted((row for row in rows if row["reduction"] == way), key=lambda row: -row["scale"])
            for name in names:
                points = [1 / row["scale"] for row in own], [row["accuracy"][name] for row in own]
                axes.plot(*points, "o-", ms=3, color=palette.get(name), label=name)
            axes.set_title(way)
            axes.set_xlabel("times smaller")
    else:
        axes = places[0, 0]
        for i, name in enumerate(names):
            x = np.arange(len(rows)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            axes.bar(x, [row["accuracy"][name] for row in rows], 0.8 / len(names), color=palette.get(name), label=name)
        axes.set_xticks(range(len(rows)), ways)
    for axes in places[0]:
        axes.axhline(original, color="#555555", linestyle="--", linewidth=1, label="Original")
    places[0, 0].set_ylabel("accuracy")
    figure.legend(*places[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)
