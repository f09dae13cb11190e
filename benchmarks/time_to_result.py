"""How soon does a recipe recover 80 % of what bilinear enlarging loses? Ours beside another one, same images.

    python -m benchmarks.time_to_result --parameters examples/tiny_imagenet/parameters.json --minutes 30
    python -m benchmarks.time_to_result --parameters mine.json --against other.json

The other recipe is that of --against, or the published one: the scores alone in the loss, whole images, a constant
learning rate, nothing averaged; start, batches and learning rate are ours. The two take turns of a tenth of --minutes,
so that what else the machine does slows both: train_darionet.py is started, stopped and resumed. After each turn the
network as it stands, averaged if the recipe averages, is evaluated on our data.test. Minutes are those of the training
steps, as the run counts them: start, validation and this evaluation are left out. A recipe ends with its epochs.
Nothing is written but the runs in assets/logs. The last line is JSON.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

from experiment.data import ImageTree, Transform, batches, epoch_batches
from experiment.evaluation import Evaluation, evaluate, make_pipelines
from experiment.metrics import BASELINE, ORIGINAL, OURS, summarise
from experiment.parameters import Parameters, read_parameters
from experiment.run import load_checkpoint
from experiment.runtime import Runtime, Stopper, progress_bar, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, open_classifier
from models.darionet import build_darionet, to_device
from models.errors import InputError
from models.pipeline import Upscale
from models.scaler import Reduction
from models.weights import load_strictly

SCRIPT = Path(__file__).parents[1] / "train_darionet.py"
WANTED = 0.8  # recovered
TURNS = 10
PUBLISHED = (
    'training.loss={"logits": 1}',
    "training.schedule=constant",
    "training.warmup_steps=0",
    "training.clamp_gradient=true",
    "training.adam_beta2=0.999",
    "training.ema_decay=null",
    "transformations.random_reduction=null",
)


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--against", metavar="FILE", help="parameters of the other recipe (default: the published one)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, for each recipe")
    arguments = parser.parse_args()
    path = arguments.parameters or "parameters.json"
    parameters = read_parameters(path, arguments.set)
    whole = f"transformations.train_crop_size={parameters.transformations.val_crop_size}"
    other = (arguments.against, arguments.set) if arguments.against else (path, [*arguments.set, *PUBLISHED, whole])
    runs = {arguments.against or "published": Run(*other), "ours": Run(path, arguments.set)}
    runtime = start_runtime(parameters.test.precision, parameters.test.seed)
    classifier = open_classifier(**parameters.classifier.model_dump()).to(runtime.device)

    found: dict[str, list[dict]] = {name: [] for name in runs}
    print("| recipe | minutes | accuracy | recovered | 95 % interval |\n|---|---|---|---|---|")
    for turn in range(1, TURNS + 1):
        for name, run in runs.items():
            if run.finished:
                continue
            run.train_until(60 * arguments.minutes * turn / TURNS)
            row = {"minutes": run.seconds / 60} | scores(run, parameters, classifier, runtime)
            found[name].append(row)
            between = f"{row['low']:.0%} to {row['high']:.0%}" if row["low"] is not None else "–"
            print(f"| {name} | {row['minutes']:.2f} | {row['accuracy']:.4f} | {share(row)} | {between} |")
    print()
    reached = {}
    for name, rows in found.items():
        reached[name] = next((row["minutes"] for row in rows if (row["recovered"] or 0) >= WANTED), None)
        when = "not reached" if reached[name] is None else f"after {reached[name]:.2f} min"
        print(f"{name}: {WANTED:.0%} recovered {when}; {share(rows[-1])} after {rows[-1]['minutes']:.2f} min")
    print(json.dumps({"wanted": WANTED, "minutes_to_wanted": reached, "recipes": found}))
    return 0


class Run:
    """A run of train_darionet.py, with the parameters of `path` and `settings`, that goes on if it is asked to."""

    def __init__(self, path: str, settings: list[str]):
        options = [part for setting in [*settings, "training.save=false"] for part in ("--set", setting)]
        self.start = ["--parameters", path, *options]
        self.folder: Path | None = None
        self.seconds = 0.0  # of training steps so far
        self.finished = False

    def train_until(self, seconds: float) -> None:
        """Goes on until about `seconds` of training steps are done in all, or its epochs.

        Raises:
            InputError: the training refused or failed, in its own words.
        """
        options = self.start if self.folder is None else ["--resume", str(self.folder)]
        command = [sys.executable, "-u", str(SCRIPT), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            timer = threading.Timer(max(0.0, seconds - self.seconds), process.terminate)
            for line in process.stdout:
                if line.startswith("Run folder: "):  # from here on it counts, and stops with a checkpoint
                    self.folder = Path(line.removeprefix("Run folder: ").strip())
                    timer.start()
        timer.cancel()
        if process.returncode not in (0, 143):
            raise InputError(f"the training ended: {line.strip()}")
        self.finished = process.returncode == 0
        state = load_checkpoint(self.folder)["state"]
        self.seconds = state["seconds"] + sum(row["seconds"] for row in state["history"])


def scores(run: Run, parameters: Parameters, classifier: FrozenClassifier, runtime: Runtime) -> dict:
    """Accuracy on data.test of the network as it stands in the run's checkpoint, and the fraction that it recovers."""
    checkpoint, t, options = load_checkpoint(run.folder), parameters.transformations, parameters.test
    d = read_parameters(run.folder / "parameters.json").darionet
    network = to_device(build_darionet(d.features, d.blocks, d.growth, None), runtime.device).eval()
    load_strictly(network, checkpoint.get("average", checkpoint["network"]), run.folder)
    dataset = ImageTree(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
    targets = dataset.targets(classifier.class_names, required=True)
    order = {"seed": options.seed, "epoch": 0, "shuffle": True, "limit": options.batches_per_epoch}
    lists = epoch_batches(len(dataset), options.batch_size, **order)
    reduction = Reduction(t.scale, t.interpolation, t.antialias)
    pipelines = make_pipelines(classifier, reduction, {OURS: Upscale(network, t.interpolation, t.antialias)})
    pipelines = [pipeline for pipeline in pipelines if pipeline.name in (ORIGINAL, BASELINE, OURS)]
    result = Evaluation()
    with Stopper() as stopper, progress_bar(sum(map(len, lists)), "evaluation", unit="image", leave=False) as bar:
        arriving = batches(dataset, lists, parameters.data.workers, stopper=stopper)
        evaluate(pipelines, arriving, dataset, targets, runtime, stopper, bar, result)
    if stopper.requested:
        raise KeyboardInterrupt
    row = summarise(result.rows, result.seconds, result.timed, options.seed)[-1]
    kept = {"accuracy": "accuracy", "recovered": "recovered", "low": "recovered_low", "high": "recovered_high"}
    return {name: row[key] for name, key in kept.items()}


def share(row: dict) -> str:
    return "–" if row["recovered"] is None else f"{row['recovered']:.1%}"


if __name__ == "__main__":
    run_script(main)
