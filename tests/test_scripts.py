"""Every script from end to end, as a user starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unicodedata import normalize
from urllib.error import URLError

import pytest
import torch
from conftest import (
    CLASSES,
    ROOT,
    Result,
    checkpoint,
    draw,
    draw_folder,
    last_line,
    one_line,
    read_csv,
    results_of,
    same_state,
    stop_after,
    write_parameters,
)
from PIL import Image
from torchvision.models import get_model

from experiment import distillation, evaluation, plots
from experiment.run import claimed
from models.classifier import open_classifier, save_classifier
from models.darionet import load_upscalers
from models.rrdbnet import RRDBNet
from models.weights import load_generator, save_weights, trained_for


def rewrite_note(path: str, note: dict) -> None:
    save_weights(load_generator(path), path, note)


def succeeds(result: Result) -> Path:
    """The folder of a run that ended well."""
    assert result.code == 0, result
    return last_line(result)


def names_of(results: dict) -> list[str]:
    return [variant["name"] for variant in results["variants"]]


def small_classifier(architecture: str = "resnet18", classes: list[str] = CLASSES, **options) -> torch.nn.Module:
    return get_model(architecture, weights=None, num_classes=len(classes), **options)


def test_training_writes_everything(start, experiment):
    result = start("train_darionet")
    folder = succeeds(result)
    assert folder.parts[:2] == ("assets", "logs") and folder.name.startswith("train_")
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    samples = {"samples/epoch_01.png", "samples/epoch_02.png"}
    checkpoints = {"checkpoint.pt", "checkpoint_previous.pt"}
    assert names == {"parameters.json", "history.csv", "best.pt", "curves.png"} | checkpoints | samples
    history = read_csv(folder / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    best = min(float(row["val_loss"]) for row in history)
    assert checkpoint(folder)["state"]["best"] == best
    weights = torch.load("DarioNet.pt", weights_only=True)
    RRDBNet(8, 1, 4).load_state_dict(weights["params"])
    assert same_state(weights, torch.load(folder / "best.pt", weights_only=True))
    assert weights["trained_for"]["scale"] == 0.32 and weights["trained_for"]["run"] == str(folder)
    assert "12 in train" in result.out and "6 in val" in result.out and "starts as a plain enlargement" in result.out
    resolved = json.loads((folder / "parameters.json").read_text())
    assert resolved["training"]["epochs"] == 2 and resolved["transformations"]["scale"] == 0.32


def test_pixels_then_logits_then_test(start, experiment):
    """The pre-training on pixels that stands in for ESRGAN's weights, and its name in the table."""
    pixels = ["--set", 'training.loss={"logits":0,"pixels":1}', "--set", "darionet.weights=Pixels.pt"]
    succeeds(start("train_darionet", *pixels, "--set", "training.epochs=1"))
    initial = ["--set", "darionet.initial_weights=Pixels.pt"]
    succeeds(start("train_darionet", *initial, "--set", "training.epochs=1"))
    result = start("test", *initial)
    folder, results = succeeds(result), results_of(result)
    assert names_of(results) == ["Original", "Small", "Bilinear", "Bicubic", "Pixels", "DarioNet"]
    keys = {
        *("name", "n", "cross_entropy", "psnr_db", "ssim", "accuracy", "accuracy_low", "accuracy_high", "top5"),
        *("agreement", "recovered", "recovered_low", "recovered_high", "seconds", "images_per_second"),
    }
    assert all(set(variant) == keys and variant["n"] == 9 for variant in results["variants"])
    assert results["variants"][0]["psnr_db"] is results["variants"][1]["psnr_db"] is None
    assert results["variants"][0]["agreement"] == 1
    once = {"device", "precision", "torch", "scale", "interpolation", "antialias", "classifier", "seed", "unreadable"}
    assert set(results) == once | {"variants", "mcnemar", "training_run", "ours", "stopped_early"}
    rows = read_csv(folder / "predictions.csv")
    assert len(rows) == 9 * 6 and {row["class"] for row in rows} == set(CLASSES)
    accuracy = sum(int(row["correct"]) for row in rows if row["variant"] == "DarioNet") / 9
    assert results["variants"][-1]["accuracy"] == pytest.approx(accuracy)
    for row in rows:
        assert (row["class"] == row["predicted"]) == (row["correct"] == "1")
    assert len(read_csv(folder / "classes.csv")) == 3 * 6
    for figure in ("table", "triptychs", "pipeline", "f1_difference", "classes", "decisions"):
        with Image.open(folder / f"{figure}.png") as image:
            assert image.width > 300
    assert (folder / "results.md").read_text().splitlines()[0] in result.out
    assert [test["second"] for test in results["mcnemar"]] == ["Bilinear", "Pixels"]
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    assert Path(results["training_run"], "curves.png").is_file()


@pytest.mark.usefixtures("no_figures")
def test_limited_batches_and_epochs_of_the_test(start, trained):
    limited = ["--set", "test.batches_per_epoch=1"]
    rows = read_csv(last_line(start("test", *limited)) / "predictions.csv")
    assert len({row["image"] for row in rows}) == 4
    rows = read_csv(last_line(start("test", *limited, "--set", "test.epochs=2")) / "predictions.csv")
    assert len({row["image"] for row in rows}) == 8
    assert results_of(start("test", "--set", "test.epochs=2"))["variants"][0]["n"] == 9


def test_training_needs_images_only(start, experiment):
    for i, folder in enumerate(["photographs/2019/summer", "photographs/2019", "held out"]):
        (experiment / folder).mkdir(parents=True, exist_ok=True)
        draw("discs", i, 50).save(experiment / folder / f"{i}.png")
    options = ["--set", "data.train=photographs", "--set", "data.val=held out", "--set", "training.epochs=1"]
    result = start("train_darionet", *options)
    row = read_csv(succeeds(result) / "history.csv")[0]
    assert row["val_accuracy"] == "" and float(row["val_agreement"]) in (0, 1)
    assert "accuracy" not in result.out.split("validation loss")[1]
    one_line(start("test", "--set", "data.test=held out", "--set", "darionet.weights=DarioNet.pt"), "without labels")


@pytest.mark.usefixtures("no_figures")
def test_any_frozen_classifier_and_transfer(start, experiment):
    """The README's recipe: unlabelled photographs and a state dict of the user's own, then another classifier."""
    (experiment / "photographs").mkdir()
    for i in range(6):
        draw(CLASSES[i % 3], i, 50).save(f"photographs/{i}.jpg")
    torch.manual_seed(5)
    options = {"architecture": "mobilenet_v3_small", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    save_classifier(small_classifier("mobilenet_v3_small").state_dict(), CLASSES, "mine.pt", **options)
    own = ["--set", "classifier.weights=mine.pt", "--set", "classifier.architecture=mobilenet_v3_small"]
    succeeds(start("train_darionet", *own, "--set", "data.train=photographs", "--set", "training.epochs=1"))
    assert trained_for("DarioNet.pt")["classifier"]["weights"] == "mine.pt"
    mine_alone = results_of(start("test", *own))
    transferred, other = (results_of(start("test", "--classifier", name)) for name in ("mine.pt", "classifier.pt"))
    assert transferred["classifier"] == {"architecture": "mobilenet_v3_small", "weights": "mine.pt"}
    assert [v["accuracy"] for v in transferred["variants"]] == [v["accuracy"] for v in mine_alone["variants"]]
    assert other["classifier"]["architecture"] == "resnet18"
    psnr = [[v["psnr_db"] for v in r["variants"]] for r in (transferred, other)]
    assert psnr[0] == psnr[1]  # the same rebuilt images
    one_line(start("test", "--set", "classifier.weights=mine.pt"), "mine.pt: holds a mobilenet_v3_small", "resnet18")
    one_line(start("test", "--classifier", "absent.pt"), "absent.pt: no such weights file")


def test_without_internet_the_line_names_the_file_of_a_classifiers_weights(start, trained, monkeypatch):
    def no_network(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(trained))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    for name, file in (("resnet50", "resnet50-0676ba61.pth"), ("vit_h_14", "vit_h_14_swag-80465313.pth")):
        one_line(start("test", "--classifier", name), f"put {file} into {trained / 'hub/checkpoints'}")


def test_try_one_image(start, trained):
    torch.save(RRDBNet(8, 1, 4).state_dict(), "ESRGAN_x4.pth")
    draw("checks", 5, 90).save("my image.jpg")
    result = start("try_darionet", "my image.jpg", "--weights", "ESRGAN_x4.pth", "DarioNet.pt")
    folder = succeeds(result)
    assert folder.name.startswith("try_") and folder.name.endswith("_my_image")
    assert set(os.listdir(folder)) == {"scales.png", "classification.png", "predictions.json", "parameters.json"}
    predictions = json.loads((folder / "predictions.json").read_text())["predictions"]
    rows = ["x0.32, Bilinear", "x0.32, DarioNet", "x0.32, ESRGAN"]
    rows += ["original", "original rebuilt at x4, DarioNet", "original rebuilt at x4, ESRGAN"]
    assert [p["of"] for p in predictions] == rows
    for p in predictions:
        assert p["class"] in CLASSES and 1 / 3 <= p["probability"] <= 1
        assert f"{p['label']} ({p['probability']:.1%})" in result.out


@pytest.mark.usefixtures("no_figures")
def test_an_input_that_the_weights_were_not_trained_for_is_mentioned(start, trained):
    rewrite_note("DarioNet.pt", {"scale": 0.5, "interpolation": "bilinear", "antialias": True})
    draw("checks", 5).save("a.png")
    for call in (["test"], ["try_darionet", "a.png"]):
        assert "trained for scale 0.5, not 0.32, antialias True, not False" in start(*call).out
        matching = ["--set", "transformations.scale=0.5", "--set", "transformations.antialias=true"]
        assert "trained for" not in start(*call, *matching).out


def test_try_small_images(start, trained):
    draw("discs", 1, 12).save("icon.png")
    result = start("try_darionet", "--small", "icon.png")
    assert result.code == 0 and (last_line(result) / "small.png").is_file()
    (trained / "icons" / "more").mkdir(parents=True)
    draw("discs", 1, 12).save("icons/a.png")
    draw("checks", 2, 20).resize((20, 11)).save("icons/more/b.png")
    result = start("try_darionet", "--small", "icons")
    folder = succeeds(result)
    rows = read_csv(folder / "predictions.csv")
    sizes = [(row["image"], row["width"], row["height"]) for row in rows]
    assert sizes == [("a.png", "12", "12"), ("more/b.png", "20", "11")]
    assert rows[0]["darionet_class"] in CLASSES and 0 < float(rows[0]["bilinear_probability"]) <= 1
    changed = sum(row["darionet_class"] != row["bilinear_class"] for row in rows)
    sure = sum(float(row["darionet_probability"]) for row in rows) / 2
    assert f"DarioNet changes {changed} of 2 decisions on bilinear images; mean probability {sure:.2f}" in result.out
    assert (folder / "small.png").is_file()


def test_small_images_with_labels(start, trained):
    """What needs an original is left out; decisions are those of try_darionet.py."""
    for c, kind in enumerate(CLASSES):
        (trained / "small" / kind).mkdir(parents=True)
        for i, size in enumerate([(12, 12), (20, 11), (11, 20)]):
            draw(kind, 100 * c + i, 20).resize(size).save(f"small/{kind}/{i}.png")
    result = start("test", "--small", "--set", "data.test=small")
    folder, results = succeeds(result), results_of(result)
    assert results["small"] and "scale" not in results and names_of(results) == ["Bilinear", "Bicubic", "DarioNet"]
    for row in results["variants"]:
        assert row["n"] == 9 and row["accuracy"] is not None and row["top5"] is not None
        assert {row[key] for key in ("psnr_db", "ssim", "agreement", "recovered")} == {None}
    assert "PSNR" not in result.out and "Recovered" not in result.out
    assert {"triptychs.png", "decisions.png", "classes.png", "pipeline.png", "report.pdf"} <= set(os.listdir(folder))
    read = read_csv(last_line(start("try_darionet", "--small", "small")) / "predictions.csv")
    tried = {row["image"]: row for row in read}
    for row in read_csv(folder / "predictions.csv"):
        if row["variant"] != "Bicubic":
            assert row["predicted"] == tried[row["image"]][f"{row['variant'].lower()}_class"]
    one_line(start("test", "--small", "--set", "data.test=small/discs"), "no class folders", "try_darionet.py --small")


@pytest.mark.usefixtures("no_figures")
def test_what_cannot_be_tried(start, trained):
    """Damaged files are in tests/test_images.py. What is smaller than half a crop is taken for a thumbnail."""
    one_line(start("try_darionet", "absent.png"), "absent.png: no such image")
    one_line(start("try_darionet"), "image")
    one_line(start("try_darionet", "test"), "test: a folder", "--small")
    draw("discs", 1, 15).save("thumbnail.png")
    refused = start("try_darionet", "thumbnail.png")
    one_line(refused, "thumbnail.png: 15x15 pixels: it looks small already; add --small")
    draw("discs", 1, 16).save("thumbnail.png")
    succeeds(start("try_darionet", "thumbnail.png"))
    Path("DarioNet.pt").unlink()
    for call in (["try_darionet", "thumbnail.png"], ["test"]):
        one_line(start(*call), "DarioNet.pt", "train_darionet.py", "make demo", "--parameters examples/shapes")


@pytest.mark.usefixtures("no_figures")
def test_folders_and_weights_that_do_not_fit(start, trained):
    for script, key in (("train_darionet", "data.train"), ("train_darionet", "data.val"), ("test", "data.test")):
        one_line(start(script, "--set", f"{key}=nowhere"), "nowhere: no such folder", "make demo")
        (trained / "empty").mkdir(exist_ok=True)
        one_line(start(script, "--set", f"{key}=empty"), "empty: holds no images")
    draw_folder(trained / "zebras" / "zebra", 1, [CLASSES[0]])
    one_line(start("test", "--set", "data.test=zebras"), "no class named zebra", "checks, discs, stripes")
    one_line(start("train_darionet", "--set", "darionet.initial_weights=absent.pth"), "absent.pth: no such weights")
    torch.save(RRDBNet(8, 2, 4).state_dict(), "larger.pth")
    one_line(start("train_darionet", "--set", "darionet.initial_weights=larger.pth"), "(8, 2, 4)", "(8, 1, 4)")
    Path("DarioNet.pt").write_text("not weights")
    one_line(start("test"), "DarioNet.pt: not a")
    one_line(start("test", "--weights", "classifier.pt"), "classifier.pt: not an RRDBNet")


def test_weights_that_could_not_be_written_are_refused_before_training(start, experiment):
    for path, message in (
        ("train", "change darionet.weights"),
        ("parameters.json/DarioNet.pt", "change darionet.weights"),
        (f"{'x' * 300}.pt", "change darionet.weights"),
        ("DarioNet.safetensors", "DarioNet.safetensors: weights are written as torch does"),
        (ROOT / "assets/models/DarioNet_photographs.pt", "is not written over: change darionet.weights"),
    ):
        one_line(start("train_darionet", "--set", f"darionet.weights={path}"), str(path)[:100], message)
    same = ("--set", "classifier.weights=a.pt", "--set", "darionet.weights=./a.pt")
    one_line(start("train_darionet", *same), "the same file as classifier.weights")


def test_a_classifier_that_cannot_read_small_images(start, trained):
    """Some architectures refuse a size: the row is left out, or one line says which parameter to change."""
    torch.manual_seed(0)
    save_classifier(small_classifier("squeezenet1_1"), CLASSES, "squeeze.pt", architecture="squeezenet1_1")
    result = start("test", "--classifier", "squeeze.pt", "--set", "transformations.scale=0.1")
    assert result.code == 0 and "Left out: Small, since squeezenet1_1 can't read 3x3 pixels" in result.out
    assert names_of(results_of(result)) == ["Original", "Bilinear", "Bicubic", "DarioNet"]
    own = ["--set", "classifier.weights=squeeze.pt", "--set", "classifier.architecture=squeezenet1_1"]
    small = ["--set", "transformations.val_crop_size=3"]
    draw("checks", 5).save("a.png")
    for call in (["train_darionet"], ["test"], ["try_darionet", "a.png"]):
        one_line(start(*call, *own, *small), "can't read images of 3x3 pixels", "transformations.val_crop_size")


@pytest.mark.usefixtures("no_figures")
def test_a_run_whose_validation_was_never_finite_says_so(start, experiment, monkeypatch):
    loss = distillation.distillation_loss

    def spoilt(*arguments, **options):
        losses = loss(*arguments, **options)
        losses.total *= 1 if torch.is_grad_enabled() else float("nan")
        return losses

    monkeypatch.setattr(distillation, "distillation_loss", spoilt)
    one_line(start("train_darionet"), "never finite")
    assert not Path("DarioNet.pt").exists()


def test_a_stopped_evaluation(start, trained, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, signal.SIGTERM)
        result = start("test")
    assert result.code == 143 and "Stopped: 4 of 9 images were scored" in result.out
    found, folder = results_of(result), last_line(result)
    assert found["stopped_early"] and found["variants"][0]["n"] == 4
    assert "4 test images, stopped early" in (folder / "results.md").read_text()
    assert {"report.pdf", "triptychs.png"} <= set(os.listdir(folder))


def test_small_images_of_another_size_than_the_weights_were_trained_for(start, trained):
    rewrite_note("DarioNet.pt", {"scale": 0.32})
    for side, said in ((10, False), (20, True)):
        draw("discs", 1, side).save("icon.png")
        result = start("try_darionet", "--small", "icon.png")
        assert ("trained for small images of 10 pixels, not 20" in result.out) == said
    rewrite_note("DarioNet.pt", {"scale": 0.32, "random_reduction": {"scale": [0.3, 0.7], "antialias": [False, True]}})
    assert "trained for" not in start("try_darionet", "--small", "icon.png").out
    draw("discs", 1).save("large.png")
    for setting, said in (("scale=0.6", False), ("antialias=true", False), ("scale=0.2", True)):
        result = start("try_darionet", "large.png", "--set", f"transformations.{setting}")
        assert ("DarioNet.pt was trained for scale 0.32, not 0.2" in result.out) == said, result.out


def test_the_default_without_imagenet(tmp_path):
    """A real start from another folder, as on a fresh machine."""
    (tmp_path / "parameters.json").write_text((ROOT / "parameters.json").read_text())
    command = [sys.executable, str(ROOT / "train_darionet.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    line = result.stderr.strip()
    assert "\n" not in line and "assets/ImageNet2012_train: no such folder" in line and "make demo" in line


@pytest.fixture
def train_classifier(start, experiment):
    """Calls examples/train_classifier.py with options -> Result; it writes own.pt."""
    write_parameters(experiment / "parameters.json", classifier={"weights": "own.pt"})
    return partial(start, "examples/train_classifier", "--batch-size", 4)


def test_classifier_for_data_that_has_none(train_classifier):
    """examples/train_classifier.py writes what open_classifier reads; one file has one training."""
    with claimed("own.pt"):
        one_line(train_classifier("--epochs", 1), "own.pt: another run is writing it")
    assert not Path("own.pt").exists()
    result = train_classifier("--epochs", 2, "--shift", 2)
    assert result.code == 0, result.err
    assert open_classifier("resnet18", "own.pt").class_names == CLASSES
    assert "12 images of 3 classes in train" in result.out and "own.pt" in result.out
    before = torch.load("own.pt", weights_only=True)["state_dict"]
    assert train_classifier("--epochs", 2, "--shift", 2).code == 0
    assert all(tensor.equal(before[name]) for name, tensor in torch.load("own.pt")["state_dict"].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-smoothing", 2], "--label-smoothing 2.0: has to be from 0 to 1"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--set", "classifier.weights=train"], "train: can't be written"),
        (["--set", "classifier.architecture=alexnet"], "can't read images of 32x32 pixels"),
        (["--set", "data.train=nowhere"], "nowhere: no such folder"),
        (["--shift", 32], "--shift 32: has to be from 0 to 31"),
        (["--set", "data.val=held_out"], "the classifier has no class named others"),
    ],
)
def test_what_a_classifier_cannot_be_trained_with(train_classifier, experiment, options, message):
    draw_folder(experiment / "held_out", 1, ["discs"])
    (experiment / "held_out" / "discs").rename(experiment / "held_out" / "others")
    one_line(train_classifier(*options), message)
    assert not Path("own.pt").exists() and not Path("assets/logs").exists()


def test_a_classifier_of_damaged_images(train_classifier, experiment):
    (experiment / "train" / CLASSES[0] / "0.png").write_bytes(b"broken")
    result = train_classifier("--epochs", 1)
    assert result.code == 0 and "1 of 18 images were not used: they can't be read" in result.out
    (experiment / "val" / CLASSES[0] / "0.png").write_bytes(b"")
    assert "2 of 18 images were not used" in train_classifier("--epochs", 1).out
    Path("own.pt").unlink()
    for path in (experiment / "val").rglob("*.png"):
        path.write_bytes(b"")
    one_line(train_classifier("--epochs", 1), "val: none of its images could be read")
    assert not Path("own.pt").exists()


@pytest.fixture
def adapt(start, experiment):
    """Calls examples/adapt_classifier.py with options -> Result."""
    return partial(start, "examples/adapt_classifier")


OWN_NETWORK = """
import torch
from torch import nn

CLASS_NAMES = ["checks", "discs", "stripes"]
MEAN = STD = (0.5, 0.5, 0.5)


def network():
    torch.manual_seed(2)
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers)
"""


def test_a_rival_from_training_to_the_table(adapt, start, trained):
    """Of the user's own network. A copy that did not change has the row of whatever enlarged its images."""
    Path("own.py").write_text(OWN_NETWORK)
    own = ("--set", "classifier.architecture=own.py:network", "--set", "classifier.weights=null")
    run = succeeds(adapt("--output", "adapted.pth", *own, "--set", "training.ema_decay=0.5"))
    first, second = (float(row["val_loss"]) for row in read_csv(run / "history.csv"))
    assert second < first
    original = open_classifier("own.py:network", None)
    adapted = open_classifier("own.py:network", "adapted.pth")
    moved = {k for k, v in original.network.state_dict().items() if not v.equal(adapted.network.state_dict()[k])}
    assert moved == {name for name, _ in original.network.named_parameters()}, "BatchNorm's statistics stay"

    for name, note in (("same.pth", None), ("rebuilds.pth", {"enlarge": "DarioNet.pt", "scale": 0.5})):
        save_classifier(original.network, CLASSES, name, mean=[0.5] * 3, std=[0.5] * 3, trained_for=note)
    names = {"Adapted": "adapted.pth", "Same": "same.pth", "Rebuilds": "rebuilds.pth"}
    result = start("test", *own, *(part for pair in names.items() for part in ("--rival", *pair)))
    folder, found = succeeds(result), results_of(result)
    assert "adapted.pth was trained for" not in result.out
    assert "rebuilds.pth was trained for scale 0.5, not 0.32" in result.out
    by_name = {name: [] for name in names_of(found)}
    for row in read_csv(folder / "predictions.csv"):
        by_name[row.pop("variant")].append(row)
    assert list(by_name) == ["Original", "Small", "Bilinear", "Bicubic", *names, "DarioNet"]
    assert by_name["Same"] == by_name["Bilinear"] and by_name["Rebuilds"] == by_name["DarioNet"]
    assert by_name["Adapted"] != by_name["Bilinear"]
    assert found["ours"] == "DarioNet" and [one["second"] for one in found["mcnemar"]] == ["Bilinear", *names]
    assert {"triptychs.png", "pipeline.png", "decisions.png", "table.png"} <= set(os.listdir(folder))


def test_what_is_not_reduced_has_nothing_to_adapt_to(adapt):
    """At scale 1 the copy sees the original image: the loss is 0 and the weights stay. In float32: oneDNN's bf16
    convolutions may round otherwise where gradients are asked for, and Adam makes whole steps of a rounding."""
    options = ("--set", "transformations.scale=1", "--set", "training.epochs=1", "--set", "training.precision=float32")
    row = read_csv(succeeds(adapt("--output", "adapted.pth", *options)) / "history.csv")[0]
    assert (float(row["train_loss"]), float(row["val_loss"]), float(row["val_agreement"])) == (0, 0, 1)
    classifiers = [open_classifier("resnet18", path) for path in ("classifier.pt", "adapted.pth")]
    assert classifiers[0].fingerprint() == classifiers[1].fingerprint()


def test_a_stopped_adaptation_ends_as_if_never_stopped(adapt, monkeypatch):
    options = ("--output", "adapted.pth", "--enlarge", "bicubic", "--set", "transformations.random_reduction={}")
    whole = checkpoint(last_line(adapt(*options)))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGTERM)
        stopped = adapt(*options)
    assert stopped.code == 143 and "--resume assets/logs/adapt_" in stopped.out
    resume = ("--output", "adapted.pth", "--resume", "--enlarge")
    one_line(adapt(*resume, "bilinear"), "enlarge bicubic, now it is bilinear")
    assert same_state(checkpoint(succeeds(adapt(*resume, "bicubic"))), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output"),
        (["--output", "classifier.pt"], "--output classifier.pt: the same file as classifier.weights"),
        (["--output", "train"], "train: can't be written"),
        (["--output", "a.pth", "--enlarge", "nowhere.pth"], "nowhere.pth: no such weights file"),
        (["--output", "a.pth", "--set", 'training.loss={"logits": 0, "pixels": 1}'], "pixels alone"),
    ],
)
def test_what_no_classifier_can_be_adapted_to(adapt, options, message):
    one_line(adapt(*options), message)
    assert not Path("a.pth").exists() and not Path("assets/logs").exists()


def test_what_is_no_rival(start, trained):
    save_classifier(small_classifier(classes=CLASSES[:2]), CLASSES[:2], "two.pth")
    for name, path, message in (
        ("DarioNet", "classifier.pt", "--rival DarioNet: the table has a row of that name"),
        ("Two", "two.pth", "two.pth: its classes are not those of classifier.weights"),
        ("Absent", "absent.pth", "absent.pth: no such weights file"),
    ):
        one_line(start("test", "--rival", name, path), message)


def test_a_classifier_that_diverges(train_classifier):
    result = train_classifier("--epochs", 9, "--learning-rate", 100, "--set", "training.precision=float32")
    if result.code == 0:  # it did not: then all is finite
        assert "nan" not in result.out
    else:
        one_line(result, "not finite", "learning")  # which to lower, not that something is damaged
    if Path("own.pt").exists():
        assert all(torch.isfinite(p).all() for p in open_classifier("resnet18", "own.pt").network.parameters())


def test_figures_of_a_test_folder_that_went_away(start, trained, monkeypatch):
    joined = evaluation.joined

    def and_gone(*arguments):
        shutil.rmtree("test")
        return joined(*arguments)

    monkeypatch.setattr(evaluation, "joined", and_gone)
    result = start("test")
    files = os.listdir(succeeds(result))
    assert "Figures that show images are left out" in result.out
    assert "table.png" in files and "report.pdf" in files and "triptychs.png" not in files


def test_scores_that_overflow_make_no_row(start, trained):
    state = load_generator("DarioNet.pt")
    for key in ("HRconv.weight", "conv_last.weight"):
        state[key].fill_(3e38)
    state["conv_last.weight"][:, ::2] *= -1  # infinite minus infinite is no number
    state["HRconv.bias"].fill_(3e38)
    save_weights(state, "DarioNet.pt", {"loss": {"logits": 1.0}})
    draw("discs", 1).save("a.png")
    one_line(start("test"), "the scores on the images of DarioNet are not finite: its weights are damaged")
    one_line(start("try_darionet", "a.png"), "are not finite")
    assert not list(Path("assets/logs").glob("*/results.json"))


@pytest.mark.usefixtures("no_figures")
def test_rows_are_named_for_what_they_are(start, trained):
    """Weights of unknown origin, ESRGAN's, and two DarioNets under their files' names."""
    torch.manual_seed(3)
    for name in ("plain.pth", "RRDB_ESRGAN_small.pth"):
        torch.save(RRDBNet(8, 1, 4).state_dict(), name)
    save_weights(RRDBNet(8, 1, 4), "B.pt", {"loss": {"logits": 1.0}})
    for options, names in (
        (["--weights", "plain.pth"], ["plain"]),
        (["--weights", "DarioNet.pt", "B.pt"], ["DarioNet", "B"]),
        (["--weights", "RRDB_ESRGAN_small.pth", "B.pt"], ["ESRGAN", "DarioNet"]),
    ):
        results = results_of(start("test", *options))
        assert names_of(results) == ["Original", "Small", "Bilinear", "Bicubic", *names]
        assert results["ours"] == names[-1]
        assert [test["second"] for test in results["mcnemar"]] == ["Bilinear", *names[:-1]]
    for again in (["B.pt", "DarioNet.pt", "B.pt"], ["DarioNet.pt", "B.pt"]):  # the last one named is ours
        assert list(load_upscalers(again, "B.pt")) == ["DarioNet", "B"]


@pytest.mark.usefixtures("no_figures")
def test_sheets_say_what_the_table_counts(start, trained, monkeypatch):
    """Also where a file system, or the classifier's, took the accents of a class's name apart."""
    for old, new in ((CLASSES[0], normalize("NFD", "café")), (CLASSES[1], normalize("NFC", "thé"))):
        (trained / "test" / old).rename(trained / "test" / new)
    known = [normalize("NFC", "café"), normalize("NFD", "thé"), CLASSES[2]]
    save_classifier(open_classifier("resnet18", "classifier.pt").network, known, "classifier.pt")
    sheets = []
    monkeypatch.setattr(plots, "image_grid", lambda columns, titles, path: sheets.append((list(columns), titles)))
    result = start("test", "--set", "test.precision=bf16")
    rows = read_csv(last_line(result) / "predictions.csv")
    right = {(row["image"], row["variant"]): row["correct"] == "1" for row in rows}
    assert any(right.values()) and not all(right.values())
    images, (names, titles) = list(dict.fromkeys(row["image"] for row in rows)), sheets[0]
    for image, line in zip(images, titles, strict=False):
        expected = [plots.GOOD if right[image, variant] else plots.BAD for variant in names]
        assert [colour for _, colour in line] == expected


@pytest.mark.usefixtures("no_figures")
def test_only_a_runs_own_curves_are_in_the_report(start, trained, monkeypatch):
    Path("run").mkdir()
    for path in ("curves.png", "run/curves.png"):
        Image.new("RGB", (5, 5)).save(path)
    seen = []
    monkeypatch.setattr(plots, "report", lambda title, text, parameters, figures, path: seen.append(dict(figures)))
    assert start("test").code == 0
    save_weights(load_generator("DarioNet.pt"), "DarioNet.pt", {"run": "run"})
    assert start("test").code == 0
    assert seen == [{}, {"Training": Path("run/curves.png")}]


def test_without_weights_of_ones_own_the_shipped_network_is_taken(start, trained, monkeypatch):
    """The example as a whole: its parameters, its classifier, its weights."""
    Path("DarioNet.pt").rename("shipped.pt")
    write_parameters(Path("shipped.json"), transformations={"scale": 0.5}, darionet={"weights": "shipped.pt"})
    draw("discs", 1).save("a.png")
    monkeypatch.setattr("experiment.parameters.SHIPPED", Path("shipped.json"))
    result = start("try_darionet", "a.png")
    assert result.code == 0 and "DarioNet.pt does not exist: taking shipped.pt and its classifier" in result.out
    assert json.loads((last_line(result) / "parameters.json").read_text())["transformations"]["scale"] == 0.5
    one_line(start("try_darionet", "a.png", "--weights", "absent.pt"), "absent.pt: no such weights file")
    one_line(start("try_darionet", "a.png", "--parameters", "parameters.json"), "DarioNet.pt: no such weights file")
    one_line(start("test"), "DarioNet.pt: no such weights file")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.usefixtures("no_figures")
def test_training_for_tensorboard(start, experiment, monkeypatch, installed):
    arguments = ("train_darionet", "--set", "training.tensorboard=true", "--set", "training.epochs=1")
    if not installed:
        monkeypatch.setattr("experiment.metrics.find_spec", lambda name: None)
        one_line(start(*arguments), "training.tensorboard", "pip install tensorboard")
        return
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = start(*arguments)
    run = succeeds(result)
    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    row = read_csv(run / "history.csv")[0]
    assert seen.Scalars("val_loss")[0].value == pytest.approx(float(row["val_loss"]), rel=1e-5)
    assert seen.Scalars("val_loss")[0].step == 1 and seen.Tags()["images"] == ["samples"]
