"""The README's first picture: photographs, what is left of them, and what the classifier reads in each reconstruction.

    python examples/photographs/story.py
    python examples/photographs/story.py --esrgan assets/models/RealESRGAN_x4plus.pth --output images/photographs.png

No best cases: every 50th of the 200 free photographs in the order of their paths, starting with the 25th.
"""

import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]  # started as a file, python finds the packages there

import torch

from experiment import plots
from experiment.data import ImageTree, Transform, to_float
from experiment.metrics import BASELINE, ORIGINAL, OURS, SMALL
from experiment.parameters import read_parameters
from experiment.runtime import start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_rrdbnet, to_device
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.scaler import Reduction

HERE = Path(__file__).parent
FIRST, EVERY = 24, 50


@torch.no_grad()
def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--esrgan", metavar="FILE", help="a network that DarioNet is compared with")
    parser.add_argument("--output", type=Path, default=Path("images/photographs.png"))
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or HERE / "parameters.json", arguments.set)
    t, runtime = parameters.transformations, start_runtime(parameters.test.precision)
    photographs = ImageTree(str(HERE / "free"), Transform(t.resize_size, t.val_crop_size))
    classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    targets = photographs.targets(classifier.class_names, required=True)
    files = {"Real-ESRGAN": arguments.esrgan, OURS: parameters.darionet.weights}
    networks = {name: load_rrdbnet(file, runtime.device).eval() for name, file in files.items() if file}
    restores = {BASELINE: Enlarge("bilinear")} | {
        name: Upscale(network, t.interpolation, t.antialias) for name, network in networks.items()
    }
    reduction = Reduction(t.scale, t.interpolation, t.antialias)
    rows = [Pipeline(ORIGINAL, classifier, unchanged, unchanged), Pipeline(SMALL, classifier, reduction, unchanged)]
    rows += [Pipeline(name, classifier, reduction, restore) for name, restore in restores.items()]

    chosen = range(FIRST, len(photographs), EVERY)
    images = to_float(torch.stack([photographs[i][1] for i in chosen]), runtime.device)
    with (HERE / "CREDITS.tsv").open(encoding="utf-8") as file:
        credits = {row["image"]: row for row in csv.DictReader(file, delimiter="\t")}
    columns, titles = {}, [[] for _ in chosen]
    for pipeline in rows:
        rebuilt, logits = map(torch.cat, zip(*(pipeline(image[None])[1:] for image in images), strict=True))
        columns[pipeline.name] = rebuilt
        for title, i, probabilities in zip(titles, chosen, logits.softmax(1), strict=True):
            index = int(probabilities.argmax())
            colour = plots.GOOD if index == targets[i] else plots.BAD
            title.append((f"{plots.shorten(classifier.labels[index], 16)} {probabilities[index]:.0%}", colour))
    notes = [credit(credits[Path(photographs.paths[i]).stem]) for i in chosen]
    plots.image_grid(columns, titles, arguments.output, notes)
    print(arguments.output)
    return 0


def credit(row: dict) -> str:
    return f"Photograph: {row['author']}, CC BY 2.0, {row['page'].removeprefix('https://')}"


if __name__ == "__main__":
    run_script(main)
