"""Evaluates every variant on the test folder: how much of the lost accuracy comes back?

    python test.py                                               parameters.json
    python test.py --parameters examples/shapes/parameters.json
    python test.py --set test.batches_per_epoch=10               a random part of the test images
    python test.py --weights assets/logs/train_20260101-120000/best.pt
    python test.py --classifier efficientnet_b0                  read by a classifier that DarioNet never met
    python test.py --redraw assets/logs/test_20260101-120000     the figures again, from the CSV files of a run
    torchrun --nproc_per_node=4 test.py                          one process a GPU: the same numbers, sooner

Variants: Original; Small (the small image itself); Bilinear; Bicubic; ESRGAN or Pixels (darionet.initial_weights, where
the file exists); DarioNet (darionet.weights). Everything is written to assets/logs/test_<stamp>/.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds of the imports ends it without a traceback

import json
from pathlib import Path

import torch
import torchvision
from torchvision.models import list_models
from tqdm import tqdm

from experiment import plots
from experiment.data import ImageFolder, Transform, epoch_batches, make_loader, to_float
from experiment.evaluation import Evaluation, evaluate, joined, make_pipelines
from experiment.metrics import (
    CLASSES,
    PREDICTIONS,
    decisions,
    markdown_table,
    mcnemar,
    mcnemar_line,
    per_class,
    read_csv,
    summarise,
    worst_cases,
    write_csv,
    write_json,
)
from experiment.parameters import Parameters, read_parameters, run_script, script_parser
from experiment.runtime import Runtime, Stopper, choose_runtime, make_deterministic, new_run_folder, out_of_memory
from models.classifier import FrozenClassifier, noted_architecture
from models.darionet import load_upscalers, other_input, trained_for
from models.errors import InputError
from models.pipeline import Pipeline
from models.scaler import reduced_length

SHOWN = 6  # images in a sheet of reconstructions
RIVALS = ("Bilinear", "ESRGAN", "Pixels", "Initial")  # that DarioNet is tested against


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--weights", metavar="FILE", help="DarioNet's weights (default: darionet.weights)")
    parser.add_argument("--classifier", metavar="NAME|FILE", help="another one: a torchvision architecture or a file")
    parser.add_argument("--redraw", type=Path, metavar="RUN", help="draw the figures of a finished run again")
    arguments = parser.parse_args()
    if arguments.redraw:
        draw_figures(arguments.redraw)
        print(arguments.redraw)
        return 0
    settings = arguments.set + classifier_settings(arguments.classifier)
    parameters = read_parameters(arguments.parameters or "parameters.json", settings)
    with Stopper() as stopper:
        return test(parameters, arguments.weights or parameters.darionet.weights, stopper)


def classifier_settings(choice: str | None) -> list[str]:
    """The parameters that --classifier stands for: a torchvision architecture with its weights, or a file."""
    if choice is None:
        return []
    if choice in list_models(module=torchvision.models):
        return [f"classifier.architecture={choice}", "classifier.weights=IMAGENET1K_V1"]
    architecture = noted_architecture(choice)
    return [f"classifier.weights={choice}"] + ([f"classifier.architecture={architecture}"] if architecture else [])


def test(parameters: Parameters, weights: str, stopper: Stopper) -> int:
    """Evaluates, writes the run folder and returns the exit code."""
    t, options = parameters.transformations, parameters.test
    runtime = choose_runtime(options.precision)
    make_deterministic(options.seed)
    dataset = ImageFolder(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
    upscalers = load_upscalers(weights, parameters.darionet.initial_weights, runtime.device)
    classifier = FrozenClassifier(parameters.classifier.architecture, parameters.classifier.weights)
    classifier.to(runtime.device, memory_format=torch.channels_last)
    classifier.require(t.val_crop_size, "transformations.val_crop_size")
    targets = dataset.targets(classifier.class_names, required=True)
    pipelines = make_pipelines(
        classifier, upscalers, scale=t.scale, interpolation=t.interpolation, antialias=t.antialias
    )
    small = reduced_length(t.val_crop_size, t.scale)
    if not classifier.reads(small, small):
        pipelines = [pipeline for pipeline in pipelines if pipeline.name != "Small"]
        print(f"Left out: Small, since {parameters.classifier.architecture} can't read {small}x{small} pixels")
    if runtime.is_main:
        folder = new_run_folder("test")
        write_json(folder / "parameters.json", parameters.model_dump())
    print(f"Variants: {', '.join(p.name for p in pipelines)}; DarioNet from {weights}")
    print(f"Images: {len(dataset)} in {dataset.root}, {len(set(targets))} classes; Scaler x{t.scale} {t.interpolation}")
    print(f"Machine: {runtime.describe()}, batch size {options.batch_size}")
    if note := other_input(weights, t.scale, t.interpolation, t.antialias):
        print(note)

    # A limited epoch takes the next batches of one seeded order; a whole one more than once only steadies the timing.
    batches = epoch_batches(len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=True, limit=None)
    result = Evaluation()
    for epoch in range(options.epochs):
        limit = options.batches_per_epoch
        chosen = batches if limit is None else batches[epoch * limit : (epoch + 1) * limit]
        if not chosen:
            break
        chosen = runtime.part(chosen)
        loader = make_loader(dataset, chosen, parameters.data.workers, runtime.device.type == "cuda")
        disable = None if options.verbose and runtime.is_main else True
        with tqdm(total=len(chosen), desc="test", unit="batch", disable=disable) as bar:
            try:
                keep = epoch == 0 or limit is not None
                evaluate(pipelines, loader, dataset, targets, runtime, stopper, bar, result, keep)
            except torch.OutOfMemoryError:
                raise out_of_memory(runtime, options.batch_size, "test.batch_size") from None
        if any(runtime.gather(stopper.requested)):
            stopper.stop_with_others()
            print("Stopped: an evaluation is all or nothing, start it again")
            if runtime.is_main:
                print(folder)
            return stopper.code
    result = joined(runtime.gather(result), [dataset.paths[i] for batch in batches for i in batch])
    if not runtime.is_main:
        return 1 if result.unreadable else 0
    unreadable = [{"image": path, "reason": reason} for path, reason in sorted(result.unreadable.items())]
    if unreadable:
        write_csv(folder / "unreadable.csv", unreadable)
    if not result.rows:
        raise InputError(f"{dataset.root}: none of its images could be read; {folder / 'unreadable.csv'} says why")

    write_results(parameters, weights, runtime, classifier, result, unreadable, folder)
    draw_reconstructions(pipelines, dataset, result.rows, runtime, folder)
    draw_figures(folder)
    print(f"\n{(folder / 'results.md').read_text(encoding='utf-8')}")
    if unreadable:
        print(f"{len(unreadable)} images could not be read and were not scored: {folder / 'unreadable.csv'}")
    print(folder)
    return 1 if unreadable else 0


def write_results(
    parameters: Parameters,
    weights: str,
    runtime: Runtime,
    classifier: FrozenClassifier,
    result: Evaluation,
    unreadable: list[dict],
    folder: Path,
) -> None:
    """Writes everything that was found, as numbers."""
    t = parameters.transformations
    rivals = [v for v in dict.fromkeys(row["variant"] for row in result.rows) if v in RIVALS]
    variants = summarise(result.rows, result.seconds, result.timed, parameters.test.seed)
    results = {
        "variants": variants,
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "precision": runtime.precision,
        "torch": str(torch.__version__),
        "scale": t.scale,
        "interpolation": t.interpolation,
        "antialias": t.antialias,
        "classifier": parameters.classifier.model_dump(),
        "mcnemar": [mcnemar(result.rows, "DarioNet", name) for name in rivals],
        "training_run": trained_for(weights).get("run"),
        "seed": parameters.test.seed,
        "unreadable": unreadable,
    }
    write_json(folder / "results.json", results)
    write_csv(folder / "predictions.csv", result.rows)
    write_csv(folder / "decisions.csv", decisions(result.rows))
    write_csv(folder / "classes.csv", per_class(result.rows, classifier.class_names, classifier.labels))
    sentences = "\n".join(mcnemar_line(one) for one in results["mcnemar"])
    text = f"{markdown_table(variants)}\n{caption(results)}.\n{sentences}\n"
    (folder / "results.md").write_text(text, encoding="utf-8")


def caption(results: dict) -> str:
    """What was measured, in one line."""
    return (
        f"{results['variants'][0]['n']} test images, Scaler x{results['scale']} {results['interpolation']}"
        f"{', antialiased' if results['antialias'] else ''}, {results['classifier']['architecture']}"
    )


@torch.no_grad()
def draw_reconstructions(
    pipelines: list[Pipeline], dataset: ImageFolder, rows: list[dict], runtime: Runtime, folder: Path
) -> None:
    """Writes the figures that need images: some unselected ones, the worst cases, and the stages of the first."""
    classifier = pipelines[0].classifier

    def load(chosen: list[str]) -> torch.Tensor:
        return to_float(torch.stack([dataset[dataset.paths.index(image)][1] for image in chosen]), runtime.device)

    def sheet(chosen: list[str], path: Path) -> None:
        images, columns, titles = load(chosen), {}, [[] for _ in chosen]
        for pipeline in pipelines:
            _, columns[pipeline.name], logits = pipeline(images)
            for row, image, probabilities in zip(titles, chosen, logits.softmax(1), strict=True):
                index = int(probabilities.argmax())
                right = classifier.class_names[index] == Path(image).parts[0]
                text = f"{plots.shorten(classifier.labels[index], 14)} {probabilities[index]:.0%}"
                row.append((text, plots.GOOD if right else plots.BAD))
        plots.image_grid(columns, titles, path)

    order = list(dict.fromkeys(row["image"] for row in rows))  # seeded
    sheet(order[:SHOWN], folder / "triptychs.png")
    worst = worst_cases(rows, SHOWN)
    if worst:
        sheet(worst, folder / "worst.png")

    pipeline, original = pipelines[-1], load(order[:1])
    small, rebuilt, logits = pipeline(original)
    top = logits[0].softmax(0).topk(min(5, len(classifier.labels)))
    scores = [(classifier.labels[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    stages = [("original", original[0]), (f"Scaler x{pipeline.scale}", small[0])]
    stages += [("DarioNet x4", pipeline.upscaler(small)[0]), ("Scaler", rebuilt[0])]
    plots.pipeline_figure(stages, scores, folder / "pipeline.png")


def draw_figures(folder: Path) -> None:
    """Writes the figures that need no images, and the report, from the files of a run folder alone.

    Raises:
        InputError: the folder is not that of a finished evaluation.
    """
    try:
        results = json.loads((folder / "results.json").read_bytes())
        parameters = json.loads((folder / "parameters.json").read_bytes())
        rows = read_csv(folder / "predictions.csv", PREDICTIONS)
        classes = read_csv(folder / "classes.csv", CLASSES)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not the folder of a finished evaluation ({error})") from None
    plots.results_table(results["variants"], caption(results), folder / "table.png")
    plots.f1_difference(classes, folder / "f1_difference.png")
    plots.f1_density(classes, folder / "f1_density.png")
    plots.class_bars(classes, folder / "classes.png")
    plots.decision_strip(rows, folder / "decisions.png")
    curves = Path(results["training_run"] or "") / "curves.png"
    figures = [
        ("The pipeline", folder / "pipeline.png"),
        ("Results", folder / "table.png"),
        ("Training", curves),
        ("Right or wrong, image by image", folder / "decisions.png"),
        ("What rebuilding costs, class by class", folder / "f1_difference.png"),
        ("The same against the original", folder / "f1_density.png"),
        ("Classes", folder / "classes.png"),
        ("Reconstructions, unselected", folder / "triptychs.png"),
        ("The most confident mistakes", folder / "worst.png"),
    ]
    text = "\n".join([f"{caption(results)}.", *map(mcnemar_line, results["mcnemar"])])
    plots.report("DarioNet", text, parameters, [f for f in figures if f[1].is_file()], folder / "report.pdf")


if __name__ == "__main__":
    run_script(main)
