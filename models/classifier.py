"""FrozenClassifier: the teacher of the distillation, any network. It normalises its own input and never changes."""

import hashlib
import importlib.util
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from models.errors import InputError
from models.images import to_tensor
from models.scaler import Scaler, at_least_float32
from models.weights import download, load_file, load_strictly, refuse_other_file, save_file, unwrap

LABELS_FILE = Path(__file__).parent.parent / "assets" / "labels.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the training images, as in every torchvision recipe
IMAGENET_STD = (0.229, 0.224, 0.225)
PUBLISHED = "IMAGENET1K_V1"  # torchvision's name of the weights that most of its classifiers have
MAP_STRIDES = (2, 4, 8, 16)  # of the maps that are compared if none are named
NOTED = ("class_names", "mean", "std")  # beside the weights in a file, or in capitals in FILE.py


def imagenet_labels() -> dict[str, str]:
    """WordNet id -> readable name of ImageNet's 1000 classes, in the order of the classifiers' scores."""
    return dict(json.loads(LABELS_FILE.read_text(encoding="utf-8")).values())


class Look(NamedTuple):
    """What a classifier sees in images."""

    logits: Tensor  # (N, classes)
    features: Tensor  # (N, features): the input of the last layer
    maps: tuple[Tensor, ...]  # the outputs of the layers in FrozenClassifier.maps


def keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
    """A hook: keeps a layer's output in `seen`, or its input if it is called before the layer."""
    seen[name] = inputs[0] if output is None else output


class FrozenClassifier(nn.Module):
    """Any classifier, frozen: (N,3,H,W) in [0,1] -> logits (N, classes).

    Args:
        network: (N,3,H,W), normalised -> logits (N, classes).
        class_names: folder names of the classes (ImageNet: WordNet ids), in the order of the scores.
        mean, std: of the normalisation, per channel, of images in [0,1].
        head: name of the layer that gives the scores; None: the last linear layer or convolution that is defined.
        maps: names of the layers whose outputs `look` gives; None: `check` finds some, in a convolutional network.

    Raises:
        InputError: class names, a normalisation or names of layers that do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        head: str | None = None,
        maps: Sequence[str] | None = None,
    ):
        super().__init__()
        self.network = network
        self.class_names, both = checked(class_names, mean, std)
        readable = imagenet_labels()
        self.labels = [readable.get(name, name) for name in self.class_names]  # to show
        self.register_buffer("mean", both[0].float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", both[1].float().view(1, 3, 1, 1), persistent=False)
        self.head = head or head_of(network)
        last, count = layer(network, self.head), len(self.class_names)
        if (scores := getattr(last, "out_features", getattr(last, "out_channels", count))) != count:
            raise InputError(
                f"class_names lists {count} classes (ImageNet's if nothing names them), and the last layer, "
                f"{self.head}, gives {scores} scores: name them in FILE.py (CLASS_NAMES) or with save_classifier"
            )
        self.seen: dict[str, Tensor] = {}
        last.register_forward_pre_hook(partial(keep, self.seen, "input of the head"))
        self.watch(maps or ())
        self.requires_grad_(False)
        self.train(False)

    def watch(self, maps: Sequence[str]) -> None:
        """Makes `look` give the outputs of these layers."""
        self.maps = tuple(maps)
        for name in self.maps:
            layer(self.network, name).register_forward_hook(partial(keep, self.seen, name))

    def train(self, mode: bool = True) -> "FrozenClassifier":
        """Stays in evaluation mode, whatever is asked: BatchNorm statistics that drift would change the teacher."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) float in [0,1] -> logits (N, classes)."""
        logits = self.network((images - self.mean) / self.std)
        self.seen.clear()
        return logits

    def look(self, images: Tensor) -> Look:
        """(N,3,H,W) float in [0,1] -> logits, the last layer's input and the maps, float32."""
        logits = self.network((images - self.mean) / self.std)
        seen = {name: at_least_float32(values) for name, values in self.seen.items()}
        self.seen.clear()
        maps = tuple(seen[name] for name in self.maps)
        return Look(at_least_float32(logits), seen["input of the head"].flatten(1), maps)

    @torch.no_grad()
    def read(self, image: Image.Image | Tensor, side: int = 256, top: int = 5) -> list[tuple[str, float]]:
        """The `top` likeliest classes of an image, (label, probability) each.

        `image` is a PIL image, (3,H,W) or (1,3,H,W) float in [0,1]; its shorter side is resized to `side` pixels.
        """
        images = to_tensor(image) if isinstance(image, Image.Image) else image.reshape(1, 3, *image.shape[-2:])
        resized = Scaler(side, antialias=True)(images.to(self.mean.device)).clamp(0, 1)
        return [(p["label"], p["probability"]) for p in self.predictions(self(resized), top)[0]]

    def predictions(self, logits: Tensor, top: int = 1) -> list[list[dict]]:
        """The `top` likeliest classes of every row of (N, classes), if there are as many: class, label, probability."""
        best = logits.float().softmax(1).topk(min(top, len(self.labels)))
        return [
            [
                {"class": self.class_names[i], "label": self.labels[i], "probability": round(p, 6)}
                for p, i in zip(probabilities, indices, strict=True)
            ]
            for probabilities, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @torch.no_grad()
    def refusal(self, height: int, width: int) -> str | None:
        """The error that images of this size raise, in one line; None if it reads them, as not every network does."""
        try:
            self(self.mean.new_zeros(1, 3, height, width))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each architecture has its own way of refusing
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None

    @torch.no_grad()
    def check(self, side: int, key: str) -> None:
        """Checks that it maps images of `side` x `side` pixels, the value of the parameter `key`, to fixed scores.

        Finds the layers of the maps if none were named.

        Raises:
            InputError: it can't read them, its scores are not (N, classes), or they depend on more than the image.
        """
        if reason := self.refusal(side, side):
            raise InputError(
                f"the classifier can't read images of {side}x{side} pixels ({key}): set transformations.resize_size, "
                f"train_crop_size and val_crop_size to the size that it was made for, such as 224 ({reason})"
            )
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.mean)
        before, scores, expected = self.fingerprint(), self(images), [2, len(self.class_names)]
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if found != expected:
            raise InputError(f"the classifier's scores on 2 images are {found}, expected {expected}: wrap the network")
        again = torch.cat([self(images[:1]), self(images[1:])])
        if self.fingerprint() != before or (again - scores).norm() > 1e-3 * scores.norm():
            raise InputError(
                "the classifier changes in evaluation mode (its scores on an image depend on earlier calls, on the "
                "other images, or on chance): look for dropout, or for BatchNorm without running statistics"
            )
        if not self.maps:
            self.watch(layers_of_maps(self, images[:1]))

    def fingerprint(self) -> str:
        """The first 16 digits of a SHA-256 of its weights and buffers."""
        sha256 = hashlib.sha256()
        for tensor in self.state_dict().values():
            sha256.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return sha256.hexdigest()[:16]


def checked(class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> tuple[list[str], Tensor]:
    """The names as a list, and mean and std per channel, (2,3) float64. Raises InputError if they can't be right."""
    names = list(class_names) if isinstance(class_names, Sequence) and not isinstance(class_names, str) else []
    if not all(isinstance(name, str) for name in names) or len(set(names)) < max(2, len(names)):
        raise InputError(
            "class_names: expected a list of texts in the order of the scores, each once, and at least two. If the "
            "classifier gives one score, for a sigmoid, wrap it so that it gives two: torch.cat((-score, score), 1) / 2"
        )
    try:
        both = torch.stack([torch.as_tensor(values, dtype=torch.float64).flatten() for values in (mean, std)])
        if both.shape == (2, 3) and both.abs().max() <= 2 and both[1].min() > 0:
            return names, both
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(
        "mean and std have to be three numbers each, std over 0, for images in [0,1] (for pixels up to 255: divide "
        f"both by 255); found {(mean, std)}"[:400]
    )


def layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in network.named_modules() if known]
        raise InputError(f"the classifier has no layer {name!r}; it has {', '.join(known[:8])}, ...") from None


def head_of(network: nn.Module) -> str:
    """Name of the layer that gives the scores: in nearly every classifier the one that is defined last."""
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not names:
        raise InputError("the classifier has no linear layer and no convolution: name the layer of its scores as head")
    return names[-1]


# Layers for the loss on maps


def layers_of_maps(classifier: FrozenClassifier, image: Tensor) -> list[str]:
    """For each of MAP_STRIDES the layer that gives the map with which the next stage starts, if there is one.

    A map of an image (1,3,side,side) is square, and only its width changes if the image is twice as wide. Networks
    that read one size alone show none. In a transformer the blocks at the quarters of its depth stand in for the maps.
    """
    side, calls = image.shape[-1], calls_of_layers(classifier, image)
    wider = [] if classifier.refusal(side, 2 * side) else calls_of_layers(classifier, image.repeat(1, 1, 1, 2))
    strides = {}  # of the outputs that are maps, by their id
    for (_, _, out), (_, _, wide) in zip(calls, wider, strict=False):
        if isinstance(out, Tensor) and out.ndim == 4:
            changed = [i for i in range(4) if out.shape[i] != wide.shape[i]]
            if changed in ([3], [2]) and out.shape[changed[0] - 1] == out.shape[changed[0]]:  # [2] is Swin's order
                strides[id(out)] = 2 ** round(math.log2(side / out.shape[changed[0]]))
    chosen = []
    for wanted in MAP_STRIDES:
        starts = [x for _, x, out in calls if strides.get(id(x)) == wanted and strides.get(id(out)) == 2 * wanted]
        layers = [name for name, _, out in calls if starts and out is starts[-1]]
        layers = layers or [name for name, _, out in calls if name and strides.get(id(out)) == wanted]
        chosen += layers[-1:]
    if len(chosen) >= 2:
        return chosen
    siblings = defaultdict(list)  # the layers of one class inside one layer
    for name, _, out in calls:
        if isinstance(out, Tensor) and out.ndim == 3 and name:
            siblings[name.rpartition(".")[0], type(classifier.network.get_submodule(name))].append(name)
    blocks = max(siblings.values(), key=len, default=[])
    return [blocks[len(blocks) * (i + 1) // 4 - 1] for i in range(4)] if len(blocks) >= 4 else chosen


@torch.no_grad()
def calls_of_layers(classifier: FrozenClassifier, image: Tensor) -> list[tuple[str, object, object]]:
    """(name, first input, output) of every layer's call, inner layers first."""
    names = {module: name for name, module in classifier.network.named_modules()}
    calls = []

    def record(module: nn.Module, inputs: tuple, out: object) -> None:
        calls.append((names.get(module, ""), inputs[0] if inputs else None, out))

    with nn.modules.module.register_module_forward_hook(record):
        classifier(image)
    return calls


# Where classifiers come from


def open_classifier(
    architecture: str = "resnet50",
    weights: str | None = PUBLISHED,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: str | None = None,
    maps: Sequence[str] | None = None,
) -> FrozenClassifier:
    """A classifier by name, frozen.

    Args:
        architecture: a name that `torchvision.models.get_model` knows; `timm/NAME`; or `FILE.py:FUNCTION`, a function
            of the user's own that returns the network. That file is run.
        weights: the name of published weights (torchvision's IMAGENET1K_V1 and the like, "pretrained" for timm); a
            file: a state dict, or a dictionary of `state_dict`, `class_names`, `mean`, `std` (see `save_classifier`);
            None for the weights that FILE.py's function gave its network.
        mean, std: of its normalisation; None takes what the weights, the file or FILE.py (MEAN, STD) say.
        head, maps: see FrozenClassifier.

    Raises:
        InputError: unknown architecture or weights, no internet, a file that does not fit.
    """
    is_file = weights is not None and (Path(weights).suffix != "" or Path(weights).exists())
    noted, state = read_classifier_file(architecture, weights) if is_file else ({}, None)
    imagenet = list(imagenet_labels())
    if architecture.startswith("timm/"):
        build, published = from_timm, ["pretrained"]
    elif ".py:" in architecture:
        build, published = from_file, [None]
    else:
        build, published = from_torchvision, list(published_weights(architecture))
    if not is_file and weights not in published:
        names = ", ".join(map(json.dumps, published))
        raise InputError(f"classifier.weights: {weights!r} is no file; for {architecture} name one, or {names}")
    network, known = build(architecture, weights, len(noted.get("class_names", imagenet)) if is_file else None)
    given = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    if is_file:
        try:
            load_strictly(network, state, weights)
        except InputError as error:
            raise InputError(
                f"{error}; classes that are not ImageNet's are named in the file by models.classifier.save_classifier; "
                "other options (an image size, ...) need a function of yours that builds the network, FILE.py:FUNCTION"
            ) from None
    # What the caller gives comes before what the file notes, and that before what is known of the network.
    values = {"class_names": imagenet} | known | noted | given
    if build is from_file and not values.keys() >= {"mean", "std"}:
        print(f"Note: {architecture} says no MEAN and STD: taking ImageNet's; classifier.mean and std name others")
    try:
        return FrozenClassifier(network, **values, head=head, maps=maps)
    except InputError as error:
        raise InputError(f"{weights or architecture}: {error}") from None


def from_torchvision(architecture: str, weights: str | None, classes: int | None) -> tuple[nn.Module, dict]:
    """A network of so many classes, to be filled; if None, with published weights, and what is known of these."""
    from torchvision.models import get_model

    if classes is None:
        entry = published_weights(architecture)[weights]
        sha256 = entry.url.rpartition("-")[2].removesuffix(".pth")
        path = download(entry.url, sha256)
        load_file(path)  # torchvision takes a file that is already there unchecked, and would run code inside it
        refuse_other_file(path, sha256)
        transforms = entry.transforms()
        return get_model(architecture, weights=entry), {"mean": transforms.mean, "std": transforms.std}
    if architecture in ("googlenet", "inception_v3"):
        raise InputError(
            f"{weights}: does not say whether its {architecture} was built with transform_input: build it in "
            "FILE.py:FUNCTION (classifier.architecture)"
        )
    return get_model(architecture, weights=None, num_classes=classes), {}


def published_weights(architecture: str) -> dict:
    """torchvision's weights of an architecture, by their names."""
    from torchvision import models  # here, since its import takes as long as torch's

    if architecture not in models.list_models(module=models):
        raise InputError(
            f"classifier.architecture: torchvision has no classifier named {architecture!r}; others are timm/NAME and "
            "FILE.py:FUNCTION"
        )
    return {entry.name: entry for entry in models.get_model_weights(architecture)}


def default_weights(architecture: str) -> str:
    """The name of the published weights of a torchvision architecture for which none are named."""
    names = list(published_weights(architecture))
    return PUBLISHED if PUBLISHED in names else names[0]


def from_timm(architecture: str, weights: str | None, classes: int | None) -> tuple[nn.Module, dict]:
    """The same for timm's networks."""
    try:
        import timm
    except ImportError:
        raise InputError(f"classifier.architecture: {architecture} needs timm: pip install timm") from None
    options = {"pretrained": True} if classes is None else {"num_classes": classes}
    try:
        network = timm.create_model(architecture.removeprefix("timm/"), **options)
    except Exception as error:  # of as many kinds as there are ways to be without a network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"timm can't make {architecture} ({reason}); if the download failed, get the weights where there is a "
            "network, and name the file in classifier.weights"
        ) from None
    data = timm.data.resolve_model_data_config(network)
    return network, {"mean": data["mean"], "std": data["std"]}


def from_file(architecture: str, weights: str | None, classes: int | None) -> tuple[nn.Module, dict]:
    """The network that a function of the user's own returns, and what its file says of it."""
    path, _, function = architecture.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location(f"classifier_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
        spec.loader.exec_module(module)
        network = getattr(module, function)()
        if not isinstance(network, nn.Module):
            raise TypeError(f"returned a {type(network).__name__}, expected a torch.nn.Module")
    except Exception as error:  # the user's own code
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{architecture}: its code failed ({type(error).__name__}: {reason})") from None
    return network, {key: getattr(module, key.upper()) for key in NOTED if hasattr(module, key.upper())}


def read_classifier_file(architecture: str, path: str) -> tuple[dict, dict[str, Tensor]]:
    """What a file says beside its weights, and the weights."""
    contents = load_file(path)
    state = unwrap(contents, path)
    if not isinstance(contents, dict) or not any(isinstance(value, dict) for value in contents.values()):
        return {}, state  # weights alone: what is called mean or std there is a buffer of the network's
    if (held := contents.get("architecture") or architecture) != architecture:
        raise InputError(f"{path}: holds a {held}; classifier.architecture says {architecture}")
    if not isinstance(contents.get("class_names", []), (list, tuple)):
        raise InputError(f"{path}: class_names: expected a list of texts")
    return {key: contents[key] for key in NOTED if key in contents}, state


def save_classifier(
    network: nn.Module | dict[str, Tensor],
    class_names: Sequence[str],
    path: str | Path,
    *,
    architecture: str | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    trained_for: dict | None = None,
) -> None:
    """Writes what `open_classifier` reads: weights (a network's or a state dict), class names in the order of the
    scores, the normalisation (per channel, of images in [0,1]), and what models.weights.trained_for gives.

    Raises:
        InputError: class names or a normalisation that `FrozenClassifier` would refuse.
    """
    class_names, both = checked(class_names, mean, std)
    state = network.state_dict() if isinstance(network, nn.Module) else network
    about = {"class_names": class_names, "mean": both[0].tolist(), "std": both[1].tolist()}
    save_file(about | {"architecture": architecture, "trained_for": trained_for, "state_dict": state}, path)


def noted_architecture(path: str | Path) -> str | None:
    """The architecture that `save_classifier` noted in a file, if it did."""
    contents = load_file(path)
    return contents.get("architecture") if isinstance(contents, dict) else None
