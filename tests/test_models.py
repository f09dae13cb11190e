import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, VisionTransformer, get_model

from benchmarks.correctness import drawn_images
from experiment.runtime import start_runtime
from models.classifier import LABELS_FILE, FrozenClassifier, open_classifier, save_classifier
from models.darionet import DarioNet
from models.errors import InputError
from models.images import to_image, to_tensor
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.rrdbnet import RRDBNet
from models.scaler import RandomReduction, Reduction, Scaler, Stored, reduced_length


def network_of(architecture: str, classes: int = 2, **options) -> nn.Module:
    return get_model(architecture, weights=None, num_classes=classes, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> FrozenClassifier:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "c.pt"
    save_classifier(network_of("resnet18", 5), list("abcde"), path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    return open_classifier("resnet18", str(path))


# Scaler


def bilinear_reference(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Samples (C,H,W) at the centres of the new pixels, without torch's resize."""
    sampled = image.numpy()
    for axis, length in ((1, height), (2, width)):
        old = np.arange(sampled.shape[axis])
        places = (np.arange(length) + 0.5) * len(old) / length - 0.5
        sampled = np.apply_along_axis(lambda line, old=old, places=places: np.interp(places, old, line), axis, sampled)
    return torch.from_numpy(sampled)


@pytest.mark.parametrize("size", [(8, 5), (31, 47), (20, 20)])
def test_scaler_is_plain_bilinear_sampling(size):
    image = torch.rand(3, 21, 26, dtype=torch.float64)
    found = Scaler(size)(image[None])[0].double()
    torch.testing.assert_close(found, bilinear_reference(image, *size), atol=1e-5, rtol=0)


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
    with torch.autocast("cpu", torch.bfloat16):
        assert Scaler(4)(images.bfloat16()).dtype == torch.float32


def test_published_small_size():
    assert reduced_length(256, 0.32) == 81
    assert reduced_length(100, 0.29) == 29  # 28.999999999999996 in floating point
    assert reduced_length(1, 0.32) == 1
    assert all(reduced_length(n, 1 / 3) == n // 3 for n in range(3, 300))


# RRDBNet


def test_the_published_network():
    with torch.device("meta"):
        network = RRDBNet()
    assert sum(p.numel() for p in network.parameters()) == 16_697_987
    keys = network.state_dict()
    outside = {"conv_first", "RRDB_trunk", "trunk_conv", "upconv1", "upconv2", "HRconv", "conv_last"}
    assert len(keys) == 702 and {key.split(".")[0] for key in keys} == outside
    assert keys["RRDB_trunk.22.RDB3.conv5.weight"].shape == (64, 192, 3, 3)


def test_four_times_larger_at_any_size():
    """Two features are too few for the three colours: they start at random."""
    for features, height, width in ((8, 1, 1), (8, 7, 13), (2, 5, 5)):
        out = RRDBNet(features, 1, 4)(torch.rand(2, 3, height, width))
        assert out.shape == (2, 3, 4 * height, 4 * width)


@pytest.mark.parametrize("size", [(64, 23, 32), (3, 1, 4)])
def test_random_weights_start_as_an_enlargement(size):
    torch.manual_seed(0)
    small = torch.rand(2, 3, 12, 16)
    network = RRDBNet(*size)
    rebuilt = network(small)
    twice = F.interpolate(F.interpolate(small, scale_factor=2, mode="bilinear"), scale_factor=2, mode="bilinear")
    inside = (..., slice(4, -4), slice(4, -4))  # beyond the border convolutions see zeros
    assert (rebuilt - twice)[inside].abs().max() < 1e-5
    (rebuilt - torch.rand_like(rebuilt)).abs().mean().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


# FrozenClassifier


def test_what_a_frozen_classifier_gives(classifier):
    """Normalised inside by the file's own values; its features are what the last layer reads."""
    images = torch.rand(2, 3, 40, 40)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    expected = classifier.network((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    logits, features, _ = classifier.look(images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(classifier.network.fc(features), logits)
    Pipeline("x", classifier.train(), unchanged, unchanged).train()
    assert not any(module.training for module in classifier.modules()), "nothing wakes it"
    assert not any(p.requires_grad for p in classifier.parameters())


def test_imagenet_labels():
    labels = json.loads(LABELS_FILE.read_text())
    assert list(labels) == [str(i) for i in range(1000)]
    wnids = [wnid for wnid, _ in labels.values()]
    assert wnids == sorted(set(wnids)) and wnids[0] == "n01440764" and wnids[-1] == "n15075141"
    assert [name for _, name in labels.values()] == ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert labels["207"] == ["n02099601", "golden retriever"]


class OwnNetwork(nn.Module):
    """A network that neither torchvision nor timm defines, or with `how` one of the ways not to be a classifier."""

    def __init__(self, how: str = ""):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.how = how
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        if self.how == "size" and x.shape[-1] != 24:
            raise RuntimeError("made for 24")
        if self.how == "counts":
            self.calls += 1
        x = self.body(self.stem(self.norm(x) if self.how == "batch" else x)).mean((2, 3))
        scores = self.head(F.dropout(x) if self.how == "chance" else x)  # F.dropout's default is training
        return {"tuple": (scores, scores), "map": scores[:, :, None]}.get(self.how, scores)


def test_any_network_is_a_classifier():
    network = OwnNetwork()
    classifier = FrozenClassifier(network, ["cat", "dog", "fox"], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = torch.rand(2, 3, 32, 32)
    assert classifier(images).equal(network((images - 0.5) / 0.25))
    classifier.check(32, "key")
    assert classifier.head == "head" and classifier.maps == ("stem", "body")
    named = FrozenClassifier(network, ["cat", "dog", "fox"], head="head", maps=["stem.0"])
    assert [tuple(m.shape) for m in named.look(images).maps] == [(2, 8, 16, 16)]
    for options in ({"maps": ["tail"]}, {"head": "tail"}):
        with pytest.raises(InputError, match="no layer 'tail'"):
            FrozenClassifier(network, ["cat", "dog", "fox"], **options)
    with pytest.raises(InputError, match="no linear layer"):
        FrozenClassifier(nn.ReLU(), ["cat", "dog"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "tuple"}, r"scores on 2 images are tuple, expected \[2, 3\]"),
        ({"how": "map"}, r"scores on 2 images are \[2, 3, 1\], expected \[2, 3\]"),
        ({"how": "chance"}, "changes in evaluation mode"),
        ({"how": "counts"}, "changes in evaluation mode"),
        ({"how": "batch"}, "changes in evaluation mode"),
        ({"how": "size"}, r"can't read images of 32x32 pixels \(the key\).* \(RuntimeError: made for 24"),
        ({"class_names": ["dog"]}, "gives one score"),
        ({"class_names": {"fox": 2, "cat": 0, "dog": 1}}, "expected a list of texts"),
        ({"class_names": ["a", "a", "b"]}, "each once"),
        ({"class_names": "abc"}, "expected a list of texts"),
        ({"class_names": ["a", "b"]}, "lists 2 classes .* the last layer, head, gives 3 scores"),
        ({"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, "divide both by 255"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "three numbers"),
    ],
)
def test_what_is_no_fixed_function_to_scores_or_would_be_wrong_in_silence_is_refused(options, message):
    torch.manual_seed(0)
    options = {"class_names": list("abc"), "head": "head", **options}
    network = OwnNetwork(options.pop("how", ""))
    with pytest.raises(InputError, match=message):
        FrozenClassifier(network, **options).check(32, "the key")


# Maps


@pytest.mark.parametrize("architecture", ["resnet18", "densenet121", "mobilenet_v2", "vgg11", "swin_t"])
def test_layers_of_the_losses_are_found_and_stay_under_lower_precision(architecture):
    classifier = FrozenClassifier(network_of(architecture, 4), list("abcd"))
    classifier.check(64, "key")
    images = torch.rand(1, 3, 64, 64)
    plain = classifier.look(images)
    assert len(plain.maps) >= 3
    assert len({m.shape[-1] if m.shape[-1] == m.shape[-2] else m.shape[1] for m in plain.maps}) == len(plain.maps)
    assert plain.logits.equal(classifier(images)) and not classifier.seen
    with torch.autocast("cpu", torch.bfloat16):
        low = classifier.look(images)
    assert all(m.dtype == torch.float32 for m in low.maps)
    for found, expected in zip(low.maps, plain.maps, strict=True):
        assert found.shape == expected.shape and (found - expected).norm() < 0.1 * expected.norm()
    if architecture == "resnet18":
        assert classifier.maps == ("relu", "layer1", "layer2", "layer3")


class Attentive(nn.Module):
    """Two convolutions, then attention among the 16 pixels of a map: its 16 x 16 matrix is no map of stride 4."""

    def __init__(self):
        super().__init__()
        self.stem, self.patches = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 4, 4)
        self.attention, self.head = nn.Softmax(-1), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.patches(self.stem(x)).flatten(2).transpose(1, 2)
        weights = self.attention((tokens @ tokens.transpose(1, 2))[:, None])
        return self.head((weights[:, 0] @ tokens).mean(1))


def test_what_stands_in_for_maps():
    """No matrix of attention; the blocks of a transformer; what is named, if a network reads one size alone."""
    transformer = VisionTransformer(32, 8, num_layers=8, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)
    for network, side, named, expected in (
        (Attentive(), 64, None, ("stem", "patches")),
        (transformer, 32, None, tuple(f"encoder.layers.encoder_layer_{i}" for i in (1, 3, 5, 7))),
        (OwnNetwork("size"), 24, None, ()),
        (OwnNetwork("size"), 24, ["stem"], ("stem",)),
    ):
        classifier = FrozenClassifier(network, list("abc"), maps=named)
        classifier.check(side, "key")
        assert classifier.maps == expected


# Where classifiers come from


def test_torchvision_weights_are_loaded_from_the_download_folder(tmp_path, monkeypatch):
    """The real loading code, on a file made here in the place of the download; its hash is not the published one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    network = get_model("squeezenet1_1", weights=None)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(InputError, match=r"squeezenet1_1-b8a52dc0\.pth: not the file published under this name"):
        open_classifier("squeezenet1_1")
    monkeypatch.setattr("models.weights.sha256_of", lambda path: "b8a52dc0" + 56 * "0")
    frozen = open_classifier("squeezenet1_1")
    assert frozen.class_names[207] == "n02099601" and frozen.labels[207] == "golden retriever"
    assert frozen.network.features[0].weight.equal(network.features[0].weight)


@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        ("resnet51", "IMAGENET1K_V1", "no classifier named 'resnet51'"),
        ("resnet50", "IMAGENET1K_V3", '\'IMAGENET1K_V3\' is no file; .*"IMAGENET1K_V1", "IMAGENET1K_V2"'),
        ("resnet50", None, "None is no file"),
        ("resnet50", "absent.pt", "absent.pt: no such weights file"),
        ("absent.py:network", None, "FileNotFoundError.*absent.py"),
    ],
)
def test_names_that_nobody_knows(architecture, weights, message):
    with pytest.raises(InputError, match=message):
        open_classifier(architecture, weights)


def test_weights_of_another_architecture(tmp_path):
    state = network_of("resnet18").state_dict()
    save_classifier(state, ["a", "b"], tmp_path / "two.pt")
    save_classifier(state, ["a", "b", "c"], tmp_path / "three.pt")
    torch.save(state, tmp_path / "bare.pt")
    for architecture, name, message in (
        ("resnet50", "two.pt", r"layer1.0.conv1.weight is \[64, 64, 3, 3\], expected \[64, 64, 1, 1\]"),
        ("vit_b_16", "two.pt", r"class_token is missing"),
        ("inception_v3", "two.pt", r"transform_input.*FILE\.py:FUNCTION"),
        ("resnet18", "three.pt", r"three\.pt: fc\.weight is \[2, 512\], expected \[3, 512\]"),
        ("resnet18", "bare.pt", r"fc\.weight is \[2, 512\], expected \[1000, 512\]; .*save_classifier"),
    ):
        with pytest.raises(InputError, match=message):
            open_classifier(architecture, str(tmp_path / name))


def test_what_a_state_dict_does_not_say(tmp_path):
    """A ViT of another image size."""
    network = network_of("vit_b_32", image_size=64)
    save_classifier(network, ["a", "b"], tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"pos_embedding is \[1, 5, 768\], expected \[1, 50, 768\].*FILE.py:FUNCTION"):
        open_classifier("vit_b_32", str(tmp_path / "c.pt"))
    file = tmp_path / "mine.py"
    file.write_text("from torchvision.models import vit_b_32\nsmall = lambda: vit_b_32(num_classes=2, image_size=64)\n")
    images = torch.rand(1, 3, 64, 64)
    found = open_classifier(f"{file}:small", str(tmp_path / "c.pt"))
    assert found(images).equal(network.eval()((images - found.mean) / found.std))


OWN_FILE = """
from torch import nn, zeros

CLASS_NAMES = ["cat", "dog", "fox"]
MEAN = STD = (0.5, 0.5, 0.5)


def network():
    own = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    own.register_buffer("mean", zeros(3))
    return own


def number():
    return 3


def broken():
    raise ValueError("no such model")
"""


def test_a_network_of_ones_own_from_a_file(tmp_path, capsys):
    """FILE.py:FUNCTION, with its weights inside or in a file beside it; a buffer named mean normalises nothing."""
    file = tmp_path / "mine.py"
    file.write_text(OWN_FILE)
    own = open_classifier(f"{file}:network", None)
    assert own.class_names == ["cat", "dog", "fox"] and own.mean.flatten().tolist() == [0.5] * 3
    state = {key: torch.rand_like(value) for key, value in own.network.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    images = torch.rand(2, 3, 8, 8)
    other = open_classifier(f"{file}:network", str(tmp_path / "w.pt"))
    expected = F.linear(images.mean((2, 3)) * 2 - 1, state["2.weight"], state["2.bias"])
    torch.testing.assert_close(other(images), expected)
    assert capsys.readouterr().out == ""
    (tmp_path / "silent.py").write_text(OWN_FILE.replace("STD", "OTHER"))
    silent = open_classifier(f"{tmp_path}/silent.py:network", None)
    assert "says no MEAN and STD" in capsys.readouterr().out and silent.std.flatten()[0].item() == pytest.approx(0.229)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="no state dict"):
        open_classifier(f"{file}:network", str(tmp_path / "tensor.pt"))
    messages = {"number": "returned a int", "broken": "ValueError: no such", "absent": "no attribute 'absent'"}
    for function, message in messages.items():
        with pytest.raises(InputError, match=message):
            open_classifier(f"{file}:{function}", None)


def test_timm_by_name(tmp_path):
    """DeiT has two heads."""
    timm = pytest.importorskip("timm", reason="timm is optional")
    for name, side in (("resnet10t", 64), ("deit_tiny_distilled_patch16_224", 224)):
        network = timm.create_model(name, pretrained=False, num_classes=3).eval()
        save_classifier(network, list("abc"), tmp_path / "c.pt", architecture=f"timm/{name}", mean=(0.1, 0.2, 0.3))
        classifier = open_classifier(f"timm/{name}", str(tmp_path / "c.pt"))
        images = torch.rand(1, 3, side, side)
        assert classifier(images).equal(network((images - classifier.mean) / classifier.std))
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tmp_path / "lite.pt")
    lite = open_classifier("timm/tf_efficientnet_lite0", str(tmp_path / "lite.pt"))
    assert lite.mean.flatten().tolist() == [0.5] * 3 and len(lite.class_names) == 1000
    with pytest.raises(InputError, match=r"Unknown model \(resnet0\)"):
        open_classifier("timm/resnet0", "pretrained")


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        open_classifier("timm/resnet10t", "pretrained")


def test_efficientnet_lite0_is_timms():
    timm = pytest.importorskip("timm", reason="timm is optional")
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    ours = open_classifier("examples/photographs/efficientnet_lite0.py:network", None)
    ours.network.load_state_dict(theirs.state_dict())
    for side in (64, 75):
        images = torch.rand(2, 3, side, side)
        assert (ours(images) - theirs(images * 2 - 1)).abs().max() < 1e-4


# Pipeline


def test_pipeline_is_its_parts(classifier):
    """Another upscaler or another reduction is a callable."""
    network = RRDBNet(8, 1, 4)
    images = torch.rand(2, 3, 50, 70)
    small, rebuilt, logits = Pipeline("DarioNet", classifier, Reduction(), Upscale(network))(images)
    assert small.shape[-2:] == (16, 22)
    assert small.equal(Scaler((16, 22))(images))
    assert rebuilt.equal(Scaler((50, 70))(network(small)).clamp(0, 1))
    assert logits.equal(classifier(rebuilt))
    small, rebuilt, _ = Pipeline("mine", classifier, lambda x: x[..., ::4, ::4], Upscale(torch.sqrt))(images)
    assert small.equal(images[..., ::4, ::4]) and rebuilt.equal(Scaler((50, 70))(small.sqrt()).clamp(0, 1))


def test_variants_without_a_network(classifier):
    images = torch.rand(2, 3, 50, 50)
    small, rebuilt, logits = Pipeline("Original", classifier, unchanged, unchanged)(images)
    assert small is images and rebuilt.equal(images) and logits.equal(classifier(images))
    small, rebuilt, logits = Pipeline("Small", classifier, Reduction(), unchanged)(images)
    assert rebuilt.equal(small) and small.shape[-2:] == (16, 16) and logits.equal(classifier(small))
    _, rebuilt, _ = Pipeline("Bicubic", classifier, Reduction(), Enlarge("bicubic"))(images)
    assert rebuilt.equal(Scaler((50, 50), "bicubic")(Scaler((16, 16))(images)).clamp(0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_stored_file_loses_a_little(kind):
    images = drawn_images(2, 50)
    small = Reduction()(images)
    better, worse = (Stored(Reduction(), kind, quality)(images) for quality in (95, 20))
    assert better.shape == small.shape and worse.min() >= 0 and worse.max() <= 1
    assert 0 < (better - small).abs().mean() < (worse - small).abs().mean() < 0.1


def test_a_reduction_drawn_for_every_image():
    options = {"interpolation": ["bilinear", "bicubic"], "antialias": [False, True], "jpeg_quality": [40, 95]}
    kinds = RandomReduction(Reduction(), share=1.0, scale=[0.25, 0.5], jpeg_probability=0.5, **options)
    images = drawn_images(1, 40).repeat(8, 1, 1, 1)
    small = kinds.drawn("1/2/3", range(8))(images)
    assert small.equal(kinds.drawn("1/2/3", range(8))(images))
    assert not small.equal(kinds.drawn("1/2/4", range(8))(images))
    assert len({tuple(one.flatten().tolist()) for one in small}) > 3
    sides = {kinds.drawn(str(key), [0])(images[:1]).shape[-1] for key in range(40)}
    assert min(sides) >= 10 and max(sides) <= 20 and len(sides) > 5
    plain = RandomReduction(Reduction(), 1.0, [0.32, 0.32], ["bilinear"], [False], 0.0, [40, 95])
    assert plain.drawn("x", range(8))(images).equal(Reduction()(images))
    webp = RandomReduction(Reduction(), 1.0, [0.32, 0.32], ["bilinear"], [False], 0.0, [40, 95], 1.0, [50, 50])
    assert webp.drawn("x", range(8))(images).equal(Stored(Reduction(), "WEBP", 50)(images))
    half = RandomReduction(Reduction(), share=0.5, scale=[0.4, 0.5], jpeg_probability=0.5, **options)
    assert 30 < sum(half.drawn(str(key), [0]) == Reduction() for key in range(100)) < 70


# From Python


def test_darionet_rebuilds_images_of_both_kinds(tmp_path):
    torch.manual_seed(0)
    network = RRDBNet(8, 1, 4)
    torch.save(network.state_dict(), tmp_path / "D.pt")
    darionet = DarioNet(tmp_path / "D.pt")
    small = drawn_images(1, 12, 5)
    expected = Scaler((48, 48))(network(small)).clamp(0, 1)
    assert torch.allclose(darionet(small), expected, atol=1e-5)
    assert darionet(small, (30, 20)).shape == (1, 3, 30, 20)
    picture = darionet(to_image(small))
    assert picture.size == (48, 48) and picture.mode == "RGB"
    assert (to_tensor(picture) - darionet(to_tensor(to_image(small)))).abs().max() <= 0.5 / 255 + 1e-6
    assert not darionet(small).requires_grad
    assert to_image(torch.full((3, 1, 1), 2.0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_classifier_reads_a_picture():
    head = nn.Linear(3, 3, bias=False)
    head.weight.data = torch.tensor([[-10.0], [0.0], [10.0]]).expand(3, 3) / 3  # of the mean brightness
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    classifier = FrozenClassifier(network, ["dark", "grey", "bright"], (0.5,) * 3, (0.5,) * 3)
    read = classifier.read(Image.new("RGB", (30, 20), (255, 255, 255)), side=8, top=2)
    assert [label for label, _ in read] == ["bright", "grey"]
    assert read[0][1] == pytest.approx(1 / (1 + math.exp(-10) + math.exp(-20)), abs=1e-6)
    assert classifier.read(torch.zeros(3, 9, 9), side=8)[0][0] == "dark"


def test_what_a_device_lacks_is_resized_on_the_cpu(monkeypatch):
    """Macs: an operation that MPS lacks raises NotImplementedError."""
    images, calls, resize = drawn_images(1, 16, 1), [], F.interpolate

    def lacking(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise NotImplementedError("not for this device")
        return resize(*arguments, **options)

    expected = Scaler(5, antialias=True)(images)
    monkeypatch.setattr("models.scaler.F.interpolate", lacking)
    assert torch.equal(Scaler(5, antialias=True)(images), expected) and len(calls) == 2


def test_a_mac_is_given_what_it_can(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = start_runtime("auto")
    assert (str(runtime.device), runtime.precision, runtime.name()) == ("mps", "float32", "mps")
    assert runtime.memory_format == torch.contiguous_format and runtime.widest == torch.float32
    assert start_runtime("fp16").precision == "fp16"
