"""What does DarioNet make of one image? Figures, and what the classifier reads in them.

    python try_darionet.py img.jpg                       reduces it, rebuilds it, compares
    python try_darionet.py --small thumbnail.png         the image is small already: rebuilds and classifies it
    python try_darionet.py --small folder                the same for every image below a folder: predictions.csv
    python try_darionet.py img.jpg --weights assets/logs/train_20260101-120000/best.pt
    python try_darionet.py img.jpg --parameters examples/shapes/parameters.json

Files go to assets/logs/try_<stamp>_<image>/; a window opens where there is a screen.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds of the imports ends it without a traceback

import re
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from experiment import plots
from experiment.data import LONGEST, ImageTree, Transform, UnreadableImage, read_image, to_float
from experiment.metrics import write_csv, write_json
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import Stopper, choose_runtime, make_deterministic, new_run_folder
from models.classifier import FrozenClassifier
from models.darionet import load_upscalers, other_input, other_size
from models.errors import InputError
from models.pipeline import Pipeline

FACTORS = (2, 3, 4, 5, 6)  # of the reductions in scales.png
LARGEST_SMALL = 1.5  # times val_crop_size: an image larger than that is not small


class Reader:
    """The networks, and one way to ask them: an image in, a rebuilt image and a prediction out."""

    def __init__(self, parameters, weights: str):
        self.t = parameters.transformations
        self.runtime = choose_runtime(parameters.test.precision)
        make_deterministic(parameters.test.seed)
        self.upscalers = load_upscalers(weights, parameters.darionet.initial_weights, self.runtime.device)
        self.classifier = FrozenClassifier(parameters.classifier.architecture, parameters.classifier.weights)
        self.classifier.to(self.runtime.device, memory_format=torch.channels_last)
        self.classifier.require(self.t.val_crop_size, "transformations.val_crop_size")

    def pipeline(self, name: str, scale: float | None) -> Pipeline:
        """The pipeline of a row of the results table; `scale` None takes images that are small already."""
        return Pipeline(
            name,
            self.classifier,
            upscaler=self.upscalers.get(name),
            scale=scale,
            interpolation=self.t.interpolation,
            antialias=self.t.antialias,
            enlarge="bilinear" if name == "Bilinear" else None,
        )

    @torch.no_grad()
    def read(
        self, pipeline: Pipeline, image: Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, dict]:
        """(1,3,H,W) in [0,1] -> the small and the rebuilt image, (3,h,w) each, and the prediction."""
        with self.runtime.autocast():
            small, rebuilt, logits = pipeline(image, size)
        probabilities = logits[0].float().softmax(0)
        if not probabilities.isfinite().all():
            raise InputError(f"the scores on {pipeline.name}'s image are not finite: its weights are damaged")
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
            UnreadableImage: no image, or not small.
        """
        image = read_image(path)
        if not small:
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
    parser.add_argument("image", help="an image, or with --small a folder of images")
    parser.add_argument("--small", action="store_true", help="the image is small already: do not reduce it")
    parser.add_argument("--weights", metavar="FILE", help="DarioNet's weights (default: darionet.weights)")
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    path = Path(arguments.image)
    if not path.exists():
        raise InputError(f"{path}: no such image")
    if path.is_dir() and not arguments.small:
        raise InputError(
            f"{path}: a folder; add --small to read every image below it, test.py measures labelled folders"
        )
    weights = arguments.weights or parameters.darionet.weights
    reader = Reader(parameters, weights)
    t = parameters.transformations
    if not arguments.small and (note := other_input(weights, t.scale, t.interpolation, t.antialias)):
        print(note)
    if path.is_dir():
        with Stopper() as stopper:
            return read_folder(reader, path, weights, parameters.model_dump(), stopper)
    try:
        image = reader.load(path, arguments.small)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from None
    if arguments.small and (note := other_size(weights, min(image.shape[-2:]), t.val_crop_size)):
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


def run_folder(path: Path) -> Path:
    return new_run_folder("try", "_" + (re.sub(r"[^\w-]+", "_", path.resolve().stem)[:60] or "image"))


def verdict(prediction: dict) -> str:
    return f"{plots.shorten(prediction['label'], 28)} {prediction['probability']:.1%}"


def read_image_of_full_size(reader: Reader, image: Tensor, folder: Path) -> list[dict]:
    """Writes scales.png and classification.png; returns the predictions."""
    scale, names = reader.t.scale, list(reader.upscalers)

    rows = []
    for factor in FACTORS:
        results = {name: reader.read(reader.pipeline(name, 1 / factor), image) for name in ["Bilinear", *names]}
        small = results["Bilinear"][0]
        row = [image[0], small, *(rebuilt for _, rebuilt, _ in results.values())]
        rows.append((f"1/{factor}: {small.shape[-1]} x {small.shape[-2]} px", row))
    plots.scales(rows, ["original", "small", "bilinear", *names], folder / "scales.png")

    order = ["DarioNet", *(name for name in names if name != "DarioNet")]
    wanted = [(f"x{scale}, {name}", name, scale) for name in ["Bilinear", *order]]
    wanted += [("original", "Bilinear", None)]
    wanted += [(f"original rebuilt at x4, {name}", name, None) for name in order]
    panels, predictions = [], []
    for title, name, factor in wanted:
        _, rebuilt, prediction = reader.read(reader.pipeline(name, factor), image)
        panels.append((title, rebuilt, verdict(prediction)))
        predictions.append({"of": title, **prediction})
    plots.panels(panels, len(names) + 1, folder / "classification.png")
    return predictions


def read_small(reader: Reader, image: Tensor, folder: Path) -> list[dict]:
    """Writes small.png; returns the predictions."""
    panels, predictions = [], []
    for name in ["Bilinear", *reader.upscalers]:
        small, rebuilt, prediction = reader.read(reader.pipeline(name, None), image, reader.full_size(image))
        panels.append((name, rebuilt, verdict(prediction)))
        predictions.append({"of": name, **prediction})
    first = (f"as it came, {small.shape[-1]} x {small.shape[-2]} px", small, "")
    plots.panels([first, *panels], 4, folder / "small.png")
    return predictions


def read_folder(reader: Reader, path: Path, weights: str, parameters: dict, stopper: Stopper) -> int:
    """Writes predictions.csv, one row an image; returns 1 where an image could not be read.

    After Ctrl-C or SIGTERM it writes the rows of the images that were read.
    """
    paths = ImageTree(str(path)).paths
    folder = run_folder(path)
    write_json(folder / "parameters.json", parameters)
    rows, unreadable = [], []
    for name in tqdm(paths, desc="reading", unit="image", disable=None):
        if stopper.requested:
            print(f"Stopped: {len(rows) + len(unreadable)} of {len(paths)} images were looked at")
            break
        try:
            image = reader.load(path / name, small=True)
        except UnreadableImage as error:
            unreadable.append({"image": name, "reason": str(error)})
            continue
        row = {"image": name, "width": image.shape[-1], "height": image.shape[-2]}
        for variant in ["DarioNet", "Bilinear"]:
            prediction = reader.read(reader.pipeline(variant, None), image, reader.full_size(image))[2]
            row |= {f"{variant.lower()}_{key}": value for key, value in prediction.items()}
        rows.append(row)
    if unreadable:
        write_csv(folder / "unreadable.csv", unreadable)
        print(f"{len(unreadable)} images could not be read: {folder / 'unreadable.csv'}")
    if rows:
        write_csv(folder / "predictions.csv", rows)
        print(f"{len(rows)} images read: {folder / 'predictions.csv'}")
        sides = sorted(min(row["width"], row["height"]) for row in rows)
        if note := other_size(weights, sides[len(sides) // 2], reader.t.val_crop_size):
            print(note)
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


if __name__ == "__main__":
    run_script(main)
