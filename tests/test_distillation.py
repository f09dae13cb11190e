import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import CLASSES, Listing
from tqdm import tqdm

from benchmarks.correctness import loss_of, pipeline_of
from experiment.checkpoint import State
from experiment.data import Batch
from experiment.distillation import (
    TERMS,
    Losses,
    Views,
    distillation_loss,
    ema_update,
    learning_rate_at,
    psnr_db,
    refuse_unreadable,
    step,
    validate,
)
from experiment.parameters import LossSection
from experiment.runtime import Runtime, Stopper
from models.classifier import open_classifier
from models.errors import InputError
from models.pipeline import Pipeline
from models.rrdbnet import RRDBNet

CPU = Runtime(torch.device("cpu"), "float32")


@pytest.fixture
def pipeline(experiment) -> Pipeline:
    torch.manual_seed(0)
    classifier = open_classifier("resnet18", "classifier.pt")
    classifier.check(32, "side")
    return pipeline_of(classifier, RRDBNet(8, 1, 4))


def test_every_term_is_its_formula(pipeline):
    images = torch.rand(3, 3, 32, 32)
    rebuilt, logits = pipeline(images)[1:]
    unclamped = pipeline.restore(pipeline.reduce(images), (32, 32))
    looks = [pipeline.classifier.look(x) for x in (rebuilt, images)]
    shares = [(a - b).square().mean() / b.var() for a, b in zip(looks[0].maps, looks[1].maps, strict=True)]
    expected = {
        "logits": (logits - pipeline.classifier(images)).square().mean(),
        "pixels": (unclamped - images).abs().mean(),
        "features": (looks[0].features - looks[1].features).square().mean(),
        "maps": sum(shares) / len(shares),
    }
    assert len(shares) == 4 and set(expected) == set(TERMS) == set(LossSection.model_fields)
    for name, value in expected.items():
        losses = loss_of(pipeline, images, **{name: 1.0})
        torch.testing.assert_close(losses.total, value)
        torch.testing.assert_close(losses.terms, {name: value})
    weights = {"logits": 2.0, "pixels": 3.0, "features": 0.5, "maps": 4.0}
    mixed = sum(weights[name] * value for name, value in expected.items())
    losses = loss_of(pipeline, images, **weights)
    torch.testing.assert_close(losses.total, mixed)
    torch.testing.assert_close(losses.psnr_db, psnr_db(rebuilt, images))
    assert losses.rebuilt is None


def test_several_teachers_are_averaged_and_the_first_is_reported(pipeline):
    other = copy.deepcopy(pipeline.classifier)
    other.network.fc.weight.mul_(2)
    images, small = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 10, 10)
    options = {"weights": {"logits": 1.0}, "with_logits": True}
    one, two, both = (
        distillation_loss(images, small, pipeline.restore, teachers, **options)
        for teachers in ([pipeline.classifier], [other], [pipeline.classifier, other])
    )
    torch.testing.assert_close(both.total, (one.total + two.total) / 2)
    assert both.rebuilt.equal(one.rebuilt) and both.original.equal(one.original)


def test_views_compute_what_is_asked_for_once(pipeline):
    calls = []

    def restore(small, size):
        calls.append(size)
        return pipeline.restore(small, size)

    images = torch.rand(2, 3, 32, 32)
    views = Views(images, pipeline.reduce(images), restore, [pipeline.classifier])
    assert not calls
    for term in TERMS.values():
        term(views)
    assert calls == [(32, 32)]
    distillation_loss(images, pipeline.reduce(images), restore, [], {"pixels": 1.0})  # asks no teacher


def test_a_clamp_that_passes_gradients(pipeline):
    unclamped = torch.tensor([-0.5, 0.5, 1.5]).repeat(1, 3, 1, 1).requires_grad_()
    for clamp_gradient, expected in ((True, [0.0, 1.0, 0.0]), (False, [1.0, 1.0, 1.0])):
        views = Views(unclamped.detach(), unclamped.detach(), lambda small, size: unclamped, [], clamp_gradient)
        assert views.rebuilt.detach().equal(unclamped.detach().clamp(0, 1))
        (gradient,) = torch.autograd.grad(views.rebuilt.sum(), unclamped)
        assert gradient[0, 0, 0].tolist() == expected


def test_averaged_weights_start_at_the_first_and_then_move_slowly():
    average, value = [torch.zeros(2)], [torch.ones(2)]
    ema_update(average, value, torch.tensor(0), 0.99)
    assert average[0].tolist() == pytest.approx([0.9, 0.9])  # 1 - 1 / 10
    ema_update(average, [torch.zeros(2)], torch.tensor(10**6), 0.99)
    assert average[0].tolist() == pytest.approx([0.9 * 0.99] * 2)


def test_gradient_reaches_every_weight_of_the_network_and_none_of_the_teacher(pipeline):
    loss_of(pipeline, torch.rand(2, 3, 32, 32), logits=1.0, features=1.0, maps=1.0).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.restore.network.parameters())
    assert all(p.grad is None for p in pipeline.classifier.parameters())


def test_learning_rates():
    assert [learning_rate_at(s, 100, 1.0, "constant", 0) for s in (0, 50, 99)] == [1, 1, 1]
    assert [learning_rate_at(s, 100, 1.0, "constant", 3) for s in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1]
    assert learning_rate_at(0, 100, 2.0, "cosine", 0) == 2
    assert learning_rate_at(50, 100, 2.0, "cosine", 0) == pytest.approx(1)
    assert learning_rate_at(100, 100, 2.0, "cosine", 0) == pytest.approx(0)


def test_psnr_of_each_image():
    images = torch.zeros(3, 3, 4, 4)
    found = psnr_db(torch.stack([images[0] + 0.1, images[0] + 1, images[0]]), images)
    assert found.tolist() == pytest.approx([20, 0, 100])


def run_epoch(pipeline, loss, batches: list[Batch], state: State, scaler=None, rate: float = 1e-3) -> None:
    """Steps on all batches; `loss` maps (pipeline, images) to Losses."""
    network = pipeline.restore.network
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for batch in batches:
        done = step(
            batch,
            lambda images, indices: loss(pipeline, images),
            network,
            optimizer,
            scaler,
            CPU,
            learning_rate=rate,
            clip_norm=1.0,
        )
        state.count(done, 1.0)


def drawn_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [Batch(images, torch.arange(2), []) for images in pixels]


def weights_of(module) -> dict:
    return copy.deepcopy(module.state_dict())


def same(a: dict, b: dict) -> bool:
    return all(a[key].equal(b[key]) for key in a)


def test_training_changes_the_network_and_not_one_bit_of_the_classifier(pipeline):
    network, teacher = weights_of(pipeline.restore.network), weights_of(pipeline.classifier)
    state = State()
    pipeline.train()
    run_epoch(pipeline, partial(loss_of, logits=1.0, features=1.0, maps=1.0), drawn_batches(3), state)
    assert same(teacher, weights_of(pipeline.classifier))
    assert not same(network, weights_of(pipeline.restore.network))
    assert (state.batch, state.images, state.skipped, state.seconds) == (3, 6, 0, 3.0)


def bad_loss(good_after: int):
    """A loss that is not finite for the first calls."""
    calls = []

    def loss(pipeline, images):
        losses = loss_of(pipeline, images, pixels=1.0)
        calls.append(1)
        factor = math.nan if len(calls) <= good_after else 1.0
        return Losses(losses.total * factor, {}, losses.psnr_db)

    return loss


def test_a_step_with_a_loss_that_is_not_finite_is_not_taken(pipeline):
    before, state = weights_of(pipeline.restore.network), State()
    run_epoch(pipeline, bad_loss(9), drawn_batches(9), state)
    assert same(before, weights_of(pipeline.restore.network))
    assert (state.skipped, state.images) == (9, 0)
    run_epoch(pipeline, bad_loss(0), drawn_batches(1), state)
    assert not same(before, weights_of(pipeline.restore.network)) and state.bad_in_a_row == 0


def test_ten_in_a_row_stop_the_run(pipeline):
    with pytest.raises(InputError, match="not finite 10 times in a row"):
        run_epoch(pipeline, bad_loss(99), drawn_batches(12), State())


def test_overflow_of_scaled_gradients(pipeline):
    """The scale settles over as many steps as it takes; gradients that overflow at a scale under 1 are a fault."""

    def loss(pipeline, images):
        losses = loss_of(pipeline, images, pixels=1.0)
        losses.total = losses.total * 1e10  # times 2 ** 106 it is far over float32's range
        return losses

    before, state = weights_of(pipeline.restore.network), State()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**106)
    run_epoch(pipeline, loss, drawn_batches(30), state, scaler=scaler)
    assert 10 < state.skipped < 30 and state.bad_in_a_row == 0 and state.images == 2 * (30 - state.skipped)
    assert not same(before, weights_of(pipeline.restore.network)) and 1 < scaler.get_scale() < 2.0**96

    def always(pipeline, images):
        losses, bias = loss(pipeline, images), pipeline.restore.network.conv_last.bias
        losses.total = losses.total + (bias.sum() - bias.sum()).sqrt()
        return losses

    with pytest.raises(InputError, match="not finite 10 times in a row"):
        run_epoch(pipeline, always, drawn_batches(20), State(), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def test_an_unreadable_image_leaves_the_gradient_of_the_others(pipeline):
    """A batch of three with one that can't be read is the batch of two."""
    twin = copy.deepcopy(pipeline)
    batch, loss, state = drawn_batches(1)[0], partial(loss_of, pixels=1.0), State()
    run_epoch(pipeline, loss, [Batch(batch.images, batch.indices, [(7, "broken")])], state)
    run_epoch(twin, loss, [batch], State())
    assert same(weights_of(pipeline.restore.network), weights_of(twin.restore.network))
    assert state.unreadable == {7: "broken"}
    nothing = Batch(torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.long), [(1, "x")])
    run_epoch(pipeline, loss, [nothing], state)
    assert same(weights_of(pipeline.restore.network), weights_of(twin.restore.network)) and state.batch == 2


def test_a_state_comes_back_whole():
    state = State(epoch=2, batch=7, best=0.5, history=[{"epoch": 1}], unreadable={3: "broken"}, bad_in_a_row=4)
    other = State()
    other.load_state_dict(state.state_dict())
    assert other == state
    scores = {"val_loss": 0.25, "val_psnr_db": 20.0, "val_accuracy": None, "val_agreement": 1.0, "val_unreadable": 0}
    row, improved = other.end_epoch(1e-4, scores)
    assert improved and row["epoch"] == 3 and row["val_loss"] == 0.25
    history, unreadable = [{"epoch": 1}, row], {3: "broken"}
    assert other == State(epoch=3, best=0.25, history=history, unreadable=unreadable, bad_in_a_row=4)


def test_validation_is_its_formula_and_runs_the_generator_once(pipeline):
    batches, calls = drawn_batches(2), []

    def restore(small, size):
        calls.append(1)
        return pipeline.restore(small, size)

    def loss(images, indices):
        small = pipeline.reduce(images)
        return distillation_loss(images, small, restore, [pipeline.classifier], {"pixels": 1.0}, with_logits=True)

    images = torch.cat([batch.images for batch in batches]).float() / 255
    targets = pipeline.classifier(images).argmax(1).tolist()
    batches = [Batch(b.images, torch.arange(2) + 2 * i, []) for i, b in enumerate(batches)]
    scores = validate(loss, batches, targets, CPU, Stopper(), tqdm(disable=True))
    assert len(calls) == 2
    with torch.no_grad():
        rebuilt, logits = pipeline(images)[1:]
    assert scores["val_psnr_db"] == pytest.approx(psnr_db(rebuilt, images).mean().item(), abs=1e-3)
    agreeing = sum(a == b for a, b in zip(logits.argmax(1).tolist(), targets, strict=True))
    assert scores["val_accuracy"] == scores["val_agreement"] == agreeing / 4
    with torch.no_grad():
        pipeline.classifier.network.fc.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        validate(loss, batches, targets, CPU, Stopper(), tqdm(disable=True))


@pytest.mark.parametrize(("count", "bad", "stops"), [(1000, 300, False), (1001, 1, False), (1001, 2, True)])
def test_how_many_may_be_unreadable(count, bad, stops):
    found = dict.fromkeys(range(bad), "broken")
    if stops:
        with pytest.raises(InputError, match=f"{bad} of {count} training images can't be read"):
            refuse_unreadable(found, Listing(["all"] * count), Counter({"all": count}))
    else:
        refuse_unreadable(found, Listing(["all"] * count), Counter({"all": count}))


def test_a_class_left_empty_stops_the_run():
    folders = ["a", "a", "b", "b"]
    refuse_unreadable({0: "x", 2: "y"}, Listing(folders), Counter(folders))
    with pytest.raises(InputError, match="no image of b can be read"):
        refuse_unreadable({0: "x", 2: "y", 3: "z"}, Listing(folders), Counter(folders))


def test_classes_of_the_experiment(experiment):
    assert open_classifier("resnet18", "classifier.pt").class_names == CLASSES
