"""What does DarioNet make of one image? Figures, and what the classifier reads in them.

    python try_darionet.py img.jpg                       reduces it, rebuilds it, compares
    python try_darionet.py --small thumbnail.png         the image is small already: rebuilds and classifies it
    python try_darionet.py --small folder                the same for every image below a folder: predictions.csv
    python try_darionet.py img.jpg --weights assets/logs/train_20260101-120000/best.pt
    python try_darionet.py img.jpg --parameters examples/shapes/parameters.json
    python try_darionet.py --export DarioNet.onnx        the network for other programs; or DarioNet.safetensors
    python try_darionet.py --export chain.onnx --with-classifier     from the small image to the classifier's scores

Files go to assets/logs/try_<stamp>_<image>/; a window opens where there is a screen. Where no DarioNet was trained yet,
the network of examples/photographs is taken with its classifier, if that is there.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiment import plots
from experiment.data import LONGEST, ImageTree, Transform, UnreadableImage, read_image, to_float
from experiment.metrics import BASELINE, require_finite, write_csv, write_json
from experiment.parameters import Parameters, read_parameters, run_script, script_parser
from experiment.runtime import Stopper, new_run_folder, progress_bar, seed_without_tf32, start_runtime
from models.classifier import open_classifier
from models.darionet import load_upscalers, other_input, other_size
from models.errors import InputError
from models.export import export
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.scaler import Reduction

FACTORS = (2, 3, 4, 5, 6)  # of the reductions in scales.png
LARGEST_SMALL = 1.5  # times val_crop_size: an image larger than that is not small
SMALLEST_LARGE = 0.5  # times val_crop_size: one smaller than that is no original
SHIPPED = Path(__file__).parent / "examples/photographs/parameters.json"


class Reader:
    """The networks, and one way to ask them: an image in, a rebuilt image and a prediction out."""

    def __init__(self, parameters: Parameters, weights: list[str]):
        t = self.t = parameters.transformations
        self.runtime = start_runtime(parameters.test.precision)
        seed_without_tf32(parameters.test.seed)
        self.reduction = Reduction(t.scale, t.interpolation, t.antialias)
        networks = load_upscalers(weights, parameters.darionet.initial_weights, self.runtime.device)
        self.restores = {BASELINE: Enlarge("bilinear")}  # by the name of the results table's row
        self.restores |= {name: Upscale(network, t.interpolation, t.antialias) for name, network in networks.items()}
        self.classifier = open_classifier(**parameters.classifier[0].model_dump())
        self.classifier.to(self.runtime.device, memory_format=torch.channels_last)
        self.classifier.require(t.val_crop_size, "transformations.val_crop_size")

    @property
    def networks(self) -> list[str]:
        """Names of the rows that a network rebuilds, DarioNet last."""
        return [name for name in self.restores if name != BASELINE]

    def pipeline(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Pipeline:
        """The pipeline of a row; `reduce` is `unchanged` for images that are small already."""
        return Pipeline(name, self.classifier, reduce, self.restores[name])

    @torch.no_grad()
    def read(
        self, pipeline: Pipeline, image: Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, dict]:
        """(1,3,H,W) in [0,1] -> the small and the rebuilt image, (3,h,w) each, and the prediction."""
        with self.runtime.autocast():
            small, rebuilt, logits = pipeline(image, size)
        probabilities = logits[0].float().softmax(0)
        require_finite(logits, f"the image of {pipeline.name}")
        index = int(probabilities.argmax())
        prediction = {
            "class": self.classifier.class_names[index],
            "label": self.classifier.labels[index],
            "probability": round(float(probabilities[index]), 6),
        }
        return small[0], rebuilt[0], prediction

    def load(self, path: Path, small: bool) -> Tensor:
        """The image as (1,3,H,W) in [0,1]: whole where it is `small`, else resized and cropped as for the test.

        Raises:
            UnreadableImage: no image; not small, or small already.
        """
        image = read_image(path)
        if not small:
            if min(image.size) < SMALLEST_LARGE * self.t.val_crop_size:
                raise UnreadableImage(f"{image.width}x{image.height} pixels: it looks small already; add --small")
            return to_float(Transform(self.t.resize_size, self.t.val_crop_size)(image, 0)[None], self.runtime.device)
        limit = int(LARGEST_SMALL * self.t.val_crop_size)
        if min(image.size) > limit or max(image.size) > 4 * limit:
            raise UnreadableImage(
                f"{image.width}x{image.height} pixels are not small (up to {limit}); leave out --small"
            )
        if max(image.size) > LONGEST * min(image.size):
            raise UnreadableImage(f"{image.width}x{image.height} pixels are a strip, too long to rebuild")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
        return to_float(pixels.permute(0, 3, 1, 2), self.runtime.device)

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
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the network as .onnx or .safetensors")
    parser.add_argument("--with-classifier", action="store_true", help="export all from the small image to the scores")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    arguments = parser.parse_args()
    if (arguments.image is None) == (arguments.export is None):
        parser.error("name an image, or --export FILE")
    if arguments.with_classifier and not arguments.export:
        parser.error("--with-classifier goes with --export FILE")
    parameters = parameters_or_shipped(arguments.parameters, arguments.set, arguments.weights)
    if arguments.export:
        t, weights = parameters.transformations, (arguments.weights or [parameters.darionet.weights])[-1]
        scaler = {"interpolation": t.interpolation, "antialias": t.antialias}
        classifier = parameters.classifier[0].model_dump() if arguments.with_classifier else None
        export(arguments.export, weights, t.val_crop_size, scaler, classifier, overwrite=arguments.overwrite)
        print(arguments.export)
        return 0
    path = Path(arguments.image)
    if not path.exists():
        raise InputError(f"{path}: no such image")
    if path.is_dir() and not arguments.small:
        raise InputError(
            f"{path}: a folder; add --small to read every image below it, test.py measures labelled folders"
        )
    weights = arguments.weights or [parameters.darionet.weights]
    reader = Reader(parameters, weights)
    for path_of_weights in weights if not arguments.small else ():
        if note := other_input(path_of_weights, reader.reduction):
            print(note)
    if path.is_dir():
        with Stopper() as stopper:
            return read_folder(reader, path, weights, parameters.model_dump(), stopper)
    try:
        image = reader.load(path, arguments.small)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from None
    if arguments.small and (note := other_size(weights[-1], min(image.shape[-2:]), reader.t.val_crop_size)):
        print(note)
    folder = run_folder(path)
    write_json(folder / "parameters.json", parameters.model_dump())
    read = read_small if arguments.small else read_image_of_full_size
    predictions = read(reader, image, folder)
    write_json(folder / "predictions.json", {"image": str(path), "predictions": predictions})
    width = max(len(p["of"]) for p in predictions)
    for p in predictions:
        print(f"{p['of']:{width}}  {p['label']} ({p['probability']:.1%})")
    print(folder)
    plots.show_window(folder / ("small.png" if arguments.small else "classification.png"))
    return 0


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


def read_image_of_full_size(reader: Reader, image: Tensor, folder: Path) -> list[dict]:
    """Writes scales.png and classification.png; returns the predictions."""
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
        panels.append((title, rebuilt, verdict(prediction)))
        predictions.append({"of": title, **prediction})
    plots.panels(panels, len(names) + 1, folder / "classification.png")
    return predictions


def read_small(reader: Reader, image: Tensor, folder: Path) -> list[dict]:
    """Writes small.png; returns the predictions."""
    panels, predictions = [], []
    for name in [BASELINE, *reader.networks]:
        small, rebuilt, prediction = reader.read(reader.pipeline(name, unchanged), image, reader.full_size(image))
        panels.append((name, rebuilt, verdict(prediction)))
        predictions.append({"of": name, **prediction})
    first = (f"as it came, {small.shape[-1]} x {small.shape[-2]} px", small, "")
    plots.panels([first, *panels], 4, folder / "small.png")
    return predictions


def read_folder(reader: Reader, path: Path, weights: list[str], parameters: dict, stopper: Stopper) -> int:
    """Writes predictions.csv, one row an image; returns 1 where an image could not be read.

    After Ctrl-C or SIGTERM it writes the rows of the images that were read.
    """
    paths = ImageTree(str(path)).paths
    folder = run_folder(path)
    write_json(folder / "parameters.json", parameters)
    rows, unreadable = [], []
    bar = progress_bar(len(paths), "reading", unit="image")
    for name in paths:
        bar.update()
        if stopper.requested:
            print(f"Stopped: {len(rows) + len(unreadable)} of {len(paths)} images were looked at")
            break
        try:
            image = reader.load(path / name, small=True)
        except UnreadableImage as error:
            unreadable.append({"image": name, "reason": str(error)})
            continue
        row = {"image": name, "width": image.shape[-1], "height": image.shape[-2]}
        for variant in [*reader.networks[::-1], BASELINE]:
            prediction = reader.read(reader.pipeline(variant, unchanged), image, reader.full_size(image))[2]
            row |= {f"{variant.lower()}_{key}": value for key, value in prediction.items()}
        rows.append(row)
    bar.close()
    if unreadable:
        write_csv(folder / "unreadable.csv", unreadable)
        print(f"{len(unreadable)} images could not be read: {folder / 'unreadable.csv'}")
    if rows:
        write_csv(folder / "predictions.csv", rows)
        print(f"{len(rows)} images read: {folder / 'predictions.csv'}")
        sides = sorted(min(row["width"], row["height"]) for row in rows)
        if note := other_size(weights[-1], sides[len(sides) // 2], reader.t.val_crop_size):
            print(note)
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


if __name__ == "__main__":
    run_script(main)
