"""Evaluates every variant on the test folder: how much of the lost accuracy comes back?

    python test.py                                               parameters.json
    python test.py --parameters examples/shapes/parameters.json
    python test.py --set test.batches_per_epoch=10               a random part of the test images
    python test.py --weights assets/logs/train_20260101-120000/best.pt
    python test.py --weights A.pt B.pt                           two networks in one table
    python test.py --classifier efficientnet_b0                  read by a classifier that DarioNet never met
    python test.py --rival Adapted adapted.pth                   beside a classifier of examples/adapt_classifier.py
    python test.py --redraw assets/logs/test_20260101-120000     the figures again, from the CSV files of a run
    torchrun --nproc_per_node=4 test.py                          one process a GPU: the same numbers, sooner

Variants: Original; Small (the small image itself); Bilinear; Bicubic; rivals, whose PSNR and SSIM are those of the
enlarged images that they read; the network that training started from (darionet.initial_weights, where the file
exists): ESRGAN, or Pixels; DarioNet (darionet.weights). Everything is written to assets/logs/test_<stamp>/.
"""

import json
from pathlib import Path

import torch
import torchvision
from torchvision.models import list_models

from experiment import plots
from experiment.data import ImageTree, Transform, batches, epoch_batches, to_float
from experiment.evaluation import Evaluation, enlarger, evaluate, joined, make_pipelines
from experiment.metrics import (
    BASELINE,
    CLASSES,
    ORIGINAL,
    OURS,
    PREDICTIONS,
    SMALL,
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
from experiment.parameters import ClassifierSection, Parameters, read_parameters
from experiment.runtime import (
    Runtime,
    Stopper,
    agreed_to_stop,
    new_run_folder,
    out_of_memory_is_one_line,
    progress_bar,
    seed_without_tf32,
    start_runtime,
)
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, default_weights, noted_architecture, open_classifier
from models.darionet import load_upscalers, other_input, to_device
from models.errors import InputError
from models.images import UnreadableImage
from models.pipeline import Enlarge, Pipeline, Upscale
from models.scaler import Reduction, reduced_length
from models.weights import trained_for

SHOWN = 6  # images in a sheet of reconstructions


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks to test (default: darionet.weights)")
    parser.add_argument("--classifier", metavar="NAME|FILE", help="another one: an architecture or a weights file")
    parser.add_argument(
        "--rival",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="a row NAME: the small images enlarged, read by a classifier that was adapted to them; may be repeated",
    )
    parser.add_argument("--redraw", type=Path, metavar="RUN", help="draw the figures of a finished run again")
    arguments = parser.parse_args()
    if arguments.redraw:
        draw_figures(arguments.redraw)
        print(arguments.redraw)
        return 0
    settings = classifier_settings(arguments.classifier) + arguments.set
    parameters = read_parameters(arguments.parameters or "parameters.json", settings)
    with Stopper() as stopper:
        # Set-up
        t, options, d = parameters.transformations, parameters.test, parameters.darionet
        weights = arguments.weights or [d.weights]
        runtime = start_runtime(options.precision)
        seed_without_tf32(options.seed)
        dataset = ImageTree(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
        reduction = Reduction(t.scale, t.interpolation, t.antialias)
        networks = load_upscalers(weights, d.initial_weights, runtime.device)
        classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
        classifier.check(t.val_crop_size, "transformations.val_crop_size")
        targets = dataset.targets(classifier.class_names, required=True)
        rivals = {}
        for name, path in arguments.rival:
            if name in {ORIGINAL, SMALL, BASELINE, "Bicubic", *networks, *rivals}:
                raise InputError(f"--rival {name}: the table has a row of that name: choose another")
            rivals[name] = open_rival(path, parameters.classifier, classifier, reduction, runtime)
        pipelines = make_pipelines(classifier, reduction, networks, rivals)
        small = reduced_length(t.val_crop_size, t.scale)
        if not classifier.reads(small, small):
            pipelines = [pipeline for pipeline in pipelines if pipeline.name != SMALL]
            print(f"Left out: {SMALL}, since {parameters.classifier.architecture} can't read {small}x{small} pixels")
        folder = None
        if runtime.is_main:
            folder = new_run_folder("test")
            write_json(folder / "parameters.json", parameters.model_dump())
        print(f"Variants: {', '.join(p.name for p in pipelines)}; weights: {', '.join(weights)}")
        print(f"Classifier: {parameters.classifier.describe()}")
        print(f"Images: {len(dataset)} in {dataset.root}, {len(set(targets))} classes; reduction: {reduction}")
        print(f"Machine: {runtime.describe()}, batch size {options.batch_size}")
        for path in [*weights, *(path for _, path in arguments.rival)]:
            if note := other_input(path, reduction):
                print(note)

        # Evaluation. A limited epoch takes the next batches of one seeded order; whole ones only steady the timing.
        order = {"seed": options.seed, "epoch": 0, "shuffle": True, "limit": None}
        lists = epoch_batches(len(dataset), options.batch_size, **order)
        result = Evaluation()
        for epoch in range(options.epochs):
            limit = options.batches_per_epoch
            chosen = lists if limit is None else lists[epoch * limit : (epoch + 1) * limit]
            chosen = runtime.part(chosen)
            is_cuda = runtime.device.type == "cuda"
            arriving = batches(dataset, chosen, parameters.data.workers, is_cuda, stopper)
            bar = progress_bar(len(chosen), "test", options.verbose)
            with bar, out_of_memory_is_one_line(runtime, options.batch_size, "test.batch_size"):
                keep = epoch == 0 or limit is not None
                evaluate(pipelines, arriving, dataset, targets, runtime, stopper, bar, result, keep)
            if stopped := agreed_to_stop(runtime, stopper):
                break
        result = joined(runtime.gather(result), [dataset.paths[i] for chosen in lists for i in chosen])
        if not runtime.is_main:
            return stopper.code if stopped else 1 if result.unreadable else 0

        # What it writes
        unreadable = [{"image": path, "reason": reason} for path, reason in sorted(result.unreadable.items())]
        if unreadable:
            write_csv(folder / "unreadable.csv", unreadable)
        if not result.rows and not stopped:
            raise InputError(f"{dataset.root}: none of its images could be read; {folder / 'unreadable.csv'} says why")
        if result.rows:
            write_results(parameters, weights, runtime, classifier, result, unreadable, stopped, folder)
            try:
                draw_reconstructions(pipelines, dataset, result.rows, runtime, folder)
            except UnreadableImage as error:
                print(f"Figures that show images are left out: {error}")
            draw_figures(folder)
            print(f"\n{(folder / 'results.md').read_text(encoding='utf-8')}")
    if unreadable:
        print(f"{len(unreadable)} images could not be read and were not scored: {folder / 'unreadable.csv'}")
    if stopped:
        print(f"Stopped: {len({row['image'] for row in result.rows})} of {len(dataset)} images were scored")
    print(folder)
    return stopper.code if stopped else 1 if unreadable else 0


def classifier_settings(choice: str | None) -> list[str]:
    """The parameters that --classifier stands for: an architecture with its published weights, or a file."""
    if choice is None:
        return []
    if ".py:" in choice:
        chosen = {"architecture": choice, "weights": None}
    elif choice.startswith("timm/"):
        chosen = {"architecture": choice, "weights": "pretrained"}
    elif choice in list_models(module=torchvision.models):
        chosen = {"architecture": choice, "weights": default_weights(choice)}
    else:
        architecture = noted_architecture(choice)
        if architecture is None:
            return [f"classifier.weights={choice}"]
        chosen = {"architecture": architecture, "weights": choice}
    return [f"classifier={json.dumps(chosen)}"]


def open_rival(
    path: str, section: ClassifierSection, frozen: FrozenClassifier, reduction: Reduction, runtime: Runtime
) -> tuple[FrozenClassifier, Enlarge | Upscale]:
    """The adapted classifier of a weights file, and how its images are enlarged: as its note says, else bilinear.

    Raises:
        InputError: not the weights of `section`'s architecture, or of other classes than those of `frozen`.
    """
    adapted = open_classifier(**section.model_dump() | {"weights": path})
    if adapted.class_names != frozen.class_names:
        raise InputError(f"{path}: its classes are not those of classifier.weights: adapt the same classifier")
    return to_device(adapted, runtime.device), enlarger(
        str(trained_for(path).get("enlarge", "bilinear")), reduction, runtime.device
    )


def write_results(
    parameters: Parameters,
    weights: list[str],
    runtime: Runtime,
    classifier: FrozenClassifier,
    result: Evaluation,
    unreadable: list[dict],
    stopped: bool,
    folder: Path,
) -> None:
    """Writes everything that was found, as numbers."""
    t = parameters.transformations
    names = list(dict.fromkeys(row["variant"] for row in result.rows))
    networks = [name for name in names if name not in (ORIGINAL, SMALL, BASELINE, "Bicubic")]
    ours = networks[-1]  # rivals stand before the networks
    rivals = [name for name in (BASELINE, *networks) if name != ours]
    variants = summarise(result.rows, result.seconds, result.timed, parameters.test.seed)
    results = {
        "variants": variants,
        "device": runtime.name(),
        "precision": runtime.precision,
        "torch": str(torch.__version__),
        "scale": t.scale,
        "interpolation": t.interpolation,
        "antialias": t.antialias,
        "classifier": parameters.classifier.model_dump(exclude_none=True),
        "ours": ours,
        "mcnemar": [mcnemar(result.rows, ours, name) for name in rivals],
        "training_run": trained_for(weights[-1]).get("run"),
        "seed": parameters.test.seed,
        "unreadable": unreadable,
        "stopped_early": stopped,
    }
    write_json(folder / "results.json", results)
    write_csv(folder / "predictions.csv", result.rows)
    write_csv(folder / "decisions.csv", decisions(result.rows, ours))
    write_csv(folder / "classes.csv", per_class(result.rows, classifier.class_names, classifier.labels))
    sentences = "\n".join(mcnemar_line(one) for one in results["mcnemar"])
    text = f"{markdown_table(variants)}\n{caption(results)}.\n{sentences}\n"
    (folder / "results.md").write_text(text, encoding="utf-8")


def caption(results: dict) -> str:
    """What was measured, in one line."""
    early = ", stopped early" if results.get("stopped_early") else ""
    return (
        f"{results['variants'][0]['n']} test images{early}, reduced "
        f"{Reduction(results['scale'], results['interpolation'], results['antialias'])}, "
        f"{results['classifier']['architecture']}"
    )


@torch.no_grad()
def draw_reconstructions(
    pipelines: list[Pipeline], dataset: ImageTree, rows: list[dict], runtime: Runtime, folder: Path
) -> None:
    """Writes the figures that need images: some unselected ones, the worst cases, and the stages of the first."""
    classifier = pipelines[0].classifier
    labels = dict(zip(classifier.class_names, classifier.labels, strict=True))
    scored = {(row["image"], row["variant"]): row for row in rows}

    def load(chosen: list[str]) -> torch.Tensor:
        images = [dataset[dataset.paths.index(image)][1] for image in chosen]
        for image, path in zip(images, chosen, strict=True):
            if isinstance(image, str):  # the reason why it can't be read any more
                raise UnreadableImage(f"{path}: {image}")
        return to_float(torch.stack(images), runtime.device)

    def sheet(chosen: list[str], path: Path) -> None:
        images, columns, titles = load(chosen), {}, [[] for _ in chosen]
        for pipeline in pipelines:
            _, columns[pipeline.name], _ = pipeline(images)
            for title, image in zip(titles, chosen, strict=True):
                row = scored[image, pipeline.name]  # what the table counts
                text = f"{plots.shorten(labels[row['predicted']], 14)} {row['probability']:.0%}"
                title.append((text, plots.GOOD if row["correct"] else plots.BAD))
        plots.image_grid(columns, titles, path)

    order = list(dict.fromkeys(row["image"] for row in rows))  # seeded
    sheet(order[:SHOWN], folder / "triptychs.png")
    worst = worst_cases(rows, SHOWN, pipelines[-1].name)
    if worst:
        sheet(worst, folder / "worst.png")

    pipeline, original = pipelines[-1], load(order[:1])
    small, rebuilt, logits = pipeline(original)
    top = logits[0].softmax(0).topk(min(5, len(classifier.labels)))
    scores = [(classifier.labels[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    stages = [("original", original[0]), (f"reduced {pipeline.reduce}", small[0])]
    stages += [(f"{pipeline.name} x4", pipeline.restore.network(small)[0]), ("Scaler", rebuilt[0])]
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
    ours = results.get("ours", OURS)
    plots.results_table(results["variants"], caption(results), folder / "table.png", ours=ours)
    plots.f1_difference(classes, folder / "f1_difference.png", ours=ours)
    plots.f1_density(classes, folder / "f1_density.png", ours=ours)
    plots.class_bars(classes, folder / "classes.png", ours=ours)
    plots.decision_strip(rows, folder / "decisions.png", ours=ours)
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
