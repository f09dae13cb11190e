"""What does DarioNet make of one image? Figures, and what the classifier reads in them.

    python try_darionet.py img.jpg                       reduces it, rebuilds it, compares
    python try_darionet.py --small thumbnail.png         the image is small already: rebuilds and classifies it
    python try_darionet.py --small folder                the same for every image below a folder: predictions.csv
    python try_darionet.py --small folder --save OUT     and every rebuilt image as a PNG file below OUT
    python try_darionet.py img.jpg --weights assets/logs/train_20260101-120000/best.pt
    python try_darionet.py img.jpg --parameters examples/shapes/parameters.json
    python try_darionet.py --export DarioNet.onnx        the network for other programs; or DarioNet.safetensors
    python try_darionet.py --export chain.onnx --with-classifier     from the small image to the classifier's scores
    python try_darionet.py --web                         a page in the browser, to play with

Files go to assets/logs/try_<stamp>_<image>/; a window opens where there is a screen. Where no DarioNet was trained yet,
the network of examples/photographs is taken with its classifier, if that is there.

--save works for one image and for a photograph too. Paths below OUT are those below the folder: a.png keeps its name,
a.jpg becomes a.jpg.png (and a.jpg.png, which must not be the same, a.jpg.png.png); a name that gets too long ends in a
hash. The same command goes on where a run of a folder stopped: a file that is there is not rebuilt again. Its row of
predictions.csv names it and is empty else; the run that made it had its predictions. --overwrite rebuilds all.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiment import plots
from experiment.data import (
    ImageTree,
    Transform,
    Whole,
    batches,
    batches_of_one_size,
    to_float,
)
from experiment.evaluation import output_name, save_images, to_rebuild
from experiment.metrics import BASELINE, require_finite, write_csv, write_json
from experiment.parameters import Parameters, read_parameters
from experiment.runtime import (
    Stopper,
    new_run_folder,
    out_of_memory_is_one_line,
    progress_bar,
    seed_without_tf32,
    start_runtime,
)
from experiment.sampling import refuse_overlap
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_upscalers, other_input, other_size, to_device
from models.errors import InputError
from models.export import export
from models.images import UnreadableImage, read_image
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.scaler import Reduction, reduced_length

FACTORS = (2, 3, 4, 5, 6)  # of the reductions in scales.png
LARGEST_SMALL = 1.5  # times val_crop_size: an image larger than that is not small
SMALLEST_LARGE = 0.5  # times val_crop_size: one smaller than that is no original
READ_AT_ONCE = 16  # images that a worker reads before it hands them over
WAITING = 16  # times the pixels of a batch: so many may wait for more images of their size
COLUMNS = ("class", "label", "probability")  # of a prediction
SHIPPED = Path(__file__).parent / "examples/photographs/parameters.json"


class Reader:
    """The networks, and one way to ask them: an image in, a rebuilt image and a prediction out."""

    def __init__(self, parameters: Parameters, weights: list[str]):
        t = self.t = parameters.transformations
        self.runtime = start_runtime(parameters.test.precision)
        self.batch_size = parameters.test.batch_size
        seed_without_tf32(parameters.test.seed)
        self.reduction = Reduction(t.scale, t.interpolation, t.antialias)
        networks = load_upscalers(weights, parameters.darionet.initial_weights, self.runtime.device)
        self.restores = {BASELINE: Enlarge("bilinear")}  # by the name of the results table's row
        self.restores |= {name: Upscale(network, t.interpolation, t.antialias) for name, network in networks.items()}
        self.classifier = to_device(open_classifier(**parameters.classifier.model_dump()), self.runtime.device)
        self.classifier.check(t.val_crop_size, "transformations.val_crop_size")

    @property
    def networks(self) -> list[str]:
        """Names of the rows that a network rebuilds, DarioNet last."""
        return [name for name in self.restores if name != BASELINE]

    def pipeline(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Pipeline:
        """The pipeline of a row; `reduce` is `unchanged` for images that are small already."""
        return Pipeline(name, self.classifier, reduce, self.restores[name])

    def read(
        self, pipeline: Pipeline, image: Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, dict]:
        """(1,3,H,W) in [0,1] -> the small and the rebuilt image, (3,h,w) each, and the prediction."""
        small, rebuilt, predictions = self.read_batch(pipeline, image, size)
        return small[0], rebuilt[0], predictions[0][0]

    @torch.no_grad()
    def read_batch(
        self, pipeline: Pipeline, images: Tensor, size: tuple[int, int] | None = None, count: int = 1
    ) -> tuple[Tensor, Tensor, list[list[dict]]]:
        """(N,3,H,W) in [0,1] -> the small and the rebuilt images, (N,3,h,w) each, and the `count` best predictions of
        each, where there are as many classes, the best first."""
        with self.runtime.autocast():
            small, rebuilt, logits = pipeline(images, size)
        require_finite(logits, f"the image of {pipeline.name}")
        names, labels = self.classifier.class_names, self.classifier.labels
        best = logits.float().softmax(1).topk(min(count, len(names)))
        predictions = [
            [dict(zip(COLUMNS, (names[i], labels[i], round(p, 6)), strict=True)) for i, p in zip(*pair, strict=True)]
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return small, rebuilt, predictions

    def load(self, path: Path, small: bool) -> Tensor:
        """The image as (1,3,H,W) in [0,1]: whole where it is `small`, else resized and cropped as for the test.

        Raises:
            UnreadableImage: no image; not small, or small already.
        """
        image = read_image(path)
        if not small and min(image.size) < SMALLEST_LARGE * self.t.val_crop_size:
            raise UnreadableImage(f"{image.width}x{image.height} pixels: it looks small already; add --small")
        transform = self.whole() if small else Transform(self.t.resize_size, self.t.val_crop_size)
        return to_float(transform(image, 0)[None], self.runtime.device)

    def whole(self) -> Whole:
        """What takes images that are small already, and refuses others."""
        return Whole(int(LARGEST_SMALL * self.t.val_crop_size))

    @property
    def pixels(self) -> int:
        """Small pixels of a batch: those of `batch_size` images that were reduced as for the test."""
        return self.batch_size * reduced_length(self.t.val_crop_size, self.t.scale) ** 2

    def full_batch(self, height: int, width: int) -> int:
        """How many images of this size are read at once: with as many small pixels, and rebuilt ones, at most."""
        rebuilt = self.batch_size * min(height, width) / max(height, width)
        return max(1, int(min(self.pixels / (height * width), rebuilt)))

    def full_size(self, small: Tensor) -> tuple[int, int]:
        """(height, width) that a small image is rebuilt to: its shorter side as long as the classifier's crops."""
        height, width = small.shape[-2:]
        factor = self.t.val_crop_size / min(height, width)
        return round(height * factor), round(width * factor)


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("image", nargs="?", help="an image, or with --small a folder of images")
    parser.add_argument("--small", action="store_true", help="the image is small already: do not reduce it")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks (default: darionet.weights)")
    parser.add_argument("--save", type=Path, metavar="OUT", help="a folder for rebuilt images, PNG files")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the network as .onnx or .safetensors")
    parser.add_argument("--with-classifier", action="store_true", help="export all from the small image to the scores")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--web", action="store_true", help="a page in the browser (needs gradio)")
    arguments = parser.parse_args()
    if arguments.image is None and not arguments.web and not arguments.export:
        parser.error("name an image, --web or --export FILE")
    if arguments.export and (arguments.image or arguments.web):
        parser.error("--export FILE goes without an image and without --web")
    if arguments.with_classifier and not arguments.export:
        parser.error("--with-classifier goes with --export FILE")
    if arguments.save and not arguments.image:
        parser.error("--save OUT goes with an image or a folder")
    if arguments.web and arguments.small:
        parser.error("--web reduces large images: leave out --small")
    serve = web_server() if arguments.web else None  # before the networks are read
    parameters = parameters_or_shipped(arguments.parameters, arguments.set, arguments.weights)
    weights = arguments.weights or [parameters.darionet.weights]
    if arguments.export:
        t = parameters.transformations
        scaler = {"interpolation": t.interpolation, "antialias": t.antialias}
        classifier = parameters.classifier.model_dump() if arguments.with_classifier else None
        export(arguments.export, weights[-1], t.val_crop_size, scaler, classifier, overwrite=arguments.overwrite)
        print(arguments.export)
        return 0
    if serve:
        return serve(Reader(parameters, weights), weights, arguments.image)
    path = Path(arguments.image)
    if not path.exists():
        raise InputError(f"{path}: no such image")
    if path.is_dir() and not arguments.small:
        raise InputError(
            f"{path}: a folder; add --small to read every image below it, test.py measures labelled folders"
        )
    target = None
    if arguments.save and path.is_dir():
        refuse_overlap(str(arguments.save), str(path))  # or a later run would read what this one writes
    elif arguments.save:
        target = arguments.save / output_name(path.name)
        if not to_rebuild([path], [target], arguments.overwrite):
            raise InputError(f"{target}: is there already; --overwrite replaces it")
    reader = Reader(parameters, weights)
    for path_of_weights in weights if not arguments.small else ():
        if note := other_input(path_of_weights, reader.reduction):
            print(note)
    if path.is_dir():
        with Stopper() as stopper:
            return read_folder(reader, path, weights, parameters, stopper, arguments.save, arguments.overwrite)
    try:
        image = reader.load(path, arguments.small)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from None
    if arguments.small and (note := other_size(weights[-1], min(image.shape[-2:]), reader.t.val_crop_size)):
        print(note)
    folder = run_folder(path)
    write_json(folder / "parameters.json", parameters.model_dump())
    read = read_small if arguments.small else read_image_of_full_size
    predictions = read(reader, image, folder, target)
    file = {"file": str(target)} if target else {}
    write_json(folder / "predictions.json", {"image": str(path), **file, "predictions": predictions})
    width = max(len(p["of"]) for p in predictions)
    for p in predictions:
        print(f"{p['of']:{width}}  {p['label']} ({p['probability']:.1%})")
    if target:
        print(f"The rebuilt image: {target}")
    print(folder)
    plots.show_window(folder / ("small.png" if arguments.small else "classification.png"))
    return 0


def web_server() -> Callable:
    """examples.web.serve, which needs an extra.

    Raises:
        InputError: gradio is not installed.
    """
    try:
        from examples.web import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("--web needs gradio: pip install gradio, then pip install -r requirements.txt") from None
    return serve


def parameters_or_shipped(file: str | None, settings: list[str], weights: list[str] | None) -> Parameters:
    """The parameters; those of the shipped network where none is named and the default's weights are absent."""
    parameters = read_parameters(file or "parameters.json", settings)
    if file is None and not weights and not Path(parameters.darionet.weights).is_file() and SHIPPED.is_file():
        shipped = read_parameters(SHIPPED, settings)
        if Path(shipped.darionet.weights).is_file():
            print(f"{parameters.darionet.weights} is not there: taking {shipped.darionet.weights} and its classifier")
            return shipped
    return parameters


def run_folder(path: Path) -> Path:
    return new_run_folder("try", "_" + (re.sub(r"[^\w-]+", "_", path.resolve().stem)[:60] or "image"))


def verdict(prediction: dict) -> str:
    return f"{plots.shorten(prediction['label'], 28)} {prediction['probability']:.1%}"


def read_image_of_full_size(reader: Reader, image: Tensor, folder: Path, target: Path | None = None) -> list[dict]:
    """Writes scales.png, classification.png and, to `target`, what DarioNet rebuilt; returns the predictions."""
    names = reader.networks
    rows = []
    for factor in FACTORS:
        reduction = replace(reader.reduction, scale=1 / factor)
        results = {name: reader.read(reader.pipeline(name, reduction), image) for name in [BASELINE, *names]}
        small = results[BASELINE][0]
        row = [image[0], small, *(rebuilt for _, rebuilt, _ in results.values())]
        rows.append((f"1/{factor}: {small.shape[-1]} x {small.shape[-2]} px", row))
    plots.scales(rows, ["original", "small", "bilinear", *names], folder / "scales.png")

    order = names[::-1]
    wanted = [(f"x{reader.reduction.scale}, {name}", name, reader.reduction) for name in [BASELINE, *order]]
    wanted += [("original", BASELINE, unchanged)]
    wanted += [(f"original rebuilt at x4, {name}", name, unchanged) for name in order]
    panels, predictions = [], []
    for title, name, reduce in wanted:
        _, rebuilt, prediction = reader.read(reader.pipeline(name, reduce), image)
        if target and name == names[-1] and reduce is reader.reduction:
            save_images(rebuilt[None], [target], overwrite=True)
        panels.append((title, rebuilt, verdict(prediction)))
        predictions.append({"of": title, **prediction})
    plots.panels(panels, len(names) + 1, folder / "classification.png")
    return predictions


def read_small(reader: Reader, image: Tensor, folder: Path, target: Path | None = None) -> list[dict]:
    """Writes small.png and, to `target`, what DarioNet rebuilt; returns the predictions."""
    panels, predictions = [], []
    for name in [BASELINE, *reader.networks]:
        small, rebuilt, prediction = reader.read(reader.pipeline(name, unchanged), image, reader.full_size(image))
        panels.append((name, rebuilt, verdict(prediction)))
        predictions.append({"of": name, **prediction})
    if target:
        save_images(rebuilt[None], [target], overwrite=True)
    first = (f"as it came, {small.shape[-1]} x {small.shape[-2]} px", small, "")
    plots.panels([first, *panels], 4, folder / "small.png")
    return predictions


def read_folder(
    reader: Reader,
    path: Path,
    weights: list[str],
    parameters: Parameters,
    stopper: Stopper,
    out: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Writes predictions.csv, one row an image, and to `out` what DarioNet rebuilt; returns 1 where one can't be read.

    Images of one size are read together, whatever their order. After Ctrl-C, SIGTERM or an error, such as a full disk,
    it writes the rows of the images that were read.
    """
    dataset = ImageTree(str(path), reader.whole())
    names, targets, chosen = dataset.paths, [], list(range(len(dataset)))
    if out:
        targets = [out / output_name(name) for name in names]
        chosen = to_rebuild([path / name for name in names], targets, overwrite)
    folder = run_folder(path)
    write_json(folder / "parameters.json", parameters.model_dump())
    variants = [*reader.networks[::-1], BASELINE]
    columns = ["image", *(["file"] if out else []), "width", "height"]
    blank = dict.fromkeys([*columns, *(f"{variant.lower()}_{key}" for variant in variants for key in COLUMNS)])

    def row_of(i: int) -> dict:
        return blank | {"image": names[i]} | ({"file": str(targets[i])} if out else {})

    rows, unreadable = {i: row_of(i) for i in {*range(len(names))} - {*chosen}}, {}
    if there := len(rows):
        print(f"{there} of {len(names)} images were rebuilt before, in {out}, and stay; --overwrite rebuilds them")

    parts = [chosen[i : i + READ_AT_ONCE] for i in range(0, len(chosen), READ_AT_ONCE)]
    arriving = batches(dataset, parts, parameters.data.workers, stopper=stopper)
    bar = progress_bar(len(chosen), "reading", unit="image")
    try:
        with bar, out_of_memory_is_one_line(reader.runtime, reader.batch_size, "test.batch_size"):
            for batch in batches_of_one_size(arriving, reader.full_batch, WAITING * reader.pixels):
                if stopper.requested:
                    break
                unreadable |= dict(batch.unreadable)
                places = batch.indices.tolist()
                if places:
                    images = to_float(batch.images, reader.runtime.device)
                    new = [row_of(i) | {"width": images.shape[-1], "height": images.shape[-2]} for i in places]
                    for variant in variants:
                        pipeline = reader.pipeline(variant, unchanged)
                        _, rebuilt, predictions = reader.read_batch(pipeline, images, reader.full_size(images))
                        for row, (prediction,) in zip(new, predictions, strict=True):
                            row |= {f"{variant.lower()}_{key}": value for key, value in prediction.items()}
                        if out and variant == variants[0]:
                            save_images(rebuilt, [targets[i] for i in places], overwrite)
                    rows |= zip(places, new, strict=True)
                bar.update(len(places) + len(batch.unreadable))
    finally:
        read = len(rows) - there
        if unreadable:
            listed = [{"image": names[i], "reason": unreadable[i]} for i in sorted(unreadable)]
            write_csv(folder / "unreadable.csv", listed)
            print(f"{len(unreadable)} images could not be read: {folder / 'unreadable.csv'}")
        if rows:
            write_csv(folder / "predictions.csv", [rows[i] for i in sorted(rows)])
            print(f"{read} images read: {folder / 'predictions.csv'}" + (f"; rebuilt ones in {out}" if out else ""))
    if stopper.requested:
        goes_on = "; the same command goes on" if out else ""
        print(f"Stopped: {read + len(unreadable)} of {len(chosen)} images were looked at{goes_on}")
    if read:
        sides = sorted(min(row["width"], row["height"]) for row in rows.values() if row["width"])
        if note := other_size(weights[-1], sides[len(sides) // 2], reader.t.val_crop_size):
            print(note)
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


if __name__ == "__main__":
    run_script(main)
