"""Evaluates every variant on the test folder: how much of the lost accuracy comes back?

    python test.py                                               parameters.json
    python test.py --parameters examples/shapes/parameters.json
    python test.py --set test.batches_per_epoch=10               a random part of the test images
    python test.py --weights assets/logs/train_20260101-120000/best.pt
    python test.py --weights A.pt B.pt                           two networks in one table
    python test.py --classifier efficientnet_b0                  read by a classifier that DarioNet never met
    python test.py --rival Adapted adapted.pth                   beside a classifier of examples/adapt_classifier.py
    python test.py --small --set data.test=thumbnails            images that are small already, in class folders
    torchrun --nproc_per_node=4 test.py                          one process per GPU: the same numbers, sooner

Variants: Original; Small (the small image itself); Bilinear; Bicubic; rivals, whose PSNR and SSIM are those of the
enlarged images that they read; the network that training started from (darionet.initial_weights, if the file
exists): ESRGAN, or Pixels; DarioNet (darionet.weights). With --small no image is reduced, their sizes may differ, and
what needs an original is left out: its row, PSNR, SSIM, agreement, what is recovered. Everything is written to
assets/logs/test_<stamp>/.
"""

import json
from pathlib import Path

import torch

from experiment import metrics, plots
from experiment.data import ImageTree, Transform, batches, epoch_batches, small_batches, whole_small
from experiment.evaluation import (
    Evaluation,
    ask,
    draw_sheet,
    evaluate,
    full_size,
    images_at,
    joined,
    make_pipelines,
    open_restore,
)
from experiment.metrics import BASELINE, ORIGINAL, SMALL
from experiment.parameters import read_parameters
from experiment.runtime import Runtime, Stopper, new_run_folder, progress_bar, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import default_weights, noted_architecture, open_classifier
from models.darionet import load_upscalers, other_input, to_device
from models.errors import InputError
from models.files import write_text
from models.images import UnreadableImage
from models.pipeline import Pipeline, unchanged
from models.scaler import Reduction, reduced_length
from models.weights import trained_for

SHOWN = 6  # images in a sheet of reconstructions
FIGURES = {  # of the report
    "The pipeline": "pipeline.png",
    "Results": "table.png",
    "Right or wrong, image by image": "decisions.png",
    "What rebuilding costs, class by class": "f1_difference.png",
    "Classes": "classes.png",
    "Reconstructions, unselected": "triptychs.png",
    "The most confident mistakes": "worst.png",
}


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks to test (default: darionet.weights)")
    parser.add_argument("--classifier", metavar="NAME|FILE", help="another one: an architecture or a weights file")
    rival = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "FILE")}
    parser.add_argument("--rival", **rival, help="a row NAME, read by a classifier adapted to small images; repeatable")
    parser.add_argument("--small", action="store_true", help="the images are small already: do not reduce them")
    arguments = parser.parse_args()
    arguments.set[:0] = classifier_settings(arguments.classifier)
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    with Stopper() as stopper:
        # Set-up
        t, options, section = parameters.transformations, parameters.test, parameters.classifier
        weights = arguments.weights or [parameters.darionet.weights]
        runtime = start_runtime(options.precision, options.seed)
        side, is_small = t.val_crop_size, arguments.small
        rebuilt_side = side if is_small else None  # what images that are small already are rebuilt to
        transform = whole_small(side) if is_small else Transform(t.resize_size, side)
        dataset = ImageTree(parameters.data.test, transform)
        reduction = Reduction(t.scale, t.interpolation, t.antialias)
        start = parameters.darionet.initial_weights
        networks = load_upscalers(weights, start, runtime.device, t.interpolation, t.antialias)
        classifier = to_device(open_classifier(**section.model_dump()), runtime.device)
        classifier.check(side, "transformations.val_crop_size")
        targets = dataset.targets(classifier.class_names, required=True)
        rivals = {}
        for name, path in arguments.rival:
            if name in {ORIGINAL, SMALL, BASELINE, "Bicubic", *networks, *rivals}:
                raise InputError(f"--rival {name}: the table has a row of that name: choose another")
            adapted = open_classifier(**section.model_dump() | {"weights": path})
            if adapted.class_names != classifier.class_names:
                raise InputError(f"{path}: its classes are not those of classifier.weights: adapt the same classifier")
            enlarging = str(trained_for(path).get("enlarge", "bilinear"))
            rivals[name] = to_device(adapted, runtime.device), open_restore(enlarging, reduction, runtime.device)
        small, left_out = reduced_length(side, t.scale), [ORIGINAL, SMALL] if is_small else []
        if not is_small and classifier.refusal(small, small):
            left_out = [SMALL]
            print(f"Left out: {SMALL}, since {section.architecture} can't read {small}x{small} pixels")
        pipelines = make_pipelines(classifier, unchanged if is_small else reduction, networks, rivals)
        pipelines = [pipeline for pipeline in pipelines if pipeline.name not in left_out]
        if runtime.is_main:
            folder = new_run_folder("test")
            metrics.write_json(folder / "parameters.json", parameters.model_dump())
        how = f"small, read at {side} pixels" if is_small else f"reduced {reduction}"
        print(f"Variants: {', '.join(p.name for p in pipelines)}; weights: {', '.join(weights)}")
        print(f"Classifier: {section.describe()}")
        print(f"Images: {len(dataset)} in {dataset.root}, {len(set(targets))} classes; {how}")
        print(f"Machine: {runtime.describe()}, batch size {options.batch_size}")
        for path in [*weights, *(path for _, path in arguments.rival)]:
            if not is_small and (note := other_input(path, reduction)):
                print(note)

        # Evaluation. A limited epoch takes the next batches of one seeded order; whole ones only steady the timing.
        lists = epoch_batches(len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=True, limit=None)
        result, limit = Evaluation(), options.batches_per_epoch
        for epoch in range(options.epochs):
            chosen = runtime.part(lists if limit is None else lists[epoch * limit : (epoch + 1) * limit])
            workers, is_cuda, keep = parameters.data.workers, runtime.device.type == "cuda", epoch == 0 or bool(limit)
            if is_small:
                arriving = small_batches(dataset, sum(chosen, []), workers, options.batch_size, small, stopper)
            else:
                arriving = batches(dataset, chosen, workers, is_cuda, stopper)
            with progress_bar(sum(map(len, chosen)), "test", options.verbose, unit="image") as bar:
                evaluate(pipelines, arriving, dataset, targets, runtime, stopper, bar, result, keep, rebuilt_side)
            if stopped := stopper.agree(*runtime.sum_numbers(stopper.requested)):
                break
        result = joined(runtime.gather(result), [dataset.paths[i] for chosen in lists for i in chosen])
        if not runtime.is_main:
            return stopper.code if stopped else 1 if result.unreadable else 0

        # What it writes
        unreadable = [{"image": path, "reason": reason} for path, reason in sorted(result.unreadable.items())]
        if unreadable:
            metrics.write_csv(folder / "unreadable.csv", unreadable)
            print(f"{len(unreadable)} images could not be read and were not scored: {folder / 'unreadable.csv'}")
        rows, ours = result.rows, pipelines[-1].name
        if not rows and not stopped:
            raise InputError(f"{dataset.root}: none of its images could be read; {folder / 'unreadable.csv'} says why")
        if rows:
            variants = metrics.summarise(rows, result.seconds, result.timed, options.seed)
            tests = [metrics.mcnemar(rows, ours, name) for name in [BASELINE, *rivals, *networks] if name != ours]
            run = trained_for(weights[-1]).get("run")
            results = {"variants": variants, "device": runtime.name(), "precision": runtime.precision}
            results |= {"torch": str(torch.__version__)} | ({"small": True} if is_small else reduction.note())
            results |= {"classifier": section.model_dump(exclude_none=True), "ours": ours}
            results |= {"mcnemar": tests, "training_run": run, "seed": options.seed, "unreadable": unreadable}
            metrics.write_json(folder / "results.json", results | {"stopped_early": stopped})
            metrics.write_csv(folder / "predictions.csv", rows)
            classes = metrics.per_class(rows, classifier.class_names, classifier.labels)
            metrics.write_csv(folder / "classes.csv", classes)
            early = ", stopped early" * stopped
            caption = f"{variants[0]['n']} test images{early}, {how}, {section.architecture}"
            text = "\n".join([f"{caption}.", *map(metrics.mcnemar_line, tests)])
            write_text(folder / "results.md", f"{metrics.markdown_table(variants)}\n{text}\n")
            print(f"\n{metrics.markdown_table(variants)}\n{text}\n")

            plots.results_table(variants, caption, folder / "table.png", ours)
            plots.decision_strip(rows, folder / "decisions.png", ours)
            if not is_small:
                plots.f1_difference(classes, folder / "f1_difference.png", ours)
            plots.class_bars(classes, folder / "classes.png", ours=ours)
            try:
                draw_images(pipelines, dataset, rows, runtime, folder, rebuilt_side)
            except UnreadableImage as error:
                print(f"Figures that show images are left out: {error}")
            figures = {heading: folder / name for heading, name in FIGURES.items()}
            figures |= {"Training": Path(run, "curves.png")} if run else {}
            figures = [(heading, path) for heading, path in figures.items() if path.is_file()]
            plots.report("DarioNet", text, parameters.model_dump(), figures, folder / "report.pdf")
    if stopped:
        print(f"Stopped: {len({row['image'] for row in rows})} of {len(dataset)} images were scored")
    print(folder)
    return stopper.code if stopped else 1 if unreadable else 0


def classifier_settings(choice: str | None) -> list[str]:
    """The parameters that --classifier stands for: an architecture with its published weights, or a file."""
    if choice is None:
        return []
    from torchvision import models  # here, since its import takes as long as torch's

    architecture = choice
    if ".py:" in choice:
        weights = None
    elif choice.startswith("timm/"):
        weights = "pretrained"
    elif choice in models.list_models(module=models):
        weights = default_weights(choice)
    else:
        architecture, weights = noted_architecture(choice), choice
        if architecture is None:
            return [f"classifier.weights={choice}"]
    return [f"classifier={json.dumps({'architecture': architecture, 'weights': weights})}"]


def draw_images(
    pipelines: list[Pipeline], dataset: ImageTree, rows: list[dict], runtime: Runtime, folder: Path, side: int | None
) -> None:
    """Writes the figures that show images: some unselected ones, the worst cases, and the stages of the first.

    Raises UnreadableImage if one of them can't be read any more.
    """
    ours = pipelines[-1]
    labels = dict(zip(ours.classifier.class_names, ours.classifier.labels, strict=True))
    scored = {(row["image"], row["variant"]): row for row in rows}

    def verdict(path: str, variant: str) -> tuple[str, str]:
        row = scored[path, variant]  # what the table counts
        text = f"{plots.shorten(labels[row['predicted']], 14)} {row['probability']:.0%}"
        return text, plots.GOOD if row["correct"] else plots.BAD

    order = list(dict.fromkeys(row["image"] for row in rows))  # seeded
    for name, chosen in (("triptychs", order[:SHOWN]), ("worst", metrics.worst_cases(rows, SHOWN, ours.name))):
        if chosen:
            verdicts = {path: [verdict(path, pipeline.name) for pipeline in pipelines] for path in chosen}
            draw_sheet(pipelines, dataset, verdicts, runtime, folder / f"{name}.png", side)

    (image,) = images_at(dataset, order[:1], runtime.device)
    small, rebuilt, (best,) = ask(ours, image, runtime, side and full_size(image.shape, side), top=5)
    stages = [("as it came", small[0])] if side else [("original", image[0]), (f"reduced {ours.reduce}", small[0])]
    with torch.no_grad():
        stages += [(f"{ours.name} x4", ours.restore.network(small)[0]), ("Scaler", rebuilt[0])]
    scores = [(one["label"], one["probability"]) for one in best]
    plots.pipeline_figure(stages, scores, folder / "pipeline.png")


if __name__ == "__main__":
    run_script(main)
