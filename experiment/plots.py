"""Every figure; the only module that imports matplotlib."""

import json
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiment.metrics import HEADINGS, table_cells
from models.files import write_atomically

GOOD, BAD, PLAIN = "#1a7f37", "#c0392b", "#30363d"
COLOURS = {"Original": PLAIN, "Small": "#8b949e", "Bilinear": "#d1700a", "Bicubic": "#b5a642", "DarioNet": "#0b6fb8"}
FEW = 40  # classes: up to here each is a point with a name, above they are a density
SERIES = ("#0b6fb8", "#d1700a")
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.3, "figure.dpi": 100, "savefig.dpi": 150})


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], layout: str, **options):
    """As pyplot's, but no window is behind it: a run must not end because a screen does."""
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def show_window(path: Path) -> None:
    """Shows a PNG file in a window and waits until it is closed; does nothing without a screen."""
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
    axes.set_title(title, color=colour, fontsize=8)
    axes.set_axis_off()


def shorten(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def training_curves(history: list[dict], path: Path) -> None:
    """Loss, PSNR, and accuracy with agreement, over the epochs of history.csv."""
    epochs = [row["epoch"] for row in history]
    figure, (loss, psnr, share) = subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axes, name, keys in (
        (loss, "loss", ("train_loss", "val_loss")),
        (psnr, "PSNR (dB)", ("train_psnr_db", "val_psnr_db")),
        (share, "share of validation images", ("val_accuracy", "val_agreement")),
    ):
        for key, colour in zip(keys, SERIES, strict=True):
            values = [np.nan if row[key] is None else row[key] for row in history]
            if not np.isnan(values).all():
                label = (
                    key.split("_")[1]
                    if axes is share
                    else {"train": "training", "val": "validation"}[key.split("_")[0]]
                )
                axes.plot(epochs, values, "o-", ms=3, color=colour, label=label)
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    if min(row["train_loss"] for row in history) > 0:
        loss.set_yscale("log")
    save(figure, path)


def image_grid(columns: dict[str, list[Tensor]], titles: list[list[tuple[str, str]]] | None, path: Path) -> None:
    """Rows of images under named columns; `titles` may add a (text, colour) above every image, row by row."""
    rows = len(next(iter(columns.values())))
    figure, axes = subplots(
        rows,
        len(columns),
        figsize=(1.9 * len(columns), (2.15 if titles else 1.95) * rows),
        squeeze=False,
        layout="constrained",
    )
    for c, (name, images) in enumerate(columns.items()):
        for r, image in enumerate(images):
            text, colour = titles[r][c] if titles else ("", PLAIN)
            show_image(axes[r, c], image, shorten(text), colour)
        axes[0, c].annotate(
            name, (0.5, 1.16 if titles else 1.04), xycoords="axes fraction", ha="center", fontsize=10, fontweight="bold"
        )
    save(figure, path)


def results_table(variants: list[dict], caption: str, path: Path) -> None:
    """The results table as a figure, DarioNet's row set off."""
    cells = table_cells(variants)
    widths = [max(len(row[i]) for row in [HEADINGS, *cells]) + 2 for i in range(len(HEADINGS))]
    figure, axes = subplots(figsize=(0.085 * sum(widths), 0.3 * (len(cells) + 2)), layout="constrained")
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
        if row == 0 or cells[row - 1][0] == "DarioNet":
            cell.set_text_props(fontweight="bold")
        if row and cells[row - 1][0] == "DarioNet":
            cell.set_facecolor("#e8f1fa")
    axes.set_title(caption, fontsize=9, color=PLAIN)
    save(figure, path)


def scales(rows: list[tuple[str, list[Tensor]]], headings: list[str], path: Path) -> None:
    """What is left of an image at several scales: a row of images per scale, named at its left."""
    figure, axes = subplots(
        len(rows), len(headings), figsize=(2.2 * len(headings), 2.2 * len(rows)), squeeze=False, layout="constrained"
    )
    for r, (name, images) in enumerate(rows):
        for c, image in enumerate(images):
            show_image(axes[r, c], image, headings[c] if r == 0 else "")
        axes[r, 0].annotate(name, (-0.06, 0.5), xycoords="axes fraction", rotation=90, va="center", ha="right")
    save(figure, path)


def panels(images: list[tuple[str, Tensor, str]], columns: int, path: Path) -> None:
    """Images with what they are above and what the classifier says below."""
    rows = -(-len(images) // columns)
    figure, axes = subplots(rows, columns, figsize=(3.1 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for place in axes.flat:
        place.set_axis_off()
    for place, (title, image, verdict) in zip(axes.flat, images, strict=False):
        show_image(place, image, nearest=max(image.shape[-2:]) < 128)
        place.set_title(title, fontsize=9, fontweight="bold")
        place.annotate(verdict, (0.5, -0.02), xycoords="axes fraction", ha="center", va="top", fontsize=9)
    save(figure, path)


def by_class(classes: list[dict]) -> dict[str, dict[str, float]]:
    """Variant -> class -> F1, from the rows of classes.csv."""
    table: dict[str, dict[str, float]] = {}
    for row in classes:
        table.setdefault(row["variant"], {})[row["class"]] = row["f1"]
    return table


def f1_difference(classes: list[dict], path: Path) -> None:
    """Distribution over the classes of what rebuilding costs: F1 on the original minus F1 on the rebuilt image."""
    f1 = by_class(classes)
    figure, axes = subplots(figsize=(7, 3.6), layout="constrained")
    original = f1["Original"]
    differences = {v: np.array([original[c] - f1[v][c] for c in original]) for v in ("Bilinear", "DarioNet")}
    everything = np.concatenate(list(differences.values()))
    bins = np.linspace(min(everything.min(), -0.05), max(everything.max(), 0.05), 25)
    for variant, values in differences.items():
        axes.hist(values, bins, color=COLOURS[variant], alpha=0.55, label=f"{variant}, mean {values.mean():.3f}")
        axes.axvline(values.mean(), color=COLOURS[variant], lw=1.5)
    axes.axvline(0, color=PLAIN, lw=0.8)
    axes.set_xlabel("F1 on the original - F1 on the rebuilt image")
    axes.set_ylabel(f"classes, of {len(original)}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    save(figure, path)


def f1_density(classes: list[dict], path: Path) -> None:
    """The same difference against the F1 on the original: a named point a class, or a density where they are many."""
    f1, labels = by_class(classes), {row["class"]: row["label"] for row in classes}
    names = list(f1["Original"])
    x = np.array([f1["Original"][c] for c in names])
    y = x - np.array([f1["DarioNet"][c] for c in names])
    figure, axes = subplots(figsize=(7, 5), layout="constrained")
    if len(names) > FEW:
        density = axes.hexbin(x, y, gridsize=28, mincnt=1, cmap="viridis")
        figure.colorbar(density, label="classes")
    else:
        axes.scatter(x, y, color=COLOURS["DarioNet"])
        for name, a, b in zip(names, x, y, strict=True):
            axes.annotate(shorten(labels[name], 18), (a, b), (4, 3), textcoords="offset points", fontsize=8)
        axes.margins(0.12)
    axes.axhline(0, color=PLAIN, lw=0.8)
    axes.set_xlabel("F1 on the original")
    axes.set_ylabel("F1 on the original - F1 on DarioNet's image")
    save(figure, path)


def class_bars(classes: list[dict], path: Path, count: int = 10) -> None:
    """The classes that are hardest for DarioNet, those it improves most over bilinear, those it worsens most."""
    f1, labels = by_class(classes), {row["class"]: row["label"] for row in classes}
    dario, bilinear, original = f1["DarioNet"], f1["Bilinear"], f1["Original"]
    names = list(original)
    choices = (
        ("hardest", sorted(names, key=lambda c: dario[c])),
        ("most improved over bilinear", sorted(names, key=lambda c: bilinear[c] - dario[c])),
        ("furthest below the original", sorted(names, key=lambda c: dario[c] - original[c])),
    )
    shown = min(count, len(names))
    figure, places = subplots(1, 3, figsize=(13, 0.36 * shown + 1.2), layout="constrained", sharex=True)
    for axes, (title, order) in zip(places, choices, strict=True):
        rows = np.arange(shown)
        for offset, (variant, values) in zip(
            (-0.27, 0, 0.27),
            (
                ("Original", original),
                ("DarioNet", dario),
                ("Bilinear", bilinear),
            ),
            strict=True,
        ):
            heights = [values[c] for c in order[:shown]]
            axes.barh(rows + offset, heights, 0.25, color=COLOURS[variant], label=variant)
        axes.set_yticks(rows, [shorten(labels[c], 24) for c in order[:shown]])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("F1")
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def decision_strip(rows: list[dict], path: Path) -> None:
    """Every image as a column: right or wrong for every variant, sorted so that equal fates stand together."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    right = {(row["image"], row["variant"]): row["correct"] for row in rows}
    images = list(dict.fromkeys(row["image"] for row in rows))
    key = [v for v in ("Original", "DarioNet", "Bilinear") if v in variants]
    images.sort(key=lambda i: [-right[i, v] for v in key])
    grid = np.array([[right[i, v] for i in images] for v in variants])
    figure, axes = subplots(figsize=(10, 0.42 * len(variants) + 1.4), layout="constrained")
    colours = matplotlib.colors.ListedColormap([BAD, "#9fd3ac"])
    axes.imshow(
        grid,
        aspect="auto",
        cmap=colours,
        vmin=0,
        vmax=1,
        interpolation="nearest" if len(images) < 3000 else "antialiased",
    )
    axes.set_yticks(range(len(variants)), [f"{v}: {grid[r].mean():.1%} right" for r, v in enumerate(variants)])
    axes.set_xlabel(f"{len(images)} images, sorted by who is right")
    axes.grid(visible=False)
    b, d = grid[variants.index("Bilinear")], grid[variants.index("DarioNet")]
    axes.set_title(
        f"DarioNet flips {int(((b == 0) & (d == 1)).sum())} decisions on the bilinear image to right, "
        f"{int(((b == 1) & (d == 0)).sum())} to wrong"
    )
    save(figure, path)


def pipeline_figure(stages: list[tuple[str, Tensor]], scores: list[tuple[str, float]], path: Path) -> None:
    """What happens to one image, stage by stage, and the classifier's five highest probabilities at the end."""
    figure, places = subplots(1, len(stages) + 1, figsize=(2.7 * (len(stages) + 1), 2.9), layout="constrained")
    for axes, (title, image) in zip(places, stages, strict=False):
        show_image(axes, image, f"{title}\n{image.shape[-1]} x {image.shape[-2]}")
        axes.annotate("→", (1.06, 0.5), xycoords="axes fraction", fontsize=16, ha="center", va="center")
    axes = places[-1]
    axes.barh(range(len(scores)), [p for _, p in scores], color=COLOURS["DarioNet"])
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
                page.text(MARGIN / A4[0], 1 - top / A4[1], line, fontsize=size, va="top", **style)
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
                write(line, 8, family="monospace")
            turn()

    write_atomically(path, pages)


def flattened(values: dict, prefix: str = "") -> list[str]:
    """A line `section.key  value` for every parameter."""
    lines = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += flattened(value, f"{name}.") if isinstance(value, dict) else [f"{name:55} {json.dumps(value)}"]
    return lines
