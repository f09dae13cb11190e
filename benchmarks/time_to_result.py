"""How soon does a recipe recover 80 % of what bilinear enlarging loses? Ours beside another one, same images.

    python -m benchmarks.time_to_result --parameters examples/tiny_imagenet/parameters.json --minutes 30
    python -m benchmarks.time_to_result --parameters mine.json --against other.json

The other recipe is that of --against, or the published one: the scores alone in the loss, whole images, a constant
learning rate, nothing averaged; start, batches and learning rate are ours. The two take turns of a tenth of --minutes,
so that what else the machine does slows both: train_darionet.py is started, stopped and resumed. After each turn the
network as it stands, averaged if the recipe averages, is evaluated by test.py with our parameters. Minutes are those of
the training steps, as the run counts them: start, validation and this evaluation are left out. A recipe ends with its
epochs. Nothing is written but the runs in assets/logs. The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from experiment.parameters import read_parameters
from experiment.run import load_checkpoint
from experiment.script import run_script, script_parser
from models.errors import InputError
from models.weights import save_weights

ROOT = Path(__file__).parents[1]
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
    whole = read_parameters(path, arguments.set).transformations.val_crop_size
    published = [*arguments.set, *PUBLISHED, f"transformations.train_crop_size={whole}"]
    other = (arguments.against, arguments.set) if arguments.against else (path, published)
    runs = {arguments.against or "published": Run(*other), "ours": Run(path, arguments.set)}
    tested = ["--parameters", path, *as_options([*arguments.set, "darionet.initial_weights=null"])]

    found: dict[str, list[dict]] = {name: [] for name in runs}
    print("| recipe | minutes | accuracy | recovered | 95 % interval |\n|---|---|---|---|---|")
    for turn in range(1, TURNS + 1):
        for name, run in runs.items():
            if run.finished:
                continue
            run.train_until(60 * arguments.minutes * turn / TURNS)
            row = {"minutes": run.seconds / 60} | run.scores(tested)
            found[name].append(row)
            low, high = row["recovered_low"], row["recovered_high"]
            between = "–" if low is None else f"{low:.0%} to {high:.0%}"
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
        self.start = ["--parameters", path, *as_options([*settings, "training.save=false"])]
        self.folder: Path | None = None
        self.seconds = 0.0  # of training steps so far
        self.finished = False

    def train_until(self, seconds: float) -> None:
        """Goes on until about `seconds` of training steps are done in all, or its epochs.

        Raises:
            InputError: the training refused or failed, in its own words.
        """
        options = self.start if self.folder is None else ["--resume", str(self.folder)]
        command = [sys.executable, "-u", ROOT / "train_darionet.py", *options]
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

    def scores(self, tested: list[str]) -> dict:
        """What test.py, started with the options `tested`, finds of the network as it stands in the run's checkpoint.

        Raises:
            InputError: it refused or failed, in its own words.
        """
        checkpoint = load_checkpoint(self.folder)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder, "DarioNet.pt")
            save_weights(checkpoint.get("average", checkpoint["network"]), weights, {})
            command = [sys.executable, ROOT / "test.py", *tested, "--weights", weights]
            result = subprocess.run(command, capture_output=True, text=True)
        *_, last = ["", *result.stdout.splitlines()]
        results = Path(last, "results.json")
        if result.returncode not in (0, 1) or not results.is_file():  # 1: some image can't be read
            *_, reason = ["killed", *result.stderr.splitlines()]
            raise InputError(f"the evaluation ended: {reason}")
        return json.loads(results.read_text())["variants"][-1]


def as_options(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def share(row: dict) -> str:
    return "–" if row["recovered"] is None else f"{row['recovered']:.1%}"


if __name__ == "__main__":
    run_script(main)
