import json

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, get_model

from models.classifier import LABELS_FILE, FrozenClassifier, save_classifier
from models.errors import InputError
from models.pipeline import Pipeline
from models.rrdbnet import RRDBNet
from models.scaler import Scaler, reduced_length


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> FrozenClassifier:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "c.pt"
    network = get_model("resnet18", weights=None, num_classes=5)
    save_classifier(network.state_dict(), list("abcde"), path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    return FrozenClassifier("resnet18", str(path))


# Scaler


def bilinear_reference(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Samples (C,H,W) at the centres of the new pixels, written out without torch's resize."""
    out = torch.empty(image.shape[0], height, width, dtype=torch.float64)
    h, w = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            a, b = y - y0, x - x0
            top = (1 - b) * image[:, y0, x0] + b * image[:, y0, x1]
            out[:, i, j] = (1 - a) * top + a * ((1 - b) * image[:, y1, x0] + b * image[:, y1, x1])
    return out


@pytest.mark.parametrize("size", [(8, 5), (31, 47), (20, 20)])
def test_scaler_is_plain_bilinear_sampling(size):
    image = torch.rand(3, 21, 26, dtype=torch.float64)
    torch.testing.assert_close(
        Scaler(size)(image[None])[0].double(), bilinear_reference(image, *size), atol=1e-5, rtol=0
    )


def test_antialias_averages_and_plain_sampling_does_not():
    stripes = torch.zeros(1, 3, 30, 30)
    stripes[..., ::3] = 1
    plain, smooth = Scaler((10, 10))(stripes), Scaler((10, 10), antialias=True)(stripes)
    assert plain.unique().tolist() == [0]  # every third column, sampled between
    assert smooth.std() < 0.1 and abs(smooth.mean() - 1 / 3) < 0.05


def test_an_int_is_the_shorter_side_and_a_pair_is_exact():
    images = torch.rand(1, 3, 100, 200)
    assert Scaler(50)(images).shape[-2:] == (50, 100)
    assert Scaler((33, 44))(images).shape[-2:] == (33, 44)
    assert Scaler(100)(images).equal(images)


def test_published_small_size():
    assert reduced_length(256, 0.32) == 81
    assert reduced_length(100, 0.29) == 29  # 28.999999999999996 in floating point
    assert reduced_length(1, 0.32) == 1
    assert all(reduced_length(n, 1 / 3) == n // 3 for n in range(3, 300))


def test_scaler_stays_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Scaler(4)(torch.rand(1, 3, 8, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("size", "interpolation"), [(0, "bilinear"), ((3, 4, 5), "bilinear"), (4, "area")])
def test_scaler_refuses_what_it_cannot_do(size, interpolation):
    with pytest.raises(ValueError, match="must be"):
        Scaler(size, interpolation)


# RRDBNet


def test_published_size():
    with torch.device("meta"):
        network = RRDBNet()
    assert sum(p.numel() for p in network.parameters()) == 16_697_987
    keys = network.state_dict()
    assert len(keys) == 702
    for key in ("conv_first.weight", "RRDB_trunk.22.RDB3.conv5.bias", "trunk_conv.weight", "upconv1.bias"):
        assert key in keys
    assert {key.split(".")[0] for key in keys} == {
        *("conv_first", "RRDB_trunk", "trunk_conv", "upconv1", "upconv2", "HRconv", "conv_last"),
    }
    assert keys["RRDB_trunk.0.RDB1.conv5.weight"].shape == (64, 192, 3, 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (20, 20)])
def test_four_times_larger_at_any_size(size):
    out = RRDBNet(8, 1, 4)(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, 4 * size[0], 4 * size[1])


def test_dense_block_against_its_formula():
    torch.manual_seed(0)
    block = RRDBNet(4, 1, 2).double().RRDB_trunk[0].RDB1
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    seen = x
    for i in range(1, 5):
        conv = getattr(block, f"conv{i}")
        new = F.conv2d(seen, conv.weight, conv.bias, padding=1)
        seen = torch.cat([seen, torch.where(new > 0, new, 0.2 * new)], 1)
    expected = x + 0.2 * F.conv2d(seen, block.conv5.weight, block.conv5.bias, padding=1)
    torch.testing.assert_close(block(x), expected)


# FrozenClassifier


def test_normalises_inside(classifier):
    images = torch.rand(2, 3, 40, 40)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    expected = classifier.network((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(classifier(images), expected)


def test_cannot_be_woken(classifier):
    classifier.train()
    assert not any(module.training for module in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    Pipeline("x", classifier).train()
    assert not any(module.training for module in classifier.modules())


def test_features_are_what_the_last_layer_reads(classifier):
    logits, features = classifier.logits_and_features(torch.rand(2, 3, 40, 40))
    assert features.shape == (2, 512)
    torch.testing.assert_close(classifier.network.fc(features), logits)


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "vit_b_16"])
def test_head_size_is_read_from_any_architecture(architecture, tmp_path):
    network = get_model(architecture, weights=None, num_classes=7)
    save_classifier(network.state_dict(), list("abcdefg"), tmp_path / "c.pt")
    frozen = FrozenClassifier(architecture, str(tmp_path / "c.pt"))
    side = 224 if architecture == "vit_b_16" else 64
    assert frozen(torch.rand(1, 3, side, side)).shape == (1, 7)


def test_imagenet_labels():
    labels = json.loads(LABELS_FILE.read_text())
    assert list(labels) == [str(i) for i in range(1000)]
    wnids = [wnid for wnid, _ in labels.values()]
    assert wnids == sorted(set(wnids)) and wnids[0] == "n01440764" and wnids[-1] == "n15075141"
    assert [name for _, name in labels.values()] == ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert labels["207"] == ["n02099601", "golden retriever"]


def test_torchvision_weights_are_loaded_from_the_download_folder(tmp_path, monkeypatch):
    """The real loading code, on a file made here in the place of the download; its hash is not the published one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    network = get_model("squeezenet1_1", weights=None)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(InputError, match=r"squeezenet1_1-b8a52dc0\.pth: not the file published under this name"):
        FrozenClassifier("squeezenet1_1", "IMAGENET1K_V1")
    monkeypatch.setattr("models.weights.sha256_of", lambda path: "b8a52dc0" + 56 * "0")
    frozen = FrozenClassifier("squeezenet1_1", "IMAGENET1K_V1")
    assert frozen.class_names[207] == "n02099601" and frozen.labels[207] == "golden retriever"
    assert frozen.network.features[0].weight.equal(network.features[0].weight)


def test_without_network_it_says_which_file_to_put_where(tmp_path, monkeypatch):
    from urllib.error import URLError

    def no_network(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(InputError, match=r"put the file resnet50-0676ba61\.pth into .*checkpoints"):
        FrozenClassifier("resnet50", "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        ("resnet51", "IMAGENET1K_V1", "no classifier named 'resnet51'"),
        ("resnet50", "IMAGENET1K_V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("resnet50", "absent.pt", "absent.pt: no such weights file"),
    ],
)
def test_what_torchvision_does_not_know(architecture, weights, message):
    with pytest.raises(InputError, match=message):
        FrozenClassifier(architecture, weights)


def test_weights_of_another_architecture(tmp_path):
    path = tmp_path / "c.pt"
    save_classifier(get_model("resnet18", weights=None, num_classes=2).state_dict(), ["a", "b"], path)
    with pytest.raises(InputError, match=r"layer1.0.conv1.weight is \[64, 64, 3, 3\], expected \[64, 64, 1, 1\]"):
        FrozenClassifier("resnet50", str(path))
    with pytest.raises(InputError, match=r"heads\.head\.weight is missing"):
        FrozenClassifier("vit_b_16", str(path))


@pytest.mark.parametrize("values", ["text", 0.5, (0.5, 0.5), (0.5, 0.5, 0.0), (0.5, 0.5, float("nan"))])
def test_a_normalisation_that_is_none(tmp_path, values):
    state = get_model("resnet18", weights=None, num_classes=2).state_dict()
    torch.save({"state_dict": state, "class_names": ["a", "b"], "std": values}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="mean and std have to be three numbers"):
        FrozenClassifier("resnet18", str(tmp_path / "c.pt"))


# Pipeline


def test_pipeline_is_its_parts(classifier):
    network = RRDBNet(8, 1, 4)
    images = torch.rand(2, 3, 50, 70)
    small, rebuilt, logits = Pipeline("DarioNet", classifier, upscaler=network)(images)
    assert small.shape[-2:] == (16, 22)
    assert small.equal(Scaler((16, 22))(images))
    assert rebuilt.equal(Scaler((50, 70))(network(small)).clamp(0, 1))
    assert logits.equal(classifier(rebuilt))


def test_variants_without_an_upscaler(classifier):
    images = torch.rand(2, 3, 50, 50)
    small, rebuilt, logits = Pipeline("Original", classifier, scale=None, rebuild=False)(images)
    assert small is images and rebuilt is images and logits.equal(classifier(images))
    small, rebuilt, logits = Pipeline("Small", classifier, rebuild=False)(images)
    assert rebuilt is small and small.shape[-2:] == (16, 16) and logits.equal(classifier(small))
    _, rebuilt, _ = Pipeline("Bicubic", classifier, enlarge="bicubic")(images)
    assert rebuilt.equal(Scaler((50, 50), "bicubic")(Scaler((16, 16))(images)).clamp(0, 1))


def test_small_images_are_rebuilt_to_the_size_asked_for(classifier):
    small, rebuilt, _ = Pipeline("DarioNet", classifier, upscaler=RRDBNet(8, 1, 4), scale=None)(
        torch.rand(1, 3, 9, 12), (32, 43)
    )
    assert small.shape[-2:] == (9, 12) and rebuilt.shape[-2:] == (32, 43)
