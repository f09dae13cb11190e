"""The README's first picture: photographs, what is left of them, and what the classifier reads in each reconstruction.

    python examples/photographs/story.py
    python examples/photographs/story.py --esrgan assets/models/RealESRGAN_x4plus.pth --output images/photographs.png

No best cases: every 50th of the 200 free photographs in the order of their paths, starting with the 25th.
"""

import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]  # started as a file, python finds the packages there

from experiment import plots
from experiment.data import ImageTree, Transform
from experiment.evaluation import ask, images_at, make_pipelines
from experiment.metrics import OURS
from experiment.parameters import read_parameters
from experiment.runtime import start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_rrdbnet, to_device
from models.pipeline import Upscale
from models.scaler import Reduction

HERE = Path(__file__).parent
FIRST, EVERY = 24, 50


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
    restores = {name: Upscale(network, t.interpolation, t.antialias) for name, network in networks.items()}
    pipelines = make_pipelines(classifier, Reduction(t.scale, t.interpolation, t.antialias), restores)
    pipelines = [pipeline for pipeline in pipelines if pipeline.name != "Bicubic"]

    paths = photographs.paths[FIRST::EVERY]
    images = images_at(photographs, paths, runtime.device)
    with (HERE / "CREDITS.tsv").open(encoding="utf-8") as file:
        credits = {row["image"]: row for row in csv.DictReader(file, delimiter="\t")}
    columns, titles = {}, [[] for _ in paths]
    for pipeline in pipelines:
        asked = [ask(pipeline, image, runtime) for image in images]
        columns[pipeline.name] = [rebuilt[0] for _, rebuilt, _ in asked]
        for title, target, (_, _, ((best,),)) in zip(titles, targets[FIRST::EVERY], asked, strict=True):
            colour = plots.GOOD if best["class"] == classifier.class_names[target] else plots.BAD
            title.append((f"{plots.shorten(best['label'], 16)} {best['probability']:.0%}", colour))
    notes = [credit(credits[Path(path).stem]) for path in paths]
    plots.image_grid(columns, titles, arguments.output, notes)
    print(arguments.output)
    return 0


def credit(row: dict) -> str:
    return f"Photograph: {row['author']}, CC BY 2.0, {row['page'].removeprefix('https://')}"


if __name__ == "__main__":
    run_script(main)
