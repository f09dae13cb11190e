import copy
import math

import pytest
import torch
from conftest import CLASSES
from tqdm import tqdm

from experiment.data import Batch
from experiment.distillation import (
    Losses,
    Progress,
    distillation_loss,
    learning_rate_at,
    psnr_db,
    train_epoch,
    unreadable_check,
)
from experiment.runtime import Runtime, Stopper
from models.classifier import FrozenClassifier
from models.errors import InputError
from models.pipeline import Pipeline
from models.rrdbnet import RRDBNet

CPU = Runtime(torch.device("cpu"), "float32")


@pytest.fixture
def pipeline(experiment) -> Pipeline:
    torch.manual_seed(0)
    return Pipeline("DarioNet", FrozenClassifier("resnet18", "classifier.pt"), upscaler=RRDBNet(8, 1, 4))


def test_loss_is_its_formula(pipeline):
    images = torch.rand(3, 3, 32, 32)
    rebuilt, logits = pipeline(images)[1:]
    unclamped = pipeline.restore(pipeline.reduce(images), (32, 32), clamp=False)
    expected_logits = (logits - pipeline.classifier(images)).square().mean()
    expected_pixels = (unclamped - images).abs().mean()
    features = [pipeline.classifier.logits_and_features(x)[1] for x in (rebuilt, images)]
    expected_features = (features[0] - features[1]).square().mean()

    def loss(**weights):
        return distillation_loss(pipeline, images, **{"logits": 0, "pixels": 0, "features": 0, **weights}).total

    torch.testing.assert_close(loss(logits=1), expected_logits)
    torch.testing.assert_close(loss(pixels=1), expected_pixels)
    torch.testing.assert_close(loss(features=1), expected_features)
    mixed = 2 * expected_logits + 3 * expected_pixels + 0.5 * expected_features
    torch.testing.assert_close(loss(logits=2, pixels=3, features=0.5), mixed)
    squared = distillation_loss(pipeline, images, logits=1, pixels=0, features=0).squared_error
    torch.testing.assert_close(squared, (rebuilt - images).square().mean())


def test_gradient_reaches_every_weight_of_the_network_and_none_of_the_teacher(pipeline):
    distillation_loss(pipeline, torch.rand(2, 3, 32, 32), logits=1, pixels=0, features=1).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.upscaler.parameters())
    assert all(p.grad is None for p in pipeline.classifier.parameters())


def test_learning_rates():
    assert [learning_rate_at(s, 100, 1.0, "constant", 0) for s in (0, 50, 99)] == [1, 1, 1]
    assert [learning_rate_at(s, 100, 1.0, "constant", 3) for s in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1]
    assert learning_rate_at(0, 100, 2.0, "cosine", 0) == 2
    assert learning_rate_at(50, 100, 2.0, "cosine", 0) == pytest.approx(1)
    assert learning_rate_at(100, 100, 2.0, "cosine", 0) == pytest.approx(0)


def test_psnr():
    assert psnr_db(0.01) == pytest.approx(20) and psnr_db(1) == 0 and psnr_db(0) == 100


def run_epoch(pipeline, loss, batches: list[Batch], progress: Progress, check=lambda found: None, scaler=None) -> None:
    optimizer = torch.optim.Adam(pipeline.upscaler.parameters(), lr=1e-3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    train_epoch(
        pipeline,
        loss,
        optimizer,
        scaler,
        batches,
        CPU,
        progress,
        learning_rate=lambda batch: 1e-3,
        gradient_clip_norm=1.0,
        check_unreadable=check,
        after_step=lambda: None,
        stopper=Stopper(),
        bar=tqdm(disable=True),
    )


def drawn_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [Batch(images, torch.arange(2), []) for images in pixels]


def weights_of(module) -> dict:
    return copy.deepcopy(module.state_dict())


def same(a: dict, b: dict) -> bool:
    return all(a[key].equal(b[key]) for key in a)


def test_training_changes_the_network_and_not_one_bit_of_the_classifier(pipeline):
    network, teacher = weights_of(pipeline.upscaler), weights_of(pipeline.classifier)

    def loss(pipeline, images):
        return distillation_loss(pipeline, images, logits=1, pixels=0, features=1)

    progress = Progress()
    pipeline.train()
    run_epoch(pipeline, loss, drawn_batches(3), progress)
    assert same(teacher, weights_of(pipeline.classifier))
    assert not same(network, weights_of(pipeline.upscaler))
    assert (progress.batch, progress.images, progress.skipped) == (3, 6, 0)


def bad_loss(good_after: int):
    """A loss that is not finite for the first calls."""
    calls = []

    def loss(pipeline, images):
        losses = distillation_loss(pipeline, images, logits=0, pixels=1, features=0)
        calls.append(1)
        factor = math.nan if len(calls) <= good_after else 1.0
        return Losses(losses.total * factor, losses.squared_error, None, None)

    return loss


def test_a_step_with_a_loss_that_is_not_finite_is_not_taken(pipeline):
    before, progress = weights_of(pipeline.upscaler), Progress()
    run_epoch(pipeline, bad_loss(9), drawn_batches(9), progress)
    assert same(before, weights_of(pipeline.upscaler))
    assert (progress.skipped, progress.images) == (9, 0)
    run_epoch(pipeline, bad_loss(0), drawn_batches(1), progress)
    assert not same(before, weights_of(pipeline.upscaler)) and progress.bad_in_a_row == 0


def test_ten_in_a_row_stop_the_run(pipeline):
    with pytest.raises(InputError, match="not finite 10 times in a row"):
        run_epoch(pipeline, bad_loss(99), drawn_batches(12), Progress())


def test_overflow_of_scaled_gradients(pipeline):
    """The scale settles over as many steps as it takes; gradients that overflow at a scale under 1 are a fault."""

    def loss(pipeline, images):
        losses = distillation_loss(pipeline, images, logits=0, pixels=1, features=0)
        losses.total = losses.total * 1e10  # times 2 ** 106 it is far over float32's range
        return losses

    before, progress = weights_of(pipeline.upscaler), Progress()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**106)
    run_epoch(pipeline, loss, drawn_batches(30), progress, scaler=scaler)
    assert 10 < progress.skipped < 30 and progress.bad_in_a_row == 0 and progress.images == 2 * (30 - progress.skipped)
    assert not same(before, weights_of(pipeline.upscaler)) and 1 < scaler.get_scale() < 2.0**96

    def always(pipeline, images):
        losses = loss(pipeline, images)
        losses.total = (
            losses.total + (pipeline.upscaler.conv_last.bias.sum() - pipeline.upscaler.conv_last.bias.sum()).sqrt()
        )
        return losses

    with pytest.raises(InputError, match="not finite 10 times in a row"):
        run_epoch(pipeline, always, drawn_batches(20), Progress(), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def test_an_unreadable_image_leaves_the_gradient_of_the_others(pipeline):
    """A batch of three with one that can't be read is the batch of two."""
    twin = copy.deepcopy(pipeline)
    batch = drawn_batches(1)[0]

    def loss(pipeline, images):
        return distillation_loss(pipeline, images, logits=0, pixels=1, features=0)

    progress = Progress()
    run_epoch(pipeline, loss, [Batch(batch.images, batch.indices, [(7, "broken")])], progress)
    run_epoch(twin, loss, [batch], Progress())
    assert same(weights_of(pipeline.upscaler), weights_of(twin.upscaler))
    assert progress.unreadable == {7: "broken"}
    nothing = Batch(torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.long), [(1, "x")])
    run_epoch(pipeline, loss, [nothing], progress)
    assert same(weights_of(pipeline.upscaler), weights_of(twin.upscaler)) and progress.batch == 2


@pytest.mark.parametrize(("count", "bad", "stops"), [(1000, 300, False), (1001, 1, False), (1001, 2, True)])
def test_how_many_may_be_unreadable(count, bad, stops):
    check = unreadable_check(["all"] * count)
    found = dict.fromkeys(range(bad), "broken")
    if stops:
        with pytest.raises(InputError, match=f"{bad} of {count} training images can't be read"):
            check(found)
    else:
        check(found)


def test_a_class_left_empty_stops_the_run():
    check = unreadable_check(["a", "a", "b", "b"])
    check({0: "x", 2: "y"})
    with pytest.raises(InputError, match="no image of b can be read"):
        check({0: "x", 2: "y", 3: "z"})


def test_classes_of_the_experiment(experiment):
    assert FrozenClassifier("resnet18", "classifier.pt").class_names == CLASSES
