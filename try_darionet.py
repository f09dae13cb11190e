"""What does DarioNet make of one image? Figures, and what the classifier reads in them.

    python try_darionet.py img.jpg                       reduces it, rebuilds it, compares
    python try_darionet.py --small thumbnail.png         the image is small already: rebuilds and classifies it
    python try_darionet.py --small folder                the same for every image below a folder: predictions.csv, and
                                                         a sheet of some of them: small.png
    python try_darionet.py --small folder --save OUT     and every rebuilt image as a PNG file below OUT
    python try_darionet.py img.jpg --weights assets/logs/train_20260101-120000/best.pt
    python try_darionet.py img.jpg --parameters examples/shapes/parameters.json

It computes in float32; --set test.precision=auto is faster if the device has bf16 units, and changes some decisions.
Files go to assets/logs/try_<stamp>_<image>/; a window opens if there is a screen. If no DarioNet was trained yet, the
network of examples/photographs is taken with its classifier.

--save works for one image and for a photograph too. What is transparent becomes white, and of several frames the first
is taken. Paths below OUT are those below the folder: a.png keeps its name,
a.jpg becomes a.jpg.png (and a.jpg.png, which must not be the same, a.jpg.png.png); a name that gets too long ends in a
hash. The same command goes on after a folder's run was stopped: a file that already exists is not rebuilt again. Its
row of predictions.csv names it and is otherwise empty; the run that made it had its predictions. --overwrite rebuilds
all.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from experiment import plots
from experiment.data import ImageTree, photograph, small_batches, to_float, whole_small
from experiment.evaluation import ask, draw_sheet, full_size, output_name, save_images, to_rebuild
from experiment.metrics import BASELINE, write_csv, write_json
from experiment.parameters import Parameters, parameters_or_shipped
from experiment.runtime import Runtime, Stopper, new_run_folder, progress_bar, start_runtime
from experiment.sampling import refuse_overlap
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_upscalers, other_input, other_size, to_device
from models.errors import InputError
from models.images import UnreadableImage, read_image
from models.pipeline import Enlarge, Pipeline, unchanged
from models.scaler import Reduction, reduced_length

FACTORS = (2, 3, 4, 5, 6)  # of the reductions in scales.png
SHOWN = 6  # images of a folder in small.png
COLUMNS = ("class", "label", "probability")  # of a prediction


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("image", help="an image, or with --small a folder of images")
    parser.add_argument("--small", action="store_true", help="the image is small already: do not reduce it")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks (default: darionet.weights)")
    parser.add_argument("--save", type=Path, metavar="OUT", help="a folder for rebuilt images, PNG files")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    arguments = parser.parse_args()
    parameters = parameters_or_shipped(arguments.parameters, arguments.set, arguments.weights)
    path, is_small, target = Path(arguments.image), arguments.small, None
    if not path.exists():
        raise InputError(f"{path}: no such image")
    if path.is_dir() and not is_small:
        raise InputError(f"{path}: a folder; --small reads every image below it, test.py measures labelled folders")
    if arguments.save and path.is_dir():
        refuse_overlap(str(arguments.save), str(path))  # or a later run would read what this one writes
    elif arguments.save:
        target = arguments.save / output_name(path.name)
        if not to_rebuild([path], [target], arguments.overwrite):
            raise InputError(f"{target}: already exists; --overwrite replaces it")

    # The networks
    t, side = parameters.transformations, parameters.transformations.val_crop_size
    reduction = Reduction(t.scale, t.interpolation, t.antialias)
    weights = arguments.weights or [parameters.darionet.weights]
    runtime = start_runtime(parameters.test.precision, parameters.test.seed)
    classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    classifier.check(side, "transformations.val_crop_size")
    restores = {BASELINE: Enlarge("bilinear")}
    restores |= load_upscalers(weights, None, runtime.device, t.interpolation, t.antialias)
    rows = [Pipeline(name, classifier, unchanged, restore) for name, restore in restores.items()]  # ours last
    print(f"Machine: {runtime.describe()}")
    if path.is_dir():
        with Stopper() as stopper:
            return read_folder(path, rows, weights, parameters, runtime, stopper, arguments.save, arguments.overwrite)

    # One image
    try:
        if is_small:
            image = whole_small(side)(read_image(path), 0)
            notes = [other_size(weights[-1], min(image.shape[-2:]), side)]
        else:
            image = photograph(path, t.resize_size, side)
            notes = [other_input(one, reduction) for one in weights]
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from None
    for note in filter(None, notes):
        print(note)
    folder = run_folder(path, parameters)
    images = to_float(image[None], runtime.device)
    if is_small:
        asked, saved = {row.name: row for row in rows}, rows[-1]
    else:
        draw_scales(images, rows, reduction, runtime, folder / "scales.png")
        order = [rows[0], *rows[:0:-1]]
        reduced = [Pipeline(row.name, classifier, reduction, row.restore) for row in order]
        asked, saved = {f"x{t.scale}, {row.name}": row for row in reduced}, reduced[1]
        asked |= {"original": Pipeline("original", classifier, unchanged, unchanged)}
        asked |= {f"original rebuilt at x4, {row.name}": row for row in order[1:]}
    panels, predictions = [], []
    for title, pipeline in asked.items():
        _, rebuilt, ((best,),) = ask(pipeline, images, runtime, full_size(images.shape, side))
        panels.append((title, rebuilt[0], f"{plots.shorten(best['label'], 28)} {best['probability']:.1%}"))
        predictions.append({"of": title, **best})
        if target and pipeline is saved:
            save_images(rebuilt, [target], overwrite=True)
    if is_small:
        panels.insert(0, (f"as it came, {images.shape[-1]} x {images.shape[-2]} px", images[0], ""))
    figure = folder / ("small.png" if is_small else "classification.png")
    plots.panels(panels, 4 if is_small else len(rows), figure)

    file = {"file": str(target)} if target else {}
    write_json(folder / "predictions.json", {"image": str(path), **file, "predictions": predictions})
    width = max(len(p["of"]) for p in predictions)
    for p in predictions:
        print(f"{p['of']:{width}}  {p['label']} ({p['probability']:.1%})")
    if target:
        print(f"The rebuilt image: {target}")
    print(folder)
    plots.show_window(figure)
    return 0


def run_folder(path: Path, parameters: Parameters) -> Path:
    """A new folder named after the image, with the parameters in it."""
    folder = new_run_folder("try", "_" + (re.sub(r"[^\w-]+", "_", path.resolve().stem)[:60] or "image"))
    write_json(folder / "parameters.json", parameters.model_dump())
    return folder


def draw_scales(images, rows: list[Pipeline], reduction: Reduction, runtime: Runtime, path: Path) -> None:
    """The image, (1,3,H,W), reduced by every factor, and what the rows rebuild of it."""
    columns = {heading: [] for heading in ("original", "small", "bilinear", *(row.name for row in rows[1:]))}
    notes = []
    for factor in FACTORS:
        reduce = replace(reduction, scale=1 / factor)
        found = [ask(Pipeline(row.name, row.classifier, reduce, row.restore), images, runtime) for row in rows]
        small = found[0][0][0]
        notes.append(f"1/{factor}: {small.shape[-1]} x {small.shape[-2]} px")
        shown = images[0], small, *(rebuilt[0] for _, rebuilt, _ in found)
        for column, image in zip(columns.values(), shown, strict=True):
            column.append(image)
    plots.image_grid(columns, None, path, notes)


def read_folder(
    path: Path,
    rows: list[Pipeline],
    weights: list[str],
    parameters: Parameters,
    runtime: Runtime,
    stopper: Stopper,
    out: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Writes predictions.csv, one row per image, and to `out` what DarioNet rebuilt; returns 1 if one can't be read.

    Images of one size are read together, whatever their order. After Ctrl-C, SIGTERM or an error, such as a full disk,
    it writes the rows of the images that were read.
    """
    t, batch_size = parameters.transformations, parameters.test.batch_size
    side = t.val_crop_size
    dataset = ImageTree(str(path), whole_small(side))
    names, targets, chosen = dataset.paths, [], list(range(len(dataset)))
    if out:
        targets = [out / output_name(name) for name in names]
        chosen = to_rebuild([path / name for name in names], targets, overwrite)
    folder = run_folder(path, parameters)
    rows = rows[::-1]  # ours first
    blank = dict.fromkeys(["width", "height", *(f"{row.name.lower()}_{key}" for row in rows for key in COLUMNS)])
    first = [{"image": name} | ({"file": str(targets[i])} if out else {}) for i, name in enumerate(names)]
    lines, unreadable = {i: first[i] | blank for i in {*range(len(names))} - {*chosen}}, {}
    if before := len(lines):
        print(f"{before} of {len(names)} images were rebuilt before, in {out}, and stay; --overwrite rebuilds them")

    small_side = reduced_length(side, t.scale)  # so a batch takes the memory of one of test.py
    arriving = small_batches(dataset, chosen, parameters.data.workers, batch_size, small_side, stopper)
    try:
        with progress_bar(len(chosen), "reading", unit="image") as bar:
            for batch in arriving:
                if stopper.requested:
                    break
                unreadable |= dict(batch.unreadable)
                if places := batch.indices.tolist():
                    images = to_float(batch.images, runtime.device)
                    size = {"width": images.shape[-1], "height": images.shape[-2]}
                    new = [first[i] | blank | size for i in places]
                    for row in rows:
                        _, rebuilt, predictions = ask(row, images, runtime, full_size(images.shape, side))
                        for line, (best,) in zip(new, predictions, strict=True):
                            line |= {f"{row.name.lower()}_{key}": best[key] for key in COLUMNS}
                        if out and row is rows[0]:
                            save_images(rebuilt, [targets[i] for i in places], overwrite)
                    lines |= zip(places, new, strict=True)
                bar.update(len(places) + len(batch.unreadable))
    finally:
        count = len(lines) - before
        if unreadable:
            listed = [{"image": names[i], "reason": unreadable[i]} for i in sorted(unreadable)]
            write_csv(folder / "unreadable.csv", listed)
            print(f"{len(unreadable)} images could not be read: {folder / 'unreadable.csv'}")
        if lines:
            write_csv(folder / "predictions.csv", [lines[i] for i in sorted(lines)])
            print(f"{count} images read: {folder / 'predictions.csv'}" + (f"; rebuilt ones in {out}" if out else ""))
    if stopper.requested:
        goes_on = "; the same command goes on" if out else ""
        print(f"Stopped: {count + len(unreadable)} of {len(chosen)} images were looked at{goes_on}")
    if count:
        read = [line for _, line in sorted(lines.items()) if line["width"]]
        changed = sum(line[f"{rows[0].name.lower()}_class"] != line["bilinear_class"] for line in read)
        sure = (sum(line[f"{row.name.lower()}_probability"] for line in read) / count for row in rows)
        means = ", ".join(f"{p:.2f} for {row.name}" for row, p in zip(rows, sure, strict=True))
        print(f"{rows[0].name} changes {changed} of {count} decisions on bilinear images; mean probability {means}")

        def verdict(line: dict, row: str) -> tuple[str, str]:
            return f"{plots.shorten(line[f'{row}_label'], 16)} {line[f'{row}_probability']:.0%}", plots.PLAIN

        shown = read[:: -(-count // SHOWN)]
        verdicts = {line["image"]: [verdict(line, row.name.lower()) for row in rows[::-1]] for line in shown}
        with contextlib.suppress(UnreadableImage):  # one went away
            draw_sheet(rows[::-1], dataset, verdicts, runtime, folder / "small.png", side)
        sides = sorted(min(line["width"], line["height"]) for line in read)
        if note := other_size(weights[-1], sides[len(sides) // 2], side):
            print(note)
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


if __name__ == "__main__":
    run_script(main)
