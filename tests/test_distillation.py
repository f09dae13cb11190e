import copy
import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import same_state
from torch import nn
from tqdm import tqdm

from benchmarks.correctness import error, loss_of, pipeline_of
from experiment import distillation
from experiment.data import Batch
from experiment.parameters import LossSection
from experiment.run import Run, average_gradients
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
    assert len(shares) == 4 and set(expected) == set(distillation.TERMS) == set(LossSection.model_fields)
    for name, value in expected.items():
        losses = loss_of(pipeline, images, **{name: 1.0})
        torch.testing.assert_close(losses.total, value)
    weights = {"logits": 2.0, "pixels": 3.0, "features": 0.5, "maps": 4.0}
    mixed = sum(weights[name] * value for name, value in expected.items())
    losses = loss_of(pipeline, images, **weights)
    torch.testing.assert_close(losses.total, mixed)
    torch.testing.assert_close(losses.psnr_db, distillation.psnr_db(rebuilt, images))
    assert losses.on_rebuilt is not None and loss_of(pipeline, images, pixels=1.0).on_rebuilt is None


def test_several_teachers_are_averaged_and_the_first_is_reported(pipeline):
    other = copy.deepcopy(pipeline.classifier)
    other.network.fc.weight.mul_(2)
    images, small = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 10, 10)
    options = {"weights": {"logits": 1.0}, "with_logits": True}
    one, two, both = (
        distillation.distillation_loss(images, small, pipeline.restore, teachers, **options)
        for teachers in ([pipeline.classifier], [other], [pipeline.classifier, other])
    )
    torch.testing.assert_close(both.total, (one.total + two.total) / 2)
    assert both.on_rebuilt.equal(one.on_rebuilt) and both.on_original.equal(one.on_original)
    distillation.distillation_loss(images, small, pipeline.restore, [None], {"pixels": 1.0})  # asks no teacher


def test_a_clamp_that_passes_gradients(pipeline):
    unclamped = torch.tensor([-0.5, 0.5, 1.5]).repeat(1, 3, 1, 1).requires_grad_()
    for clamp_gradient, expected in ((True, [0.0, 1.0, 0.0]), (False, [1.0, 1.0, 1.0])):
        small = unclamped.detach()
        compared = distillation.compare(small, small, lambda small, size: unclamped, [], clamp_gradient=clamp_gradient)
        assert compared.rebuilt.detach().equal(unclamped.detach().clamp(0, 1))
        (gradient,) = torch.autograd.grad(compared.rebuilt.sum(), unclamped)
        assert gradient[0, 0, 0].tolist() == expected


def test_averaged_weights_start_at_the_first_and_then_move_slowly():
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((average, 0.0), (network, 1.0)):
        module.requires_grad_(False)
        module.weight.fill_(value)
    distillation.ema_update(average, network, 0.99, 0)
    assert average.weight.item() == pytest.approx(0.9)  # 1 - 1 / 10
    network.weight.fill_(0)
    distillation.ema_update(average, network, 0.99, 10**6)
    assert average.weight.item() == pytest.approx(0.9 * 0.99)


def test_learning_rates():
    def rates(steps, *schedule):
        return [distillation.learning_rate_at(step, 100, 2.0, *schedule) for step in steps]

    assert rates((0, 50, 99), "constant", 0) == [2, 2, 2]
    assert rates((0, 1, 2, 3), "constant", 3) == [0.5, 1, 1.5, 2]
    assert rates((0, 50, 100), "cosine", 0) == pytest.approx([2, 1, 0])


def test_psnr_of_each_image():
    images = torch.zeros(3, 3, 4, 4)
    found = distillation.psnr_db(torch.stack([images[0] + 0.1, images[0] + 1, images[0]]), images)
    assert found.tolist() == pytest.approx([20, 0, 100])


def run_of(pipeline, scaler=None) -> Run:
    """A run that has not begun: its steps can be taken without a folder."""
    network = pipeline.restore.network
    training = {"gradient_clip_norm": 1.0, "epochs": 1, "ema_decay": None}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    run = Run("train", None, CPU, {"training": training}, {}, network, optimizer, None, None)
    run.scaler = scaler or run.scaler
    return run


def run_epoch(run: Run, pipeline, loss, batches: list[Batch]) -> None:
    """Steps on all batches; `loss` maps (pipeline, images) to Losses."""
    for batch in batches:
        run.step(loss(pipeline, batch.images.float() / 255) if len(batch.images) else None, batch, 1e-3)


def drawn_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [Batch(images, torch.arange(2) + 2 * i, []) for i, images in enumerate(pixels)]


def weights_of(module) -> dict:
    return copy.deepcopy(module.state_dict())


def test_training_changes_the_network_and_not_one_bit_of_the_classifier(pipeline):
    network, teacher = weights_of(pipeline.restore.network), weights_of(pipeline.classifier)
    run = run_of(pipeline)
    pipeline.train()
    run_epoch(run, pipeline, partial(loss_of, logits=1.0, features=1.0, maps=1.0), drawn_batches(3))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.restore.network.parameters())
    assert all(p.grad is None for p in pipeline.classifier.parameters())
    assert same_state(teacher, weights_of(pipeline.classifier))
    assert not same_state(network, weights_of(pipeline.restore.network))
    assert (run.state.batch, run.state.images, run.state.skipped) == (3, 6, 0)


class TwoProcesses:
    """Two, one after the other: what the second one is given is the sum of what both have sent."""

    processes = 2

    def __init__(self):
        self.sent = []

    def sum(self, values):
        self.sent.append(values)
        return sum(self.sent)


@pytest.mark.parametrize("parts", [(3, 2), (5, 0)])
def test_the_gradient_of_all_parts_is_that_of_one_process(pipeline, parts):
    """In float64; a part may be smaller, or empty, where images can't be read."""
    images, network = torch.rand(5, 3, 32, 32, dtype=torch.float64), pipeline.double().restore.network

    def gradient(part, runtime):
        network.zero_grad()
        if len(part):
            loss_of(pipeline, part, logits=1, pixels=0.5, features=1).total.backward()
        average_gradients(network, len(part), len(images), runtime)
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    expected, two = gradient(images, CPU), TwoProcesses()
    _, found = (gradient(part, two) for part in images.split(parts))
    assert error(found, expected) < 1e-12


def test_overflow_of_scaled_gradients(pipeline):
    """The scale settles over as many steps as it takes; gradients that overflow at any scale stop the run."""

    def loss(pipeline, images):
        losses = loss_of(pipeline, images, pixels=1.0)
        losses.total = losses.total * 1e10  # times 2 ** 106 it is far over float32's range
        return losses

    before = weights_of(pipeline.restore.network)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**106)
    run = run_of(pipeline, scaler)
    run_epoch(run, pipeline, loss, drawn_batches(30))
    state = run.state
    assert 10 < state.skipped < 30 and state.bad_in_a_row == 0 and state.images == 2 * (30 - state.skipped)
    assert not same_state(before, weights_of(pipeline.restore.network)) and 1 < scaler.get_scale() < 2.0**96

    def always(pipeline, images):
        losses, bias = loss(pipeline, images), pipeline.restore.network.conv_last.bias
        losses.total = losses.total + (bias.sum() - bias.sum()).sqrt()
        return losses

    with pytest.raises(InputError, match="not finite 10 times in a row"):
        run_epoch(run_of(pipeline, torch.amp.GradScaler("cpu", init_scale=8.0)), pipeline, always, drawn_batches(20))


def test_an_unreadable_image_leaves_the_gradient_of_the_others(pipeline):
    """A batch of three with one that can't be read is the batch of two."""
    twin = copy.deepcopy(pipeline)
    batch, loss, run = drawn_batches(1)[0], partial(loss_of, pixels=1.0), run_of(pipeline)
    run_epoch(run, pipeline, loss, [Batch(batch.images, batch.indices, [(7, "broken")])])
    run_epoch(run_of(twin), twin, loss, [batch])
    assert same_state(weights_of(pipeline.restore.network), weights_of(twin.restore.network))
    assert run.state.unreadable == {7: "broken"}
    nothing = Batch(torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.long), [(1, "x")])
    run_epoch(run, pipeline, loss, [nothing])
    assert same_state(weights_of(pipeline.restore.network), weights_of(twin.restore.network)) and run.state.batch == 2


def test_validation_is_its_formula_and_runs_the_generator_once(pipeline):
    batches, restore = drawn_batches(2), Mock(side_effect=pipeline.restore)

    def loss(images):
        weights = dict.fromkeys(distillation.TERMS, 1.0)
        small = pipeline.reduce(images)
        return distillation.distillation_loss(images, small, restore, [pipeline.classifier], weights, with_logits=True)

    images = torch.cat([batch.images for batch in batches]).float() / 255
    targets = pipeline.classifier(images).argmax(1).tolist()
    scores = distillation.validate(loss, batches, targets, CPU, Stopper(), tqdm(disable=True))
    assert restore.call_count == 2
    with torch.no_grad():
        rebuilt, logits = pipeline(images)[1:]
        assert scores["val_psnr_db"] == pytest.approx(distillation.psnr_db(rebuilt, images).mean().item(), abs=1e-3)
        agreeing = (logits.argmax(1) == torch.tensor(targets)).float().mean().item()
        assert scores["val_accuracy"] == scores["val_agreement"] == agreeing
        pipeline.classifier.network.fc.bias.fill_(math.inf)
    with pytest.raises(InputError, match="not finite"):
        distillation.validate(loss, batches, targets, CPU, Stopper(), tqdm(disable=True))
