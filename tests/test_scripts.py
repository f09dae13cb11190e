"""Every script from end to end, as a user starts it."""

import csv
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import CLASSES, ROOT, Result, draw, draw_folder, load_script, one_line, write_parameters
from PIL import Image
from torchvision.models import get_model

from models.classifier import open_classifier, save_classifier
from models.darionet import load_upscalers
from models.rrdbnet import RRDBNet
from models.weights import load_generator, save_weights, trained_for


def rewrite_note(path: str, note: dict) -> None:
    save_weights(load_generator(path), path, note)


def last_line(result) -> Path:
    return Path(result.out.strip().splitlines()[-1])


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_state(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


CLOCKS = ("seconds", "images_per_second")


def test_training_writes_everything(start, experiment):
    result = start("train_darionet")
    assert result.code == 0, result.err
    folder = last_line(result)
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


def stop_after(monkeypatch, steps: int, number: int) -> None:
    """Sends this process a signal in the middle of the step after `steps`."""
    from experiment import data, distillation

    calls, to_float = [], data.to_float

    def counting(images, device):
        calls.append(1)
        if len(calls) == steps + 1:
            os.kill(os.getpid(), number)
        return to_float(images, device)

    monkeypatch.setattr(data, "to_float", counting)
    monkeypatch.setattr(distillation, "to_float", counting)


@pytest.mark.parametrize(
    ("steps", "number", "code", "workers"),
    [(0, signal.SIGINT, 130, 0), (2, signal.SIGTERM, 143, 1), (4, signal.SIGTERM, 143, 0), (6, signal.SIGINT, 130, 0)],
    ids=["first step", "mid-epoch", "validation", "last epoch"],
)
@pytest.mark.usefixtures("no_figures")
def test_a_resumed_run_ends_as_if_never_stopped(start, experiment, monkeypatch, steps, number, code, workers):
    whole = last_line(start("train_darionet"))  # 2 epochs of 3 steps, 2 batches of validation each
    with monkeypatch.context() as patch:
        stop_after(patch, steps, number)
        stopped = start("train_darionet", "--set", f"data.workers={workers}")
    assert stopped.code == code, stopped.err
    folder = last_line(stopped)
    assert f"python train_darionet.py --resume {folder}" in stopped.out
    resumed = start("train_darionet", "--resume", folder)
    assert resumed.code == 0, resumed.err
    assert last_line(resumed) == folder
    assert same_state(checkpoint(folder), checkpoint(whole) | {"resolved": checkpoint(folder)["resolved"]})


@pytest.mark.usefixtures("no_figures")
def test_resuming_with_other_images_or_another_classifier_is_refused(start, experiment):
    start("train_darionet", "--set", "training.epochs=1")
    draw("discs", 99).save(experiment / "val" / "discs" / "new.png")
    one_line(start("train_darionet", "--resume"), "images.data.val")
    (experiment / "val" / "discs" / "new.png").unlink()
    network = get_model("resnet18", weights=None, num_classes=len(CLASSES))
    save_classifier(network.state_dict(), CLASSES, "classifier.pt")
    one_line(start("train_darionet", "--resume"), "classifier_weights")


@pytest.mark.usefixtures("no_figures")
def test_resuming_with_other_parameters_is_refused_by_name(start, experiment):
    start("train_darionet", "--set", "training.epochs=1")
    folder = sorted(Path("assets/logs").iterdir())[-1]
    result = start("train_darionet", "--resume", "--set", "training.learning_rate=0.01")
    one_line(result, "training.learning_rate 0.001, now it is 0.01")
    one_line(start("train_darionet", "--resume", "nowhere"), "nowhere: no checkpoint.pt")
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (folder / name).write_bytes(b"damaged")
    one_line(start("train_darionet", "--resume"), "checkpoint.pt", "not a whole checkpoint")


def test_pixels_then_logits_then_test(start, experiment):
    """The pre-training on pixels that stands in for ESRGAN's weights, and its name in the table."""
    pixels = ["--set", 'training.loss={"logits":0,"pixels":1}', "--set", "darionet.weights=Pixels.pt"]
    assert start("train_darionet", *pixels, "--set", "training.epochs=1").code == 0
    initial = ["--set", "darionet.initial_weights=Pixels.pt"]
    assert start("train_darionet", *initial, "--set", "training.epochs=1").code == 0
    result = start("test", *initial)
    assert result.code == 0, result.err
    folder = last_line(result)
    results = json.loads((folder / "results.json").read_text())
    order = ["Original", "Small", "Bilinear", "Bicubic", "Pixels", "DarioNet"]
    assert [variant["name"] for variant in results["variants"]] == order
    keys = {
        *("name", "n", "cross_entropy", "psnr_db", "ssim", "accuracy", "accuracy_low", "accuracy_high", "top5"),
        *("agreement", "recovered", "recovered_low", "recovered_high", "seconds", "images_per_second"),
    }
    assert all(set(variant) == keys and variant["n"] == 9 for variant in results["variants"])
    assert results["variants"][0]["psnr_db"] is None and results["variants"][1]["psnr_db"] is None
    assert results["variants"][0]["agreement"] == 1
    once = {"device", "precision", "torch", "scale", "interpolation", "antialias", "classifier", "seed", "unreadable"}
    assert (
        set(results) == once | {"variants", "mcnemar", "training_run", "ours", "stopped_early"}
        and results["precision"] == "float32"
    )
    rows = read_csv(folder / "predictions.csv")
    assert len(rows) == 9 * 6 and {row["class"] for row in rows} == set(CLASSES)
    accuracy = sum(int(row["correct"]) for row in rows if row["variant"] == "DarioNet") / 9
    assert results["variants"][-1]["accuracy"] == pytest.approx(accuracy)
    for row in rows:
        assert (row["class"] == row["predicted"]) == (row["correct"] == "1")
    assert len(read_csv(folder / "classes.csv")) == 3 * 6
    figures = ["table", "triptychs", "pipeline", "f1_difference", "classes", "decisions"]
    for name in (f"{figure}.png" for figure in figures):
        with Image.open(folder / name) as image:
            assert image.width > 300
    assert (folder / "results.md").read_text().splitlines()[0] in result.out
    assert [test["second"] for test in results["mcnemar"]] == ["Bilinear", "Pixels"]
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    assert Path(results["training_run"], "curves.png").is_file()


@pytest.mark.usefixtures("no_figures")
def test_a_subset_of_the_classes_scores_the_same(start, trained):
    whole = read_csv(last_line(start("test")) / "predictions.csv")
    draw_folder(trained / "part", 3, [CLASSES[2]])
    for path in (trained / "part" / CLASSES[2]).iterdir():
        path.write_bytes((trained / "test" / CLASSES[2] / path.name).read_bytes())
    part = read_csv(last_line(start("test", "--set", "data.test=part")) / "predictions.csv")

    def key(row):
        return row["image"], row["variant"]

    expected = {key(r): r for r in whole if r["class"] == CLASSES[2]}
    assert {key(r) for r in part} == set(expected)
    for row in part:
        assert row["predicted"] == expected[key(row)]["predicted"]
        assert float(row["cross_entropy"]) == pytest.approx(float(expected[key(row)]["cross_entropy"]), abs=1e-4)


@pytest.mark.usefixtures("no_figures")
def test_limited_batches_and_epochs_of_the_test(start, trained):
    limited = ["--set", "test.batches_per_epoch=1"]
    rows = read_csv(last_line(start("test", *limited)) / "predictions.csv")
    assert len({row["image"] for row in rows}) == 4
    rows = read_csv(last_line(start("test", *limited, "--set", "test.epochs=2")) / "predictions.csv")
    assert len({row["image"] for row in rows}) == 8
    twice = json.loads((last_line(start("test", "--set", "test.epochs=2")) / "results.json").read_text())
    assert twice["variants"][0]["n"] == 9


def test_unreadable_images(start, trained):
    (trained / "test" / CLASSES[0] / "0.png").write_bytes(b"broken")
    (trained / "train" / CLASSES[0] / "1.png").write_bytes(b"broken")
    result = start("test")
    assert result.code == 1 and "1 images could not be read" in result.out
    folder = last_line(result)
    results = json.loads((folder / "results.json").read_text())
    assert results["variants"][0]["n"] == 8 and len(results["unreadable"]) == 1
    assert read_csv(folder / "unreadable.csv")[0]["image"] == f"{CLASSES[0]}/0.png"
    result = start("train_darionet", "--set", "training.epochs=1")
    assert result.code == 0 and "1 training images could not be read" in result.out
    listed = read_csv(last_line(result) / "unreadable.csv")
    assert [row["image"] for row in listed] == [f"{CLASSES[0]}/1.png"] and "identify" in listed[0]["reason"]
    for path in (trained / "train" / CLASSES[1]).iterdir():
        path.write_bytes(b"broken")
    assert start("train_darionet", "--set", "training.epochs=1").code == 0  # training reads no labels
    for path in (trained / "train").rglob("*.png"):
        path.write_bytes(b"broken")
    one_line(start("train_darionet"), "12 of 12 training images can't be read", "unreadable.csv")


def test_training_needs_images_only(start, experiment):
    for i in range(3):
        draw("discs", i, 50).save(experiment / f"photo{i}.png")
    tree = experiment / "photographs" / "2019" / "summer"
    tree.mkdir(parents=True)
    (experiment / "held out").mkdir()
    for i in range(3):
        (experiment / f"photo{i}.png").rename((tree if i < 2 else experiment / "held out") / f"{i}.png")
    options = ["--set", "data.train=photographs", "--set", "data.val=held out", "--set", "training.epochs=1"]
    result = start("train_darionet", *options)
    assert result.code == 0, result.err
    row = read_csv(last_line(result) / "history.csv")[0]
    assert row["val_accuracy"] == "" and float(row["val_agreement"]) in (0, 1)
    assert "accuracy" not in result.out.split("validation loss")[1]
    one_line(start("test", "--set", "data.test=held out", "--set", "darionet.weights=DarioNet.pt"), "without labels")


@pytest.mark.usefixtures("no_figures")
def test_any_frozen_classifier_and_transfer(start, experiment):
    """The README's recipe: unlabelled photographs and a state dict of the user's own, then another classifier."""
    photographs = experiment / "photographs"
    photographs.mkdir()
    for i in range(6):
        draw(CLASSES[i % 3], i, 50).save(photographs / f"{i}.jpg")
    torch.manual_seed(5)
    mine = get_model("mobilenet_v3_small", weights=None, num_classes=3)
    torch.save(mine.state_dict(), "my_state_dict.pth")

    state_dict = torch.load("my_state_dict.pth", weights_only=True)
    options = {"architecture": "mobilenet_v3_small", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    save_classifier(state_dict, CLASSES, "mine.pt", **options)
    own = ["--set", "classifier.weights=mine.pt", "--set", "classifier.architecture=mobilenet_v3_small"]
    folders = ["--set", "data.train=photographs", "--set", "training.epochs=1"]
    result = start("train_darionet", *own, *folders)
    assert result.code == 0, result.err
    assert trained_for("DarioNet.pt")["classifier"]["weights"] == "mine.pt"
    mine_alone = json.loads((last_line(start("test", *own)) / "results.json").read_text())
    transferred = json.loads((last_line(start("test", "--classifier", "mine.pt")) / "results.json").read_text())
    other = json.loads((last_line(start("test", "--classifier", "classifier.pt")) / "results.json").read_text())
    assert transferred["classifier"] == {"architecture": "mobilenet_v3_small", "weights": "mine.pt"}
    assert [v["accuracy"] for v in transferred["variants"]] == [v["accuracy"] for v in mine_alone["variants"]]
    assert other["classifier"]["architecture"] == "resnet18"
    psnr = [[v["psnr_db"] for v in r["variants"]] for r in (transferred, other)]
    assert psnr[0] == psnr[1]  # the same rebuilt images
    one_line(start("test", "--set", "classifier.weights=mine.pt"), "mine.pt: holds a mobilenet_v3_small", "resnet18")
    one_line(start("test", "--classifier", "absent.pt"), "absent.pt: no such weights file")


def test_a_classifier_by_name(start, trained, monkeypatch):
    """Without internet the line names the file of the weights that the name stands for."""

    def no_network(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(trained))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    for name, file in (("resnet50", "resnet50-0676ba61.pth"), ("vit_h_14", "vit_h_14_swag-80465313.pth")):
        one_line(start("test", "--classifier", name), f"put {file} into")


def test_try_one_image(start, trained):
    torch.save(RRDBNet(8, 1, 4).state_dict(), "ESRGAN_x4.pth")
    draw("checks", 5, 90).save("my image.jpg")
    result = start("try_darionet", "my image.jpg", "--weights", "ESRGAN_x4.pth", "DarioNet.pt")
    assert result.code == 0, result.err
    folder = last_line(result)
    assert folder.name.startswith("try_") and folder.name.endswith("_my_image")
    assert {p.name for p in folder.iterdir()} == {
        *("scales.png", "classification.png", "predictions.json", "parameters.json"),
    }
    predictions = json.loads((folder / "predictions.json").read_text())["predictions"]
    assert [p["of"] for p in predictions] == [
        *("x0.32, Bilinear", "x0.32, DarioNet", "x0.32, ESRGAN"),
        *("original", "original rebuilt at x4, DarioNet", "original rebuilt at x4, ESRGAN"),
    ]
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
    torch.save(load_generator("DarioNet.pt"), "DarioNet.pt")
    Path("DarioNet.pt.json").write_text('{"scale": 0.5}')  # where earlier versions wrote the note
    assert "trained for scale 0.5, not 0.32" in start("test").out


def test_try_small_images(start, trained):
    draw("discs", 1, 12).save("icon.png")
    result = start("try_darionet", "--small", "icon.png")
    assert result.code == 0 and (last_line(result) / "small.png").is_file()
    (trained / "icons" / "more").mkdir(parents=True)
    draw("discs", 1, 12).save("icons/a.png")
    draw("checks", 2, 20).resize((20, 11)).save("icons/more/b.png")
    (trained / "icons" / "c.png").write_bytes(b"broken")
    draw("discs", 1, 90).save("icons/large.png")
    result = start("try_darionet", "--small", "icons")
    assert result.code == 1
    folder = last_line(result)
    rows = read_csv(folder / "predictions.csv")
    assert [(row["image"], row["width"], row["height"]) for row in rows] == [
        *(("a.png", "12", "12"), ("more/b.png", "20", "11")),
    ]
    assert rows[0]["darionet_class"] in CLASSES and 0 < float(rows[0]["bilinear_probability"]) <= 1
    changed = sum(row["darionet_class"] != row["bilinear_class"] for row in rows)
    sure = sum(float(row["darionet_probability"]) for row in rows) / 2
    assert f"DarioNet changes {changed} of 2 decisions on bilinear images; mean probability {sure:.2f}" in result.out
    assert (folder / "small.png").is_file()
    reasons = {row["image"]: row["reason"] for row in read_csv(folder / "unreadable.csv")}
    assert set(reasons) == {"c.png", "large.png"} and "not small" in reasons["large.png"]


def test_small_images_with_labels(start, trained):
    """What needs an original is left out; decisions are those of try_darionet.py."""
    for c, kind in enumerate(CLASSES):
        (trained / "small" / kind).mkdir(parents=True)
        for i, size in enumerate([(12, 12), (20, 11), (11, 20)]):
            draw(kind, 100 * c + i, 20).resize(size).save(f"small/{kind}/{i}.png")
    result = start("test", "--small", "--set", "data.test=small")
    assert result.code == 0, result
    folder = last_line(result)
    results = json.loads((folder / "results.json").read_text())
    assert results["small"] and "scale" not in results
    assert [row["name"] for row in results["variants"]] == ["Bilinear", "Bicubic", "DarioNet"]
    for row in results["variants"]:
        assert row["n"] == 9 and row["accuracy"] is not None and row["top5"] is not None
        assert {row[key] for key in ("psnr_db", "ssim", "agreement", "recovered")} == {None}
    assert "PSNR" not in result.out and "Recovered" not in result.out
    assert {"triptychs.png", "decisions.png", "classes.png", "pipeline.png", "report.pdf"} <= set(os.listdir(folder))
    assert "original" not in read_csv(folder / "decisions.csv")[0]
    tried = {
        row["image"]: row for row in read_csv(last_line(start("try_darionet", "--small", "small")) / "predictions.csv")
    }
    for row in read_csv(folder / "predictions.csv"):
        if row["variant"] != "Bicubic":
            assert row["predicted"] == tried[row["image"]][f"{row['variant'].lower()}_class"]
    one_line(start("test", "--small", "--set", "data.test=small/discs"), "no class folders", "try_darionet.py --small")


def test_try_what_is_no_image(start, trained):
    one_line(start("try_darionet", "absent.png"), "absent.png: no such image")
    one_line(start("try_darionet"), "image")
    Path("text.jpg").write_text("hello")
    one_line(start("try_darionet", "text.jpg"), "text.jpg", "cannot identify", "JPEG, PNG")
    one_line(start("try_darionet", "test"), "test: a folder", "--small")


def test_without_weights_it_says_how_to_get_them(start, experiment):
    draw("discs", 1).save("a.png")
    for call in (["try_darionet", "a.png"], ["test"]):
        one_line(start(*call), "DarioNet.pt", "train_darionet.py", "make demo", "--parameters examples/shapes")
    one_line(start("test", "--weights", "other.pt"), "other.pt: no such weights file")


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


def test_a_full_disk_leaves_the_checkpoint(start, experiment, monkeypatch):
    folder = last_line(start("train_darionet", "--set", "training.epochs=1"))
    before = (folder / "checkpoint.pt").read_bytes()
    Path("DarioNet.pt").unlink()
    script = load_script("train_darionet")
    assert script.main.__doc__ is None

    def no_space(contents, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    result = start("train_darionet")
    assert result.code == 1 and "No space left on device" in result.err and "Traceback" not in result.err
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(experiment.glob("**/.*"))


def test_weights_that_could_not_be_written_are_refused_before_training(start, experiment):
    (experiment / "a folder").mkdir()
    (experiment / "a file").write_text("mine")
    for path in ("a folder", "a file/DarioNet.pt", f"{'x' * 300}.pt"):
        result = start("train_darionet", "--set", f"darionet.weights={path}")
        one_line(result, path[:100], "change darionet.weights")
    other = ("--set", "darionet.weights=DarioNet.safetensors")
    one_line(start("train_darionet", *other), "DarioNet.safetensors: weights are written as torch does")
    shipped = ("--set", f"darionet.weights={ROOT / 'assets/models/DarioNet_photographs.pt'}")
    one_line(start("train_darionet", *shipped), "comes with the project", "change darionet.weights")
    for key in ("darionet.initial_weights", "classifier.weights"):
        same = ("--set", f"{key}=a.pt", "--set", "darionet.weights=./a.pt")
        one_line(start("train_darionet", *same), f"the same file as {key}")


def test_a_classifier_that_cannot_read_small_images(start, trained):
    """Some architectures refuse a size: the row is left out, or one line says which parameter to change."""
    torch.manual_seed(0)
    network = get_model("squeezenet1_1", weights=None, num_classes=len(CLASSES))
    save_classifier(network.state_dict(), CLASSES, "squeeze.pt", architecture="squeezenet1_1")
    result = start("test", "--classifier", "squeeze.pt", "--set", "transformations.scale=0.1")
    assert result.code == 0 and "Left out: Small, since squeezenet1_1 can't read 3x3 pixels" in result.out
    variants = json.loads((last_line(result) / "results.json").read_text())["variants"]
    assert [v["name"] for v in variants] == ["Original", "Bilinear", "Bicubic", "DarioNet"]
    own = ["--set", "classifier.weights=squeeze.pt", "--set", "classifier.architecture=squeezenet1_1"]
    small = ["--set", "transformations.val_crop_size=3"]
    draw("checks", 5).save("a.png")
    for call in (["train_darionet"], ["test"], ["try_darionet", "a.png"]):
        one_line(start(*call, *own, *small), "can't read images of 3x3 pixels", "transformations.val_crop_size")


def test_a_run_whose_validation_was_never_finite_says_so(start, experiment, monkeypatch):
    from experiment import distillation

    loss = distillation.distillation_loss

    def spoilt(*arguments, **options):
        losses = loss(*arguments, **options)
        if not torch.is_grad_enabled():
            losses.total = losses.total * float("nan")
        return losses

    monkeypatch.setattr(distillation, "distillation_loss", spoilt)
    result = start("train_darionet")
    assert result.code == 2 and "never finite" in result.err and not Path("DarioNet.pt").exists()


def test_a_stopped_evaluation_and_a_stopped_folder_of_small_images(start, trained, monkeypatch):
    import experiment.evaluation

    def stopping(function, number):
        calls = []

        def call(*arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(experiment.evaluation, "to_float", stopping(experiment.evaluation.to_float, 1))
        result = start("test")
    assert result.code == 143 and "Stopped: 4 of 9 images were scored" in result.out
    found = json.loads((last_line(result) / "results.json").read_text())
    assert found["stopped_early"] and found["variants"][0]["n"] == 4
    assert "4 test images, stopped early" in (last_line(result) / "results.md").read_text()
    assert (last_line(result) / "report.pdf").is_file() and (last_line(result) / "triptychs.png").is_file()
    draw_folder(trained / "icons", 2)
    with monkeypatch.context() as patch:
        patch.setattr("experiment.data.to_float", stopping(experiment.data.to_float, 3))
        result = start("try_darionet", "--small", "icons")
    assert result.code == 143 and "Stopped: 3 of 6 images" in result.out
    assert len(read_csv(last_line(result) / "predictions.csv")) == 3


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


def test_out_of_memory_is_one_line(start, trained, monkeypatch):
    """Where the batch size is known it is named; elsewhere the line is a general one."""
    import experiment.data
    from experiment import evaluation

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(experiment.data, "to_float", full)
    monkeypatch.setattr(evaluation, "to_float", full)
    one_line(start("train_darionet"), "out of GPU memory at batch size 4: lower training.batch_size")
    one_line(start("test"), "out of GPU memory at batch size 4: lower test.batch_size")
    monkeypatch.setattr(experiment.data, "to_float", full)
    draw("checks", 5).save("a.png")
    one_line(start("try_darionet", "a.png"), "out of GPU memory")


def test_the_default_without_imagenet(tmp_path):
    """A real start from another folder, as on a fresh machine."""
    (tmp_path / "parameters.json").write_text((ROOT / "parameters.json").read_text())
    command = [sys.executable, str(ROOT / "train_darionet.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    line = result.stderr.strip()
    assert "\n" not in line and "assets/ImageNet2012_train: no such folder" in line and "make demo" in line


@pytest.fixture
def train_classifier(experiment, monkeypatch, capfd):
    """Calls examples/train_classifier.py with options -> Result; it writes own.pt."""
    import examples.train_classifier as script
    from experiment.script import run_script

    def call(*options) -> Result:
        write_parameters(experiment / "parameters.json", classifier={"weights": "own.pt"})
        monkeypatch.setattr(sys, "argv", ["train_classifier.py", "--batch-size", "4", *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script.main)
        return Result(stop.value.code, *capfd.readouterr())

    return call


def test_classifier_for_data_that_has_none(train_classifier):
    """examples/train_classifier.py writes what open_classifier reads."""
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
        (["--epochs", 0], "--epochs 0"),
        (["--set", "classifier.weights=parameters.json/own.pt"], "parameters.json/own.pt: can't be written"),
        (["--set", "classifier.weights=train"], "train: can't be written"),
        (["--set", "classifier.architecture=vit_b_32"], "can't read images of 32x32 pixels"),
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


def test_one_file_has_one_training(train_classifier):
    from experiment.run import claimed

    with claimed("own.pt"):
        one_line(train_classifier("--epochs", 1), "own.pt: another run is writing it")
    assert not Path("own.pt").exists()


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
def adapt(experiment, monkeypatch, capfd):
    """Calls examples/adapt_classifier.py with options -> Result."""
    import examples.adapt_classifier as script
    from experiment.script import run_script

    def call(*options) -> Result:
        monkeypatch.setattr(sys, "argv", ["adapt_classifier.py", *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script.main)
        return Result(stop.value.code, *capfd.readouterr())

    return call


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
    result = adapt("--output", "adapted.pth", *own, "--set", "training.ema_decay=0.5")
    assert result.code == 0, result.err
    first, second = (float(row["val_loss"]) for row in read_csv(last_line(result) / "history.csv"))
    assert second < first
    original = open_classifier("own.py:network", None)
    adapted = open_classifier("own.py:network", "adapted.pth")
    moved = {k for k, v in original.network.state_dict().items() if not v.equal(adapted.network.state_dict()[k])}
    assert moved == {name for name, _ in original.network.named_parameters()}, "BatchNorm's statistics stay"

    for name, note in (("same.pth", None), ("rebuilds.pth", {"enlarge": "DarioNet.pt", "scale": 0.5})):
        save_classifier(original.network, CLASSES, name, mean=[0.5] * 3, std=[0.5] * 3, trained_for=note)
    names = {"Adapted": "adapted.pth", "Same": "same.pth", "Rebuilds": "rebuilds.pth"}
    result = start("test", *own, *(part for pair in names.items() for part in ("--rival", *pair)))
    assert result.code == 0, result.err
    assert "adapted.pth was trained for" not in result.out
    assert "rebuilds.pth was trained for scale 0.5, not 0.32" in result.out
    found = json.loads((last_line(result) / "results.json").read_text())
    rows = read_csv(last_line(result) / "predictions.csv")
    by_name = {name: [] for name in [v["name"] for v in found["variants"]]}
    for row in rows:
        by_name[row["variant"]].append({key: value for key, value in row.items() if key != "variant"})
    assert list(by_name) == ["Original", "Small", "Bilinear", "Bicubic", *names, "DarioNet"]
    assert by_name["Same"] == by_name["Bilinear"] and by_name["Rebuilds"] == by_name["DarioNet"]
    assert by_name["Adapted"] != by_name["Bilinear"]
    assert found["ours"] == "DarioNet" and [one["second"] for one in found["mcnemar"]] == ["Bilinear", *names]
    for figure in ("triptychs.png", "pipeline.png", "decisions.png", "table.png"):
        assert (last_line(result) / figure).is_file()


def test_what_is_not_reduced_has_nothing_to_adapt_to(adapt):
    """At scale 1 the copy sees the original image: the loss is 0 and the weights stay. In float32: oneDNN's bf16
    convolutions may round otherwise where gradients are asked for, and Adam makes whole steps of a rounding."""
    options = ("--set", "transformations.scale=1", "--set", "training.epochs=1", "--set", "training.precision=float32")
    result = adapt("--output", "adapted.pth", *options)
    assert result.code == 0, result.err
    row = read_csv(last_line(result) / "history.csv")[0]
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
    one_line(
        adapt("--output", "adapted.pth", "--resume", "--enlarge", "bilinear"), "enlarge bicubic, now it is bilinear"
    )
    resumed = adapt("--output", "adapted.pth", "--resume", "--enlarge", "bicubic")
    assert resumed.code == 0, resumed.err
    assert same_state(checkpoint(last_line(resumed)), whole)


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
    network = get_model("resnet18", weights=None, num_classes=2)
    save_classifier(network.state_dict(), CLASSES[:2], "two.pth")
    one_line(
        start("test", "--rival", "DarioNet", "classifier.pt"), "--rival DarioNet: the table has a row of that name"
    )
    one_line(start("test", "--rival", "Two", "two.pth"), "two.pth: its classes are not those of classifier.weights")
    one_line(start("test", "--rival", "Absent", "absent.pth"), "absent.pth: no such weights file")


def test_a_classifier_that_diverges(train_classifier):
    result = train_classifier("--epochs", 9, "--learning-rate", 100, "--set", "training.precision=float32")
    if result.code == 0:  # it did not: then all is finite
        assert "nan" not in result.out
    else:
        one_line(result, "not finite", "learning")  # which to lower, not that something is damaged
    if Path("own.pt").exists():
        assert all(torch.isfinite(p).all() for p in open_classifier("resnet18", "own.pt").network.parameters())


def test_figures_of_a_test_folder_that_went_away(start, trained, monkeypatch):
    import shutil

    from experiment import evaluation

    joined = evaluation.joined

    def and_gone(*arguments):
        shutil.rmtree("test")
        return joined(*arguments)

    monkeypatch.setattr(evaluation, "joined", and_gone)
    result = start("test")
    assert result.code == 0 and "Figures that show images are left out" in result.out
    folder = last_line(result)
    assert (folder / "table.png").is_file() and (folder / "report.pdf").is_file()
    assert not (folder / "triptychs.png").exists()


def test_scores_that_overflow_make_no_row(start, trained):
    state = load_generator("DarioNet.pt")
    for key in ("HRconv.weight", "conv_last.weight"):
        state[key].fill_(3e38)
    state["conv_last.weight"][:, ::2] *= -1  # infinite minus infinite is no number
    state["HRconv.bias"].fill_(3e38)
    save_weights(state, "DarioNet.pt", {"loss": {"logits": 1.0}})
    draw("discs", 1).save("a.png")
    one_line(start("test"), "the scores on the images of DarioNet are not finite")
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
        result = start("test", *options)
        assert result.code == 0, result.err
        results = json.loads((last_line(result) / "results.json").read_text())
        assert [v["name"] for v in results["variants"]] == ["Original", "Small", "Bilinear", "Bicubic", *names]
        assert results["ours"] == names[-1]
        assert [test["second"] for test in results["mcnemar"]] == ["Bilinear", *names[:-1]]
    for again in (["B.pt", "DarioNet.pt", "B.pt"], ["DarioNet.pt", "B.pt"]):  # the last one named is ours
        networks = load_upscalers(again, "B.pt")
        assert list(networks) == ["DarioNet", "B"]


@pytest.mark.usefixtures("no_figures")
def test_sheets_say_what_the_table_counts(start, trained, monkeypatch):
    """Also where a file system took the accents of a class's name apart."""
    from experiment import plots

    folder, name = unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "café")
    (trained / "test" / CLASSES[0]).rename(trained / "test" / folder)
    network = open_classifier("resnet18", "classifier.pt").network
    save_classifier(network.state_dict(), [name, *CLASSES[1:]], "classifier.pt")
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
    from experiment import plots

    Path("run").mkdir()
    for path in ("curves.png", "run/curves.png"):
        Image.new("RGB", (5, 5)).save(path)
    seen = []
    monkeypatch.setattr(plots, "report", lambda title, text, parameters, figures, path: seen.append(dict(figures)))
    assert start("test").code == 0
    save_weights(load_generator("DarioNet.pt"), "DarioNet.pt", {"run": "run"})
    assert start("test").code == 0
    assert seen == [{}, {"Training": Path("run/curves.png")}]


def test_a_thumbnail_that_is_taken_for_a_photograph(start, trained):
    for side, refused in ((12, True), (15, True), (16, False), (40, False)):
        draw("discs", 1, side).save("thumbnail.png")
        result = start("try_darionet", "thumbnail.png")
        if refused:
            one_line(result, f"thumbnail.png: {side}x{side} pixels: it looks small already; add --small")
        else:
            assert result.code == 0, result.err


def test_without_weights_of_ones_own_the_shipped_network_is_taken(start, trained, monkeypatch):
    """The example as a whole: its parameters, its classifier, its weights."""
    Path("DarioNet.pt").rename("shipped.pt")
    values = json.loads(Path("parameters.json").read_text())
    values["transformations"]["scale"] = 0.5
    values["darionet"]["weights"] = "shipped.pt"
    Path("shipped.json").write_text(json.dumps(values))
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
    assert result.code == 0, result
    run = Path(result.out.strip().splitlines()[-1])
    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    with (run / "history.csv").open() as file:
        row = next(csv.DictReader(file))
    assert seen.Scalars("val_loss")[0].value == pytest.approx(float(row["val_loss"]), rel=1e-5)
    assert seen.Scalars("val_loss")[0].step == 1 and seen.Tags()["images"] == ["samples"]
