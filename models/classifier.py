"""FrozenClassifier: the teacher of the distillation, any network. It normalises its own input and never changes."""

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from models.errors import InputError
from models.fast import Recorder, fold
from models.images import to_tensor
from models.scaler import Scaler, at_least_float32
from models.weights import load_file, load_strictly, refuse_other_file, save_file, unwrap

LABELS_FILE = Path(__file__).parent.parent / "assets" / "labels.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the training images, as in every torchvision recipe
IMAGENET_STD = (0.229, 0.224, 0.225)
MAP_STRIDES = (2, 4, 8, 16)  # of the maps that are compared where none are named


def imagenet_labels() -> dict[str, str]:
    """WordNet id -> readable name of ImageNet's 1000 classes, in the order of the classifiers' scores."""
    return dict(json.loads(LABELS_FILE.read_text(encoding="utf-8")).values())


class Look(NamedTuple):
    """What a classifier sees in images."""

    logits: Tensor  # (N, classes)
    features: Tensor  # (N, features): the input of the last layer
    maps: tuple[Tensor, ...]  # the outputs of the layers in FrozenClassifier.maps


class FrozenClassifier(nn.Module):
    """Any classifier, frozen: (N,3,H,W) in [0,1] -> logits (N, classes).

    Args:
        network: (N,3,H,W), normalised -> logits (N, classes).
        class_names: folder names of the classes (ImageNet: WordNet ids), in the order of the scores.
        mean, std: of the normalisation, per channel, of images in [0,1].
        head: name of the layer that gives the scores; None: the last linear layer or convolution that is defined.
        maps: names of the layers whose outputs `look` gives; None: `require` finds some (see `layers_of_maps`).

    Attributes:
        labels: the class names to show.

    Raises:
        InputError: one score alone, class names that are no names, a normalisation of images that are not in [0,1], no
            such layer.
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
        self.class_names = checked_class_names(class_names)
        readable = imagenet_labels()
        self.labels = [readable.get(name, name) for name in self.class_names]
        for name, values in zip(("mean", "std"), checked_normalisation(mean, std), strict=True):
            self.register_buffer(name, values.float().view(1, 3, 1, 1), persistent=False)
        self.folded: dict[torch.dtype, nn.Module | None] = {}  # no part of the state: made of it, dropped with it
        self.seen: dict[str, Tensor] = {}
        self.head = head or head_of(network)[0]
        last = layer(network, self.head)
        scores = getattr(last, "out_features", getattr(last, "out_channels", len(self.class_names)))
        if scores != len(self.class_names):
            raise InputError(
                f"class_names lists {len(self.class_names)} classes, and the last layer, {self.head}, gives {scores} "
                "scores: it has to list the names of all, in their order (head names another layer)"
            )
        last.register_forward_pre_hook(Recorder(self.seen, "head"))
        self.maps: tuple[str, ...] = ()
        if maps is not None:
            self.watch(maps)
        self.requires_grad_(False)
        self.train(False)

    def watch(self, maps: Sequence[str]) -> None:
        """Has `look` give the outputs of these layers."""
        self.maps = tuple(maps)
        self.folded = {}
        for name in self.maps:
            layer(self.network, name).register_forward_hook(Recorder(self.seen, name))

    def _apply(self, *arguments, **options) -> "FrozenClassifier":
        """Moved or converted, by `.to()` and its kind."""
        self.folded = {}
        return super()._apply(*arguments, **options)

    def load_state_dict(self, *arguments, **options):
        self.folded = {}
        return super().load_state_dict(*arguments, **options)

    def fold(self, dtype: torch.dtype) -> None:
        """Makes the copy that autocast's lower precisions use, once for each; it happens at the first use otherwise.

        torch.compile has to find it there: it can't follow the making.
        """
        if dtype not in self.folded:
            self.folded[dtype] = fold(self.network, dtype, self.mean.device.type, self.head, self.maps, self.seen)

    def network_in_use(self) -> nn.Module:
        """The network itself, or its folded copy where autocast lowers the precision anyway."""
        device = self.mean.device.type
        if not torch.is_autocast_enabled(device) or self.mean.dtype != torch.float32:
            return self.network
        dtype = torch.get_autocast_dtype(device)
        if not torch.compiler.is_compiling():
            self.fold(dtype)
        return self.folded.get(dtype) or self.network

    def reads(self, height: int, width: int) -> bool:
        """Whether it takes images of this size: some architectures want one size, others can't read small ones."""
        return self.refusal(height, width) is None

    @torch.no_grad()
    def refusal(self, height: int, width: int) -> str | None:
        """What it says to images of this size, in one line, where it does not take them."""
        try:
            self(self.mean.new_zeros(1, 3, height, width))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each architecture has its own way of refusing
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None

    @torch.no_grad()
    def require(self, side: int, key: str) -> None:
        """Checks that it reads images of `side` x `side` pixels, the value of the parameter `key`, as it has to.

        Finds the layers of the maps, too, where none were named.

        Raises:
            InputError: it can't, its scores are not (N, classes), or they depend on more than the image.
        """
        if reason := self.refusal(side, side):
            raise InputError(
                f"the classifier can't read images of {side}x{side} pixels ({key}): set transformations.resize_size, "
                f"train_crop_size and val_crop_size to the size that it was made for, such as 224 ({reason})"
            )
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, side, side, generator=generator).to(self.mean)
        before = self.fingerprint()
        scores = self(images)
        if not isinstance(scores, Tensor) or scores.shape != (2, len(self.class_names)):
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"the classifier's scores on 2 images are {found}, expected [2, {len(self.class_names)}]: one tensor "
                "of as many scores as there are class names; wrap the network so that it gives that"
            )
        again = torch.cat([self(images[:1]), self(images[1:])])
        if self.fingerprint() != before or (again - scores).norm() > 1e-3 * scores.norm():
            raise InputError(
                "the classifier changes in evaluation mode (its scores on an image depend on earlier calls, on the "
                "other images, or on chance): it has to be a fixed function; look for dropout, or for BatchNorm "
                "without running statistics"
            )
        if not self.maps:
            self.watch(layers_of_maps(self, images))

    def fingerprint(self) -> str:
        """The first 16 digits of a SHA-256 of its weights and buffers."""
        sha256 = hashlib.sha256()
        for tensor in self.state_dict().values():
            sha256.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return sha256.hexdigest()[:16]

    def train(self, mode: bool = True) -> "FrozenClassifier":
        """Stays in evaluation mode, whatever is asked: BatchNorm statistics that drift would change the teacher."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) float in [0,1] -> logits (N, classes)."""
        logits = self.network_in_use()((images - self.mean) / self.std)
        self.seen.clear()
        return logits

    @torch.no_grad()
    def read(self, image: Image.Image | Tensor, side: int = 256, top: int = 5) -> list[tuple[str, float]]:
        """What an image shows: the `top` likeliest classes, (label, probability) each.

        `image` is a PIL image, (3,H,W) or (1,3,H,W) float in [0,1]; its shorter side is resized to `side` pixels.
        """
        images = to_tensor(image) if isinstance(image, Image.Image) else image.reshape(1, 3, *image.shape[-2:])
        resized = Scaler(side, antialias=True)(images.to(self.mean.device)).clamp(0, 1)
        best = self(resized)[0].float().softmax(0).topk(min(top, len(self.labels)))
        return [(self.labels[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def look(self, images: Tensor) -> Look:
        """(N,3,H,W) float in [0,1] -> logits, the last layer's input and the maps, float32."""
        logits = self.network_in_use()((images - self.mean) / self.std)
        maps = tuple(at_least_float32(self.seen[name]) for name in self.maps)
        features = at_least_float32(self.seen["head"]).flatten(1)
        self.seen.clear()
        return Look(at_least_float32(logits), features, maps)


# What a classifier has to be


def checked_class_names(names: Sequence[str] | dict) -> list[str]:
    """Names in the order of the scores; from a dictionary of indices to names or of names to indices, too."""
    if isinstance(names, dict):
        pairs = [(i, n) for n, i in names.items()] if all(is_index(i) for i in names.values()) else list(names.items())
        if sorted(str(i) for i, _ in pairs) != sorted(map(str, range(len(pairs)))):
            raise InputError("class_names: a dictionary has to number its classes 0, 1, 2, ... in the order of scores")
        names = [name for _, name in sorted((int(i), name) for i, name in pairs)]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise InputError("class_names: expected a list of names (texts), in the order of the classifier's scores")
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(f"class_names: {twice!r} stands twice; every class needs a name of its own")
    if len(names) < 2:
        raise InputError(
            "the classifier gives one score: there is nothing to choose between. For a binary network that was trained "
            "with a sigmoid wrap it so that it gives two, torch.cat((-score, score), 1) / 2, and name both classes"
        )
    return list(names)


def is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def checked_normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, (3,) float64 each."""
    try:
        pair = tuple(torch.as_tensor(values, dtype=torch.float64).flatten() for values in (mean, std))
        fits = all(values.shape == (3,) and values.isfinite().all() for values in pair) and bool(pair[1].min() > 0)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"mean and std have to be three numbers each, std over 0; found {(mean, std)}"[:300])
    if pair[0].abs().max() > 2 or pair[1].max() > 2:
        raise InputError(
            f"mean {list(mean)} and std {list(std)} are for pixels from 0 to 255; here images are in [0,1]: divide "
            "both by 255"
        )
    return pair


def layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in network.named_modules() if known]
        raise InputError(f"the classifier has no layer {name!r}; it has {', '.join(known[:8])}, ...") from None


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the layer that gives the scores: in nearly every classifier the one that is defined last."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "aux" not in n]
    if not layers:
        raise InputError("the classifier has no linear layer and no convolution: name the layer of its scores as head")
    return layers[-1]


@torch.no_grad()
def layers_of_maps(classifier: FrozenClassifier, images: Tensor) -> list[str]:
    """For each of MAP_STRIDES the layer that gives the map with which the next stage starts, where there is one.

    A transformer keeps one size: the blocks at the quarters of its depth stand in for the strides.
    """
    side, outputs = images.shape[-1], []  # (layer, its input, its output), inner layers first

    def stride(x: object) -> int | None:
        if not isinstance(x, Tensor) or x.ndim != 4:
            return None
        sides = x.shape[2:] if x.shape[2] == x.shape[3] else x.shape[1:3]  # the second is Swin's order
        return 2 ** round(math.log2(side / sides[0])) if sides[0] == sides[1] else None

    def note(name: str, inputs: tuple, out: object) -> None:
        outputs.append((name, inputs[0] if inputs else None, out))

    hooks = [m.register_forward_hook(lambda _, i, o, n=n: note(n, i, o)) for n, m in classifier.network.named_modules()]
    try:
        classifier(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    chosen = []
    for wanted in MAP_STRIDES:
        starts = [x for _, x, out in outputs if stride(x) == wanted and stride(out) == 2 * wanted][-1:]
        layers = [name for name, _, out in outputs if any(out is x for x in starts)]
        layers = layers or [name for name, _, out in outputs if name and stride(out) == wanted]
        chosen += layers[-1:]
    if len(chosen) >= 2:
        return chosen
    siblings: dict[str, list[str]] = {}
    for name, _, out in outputs:
        if isinstance(out, Tensor) and out.ndim == 3 and name:
            siblings.setdefault(name.rpartition(".")[0], []).append(name)
    blocks = max(siblings.values(), key=len, default=[])
    return [blocks[len(blocks) * (i + 1) // 4 - 1] for i in range(4)] if len(blocks) >= 4 else chosen


# Where classifiers come from


def open_classifier(
    architecture: str = "resnet50",
    weights: str | None = "IMAGENET1K_V1",
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
        InputError: unknown architecture or weights, no network, a file that does not fit.
    """
    if architecture.startswith("timm/"):
        network, noted = from_timm(architecture, weights)
    elif ".py:" in architecture:
        network, noted = from_file(architecture, weights)
    else:
        network, noted = from_torchvision(architecture, weights)
    names = noted.get("class_names")
    if names is None:
        names = default_class_names(network, head, weights or architecture)
    mean = mean if mean is not None else noted.get("mean", IMAGENET_MEAN)
    std = std if std is not None else noted.get("std", IMAGENET_STD)
    try:
        return FrozenClassifier(network, names, mean, std, head=head, maps=maps)
    except InputError as error:
        raise InputError(f"{weights or architecture}: {error}") from None


def default_class_names(network: nn.Module, head: str | None, source: str) -> list[str]:
    """ImageNet's class names, where the last layer has 1000 scores."""
    last = layer(network, head) if head else head_of(network)[1]
    scores = getattr(last, "out_features", getattr(last, "out_channels", None))
    if scores is not None and scores != 1000:
        raise InputError(
            f"{source}: gives {scores} scores and does not name them: store class_names with the weights "
            "(models.classifier.save_classifier), or set CLASS_NAMES in FILE.py"
        )
    return list(imagenet_labels())


def from_torchvision(architecture: str, weights: str | None) -> tuple[nn.Module, dict]:
    published = published_weights(architecture)
    if weights in published:
        entry = published[weights]
        network = download(architecture, entry)
        return network, {"mean": entry.transforms().mean, "std": entry.transforms().std}
    if weights is None or not is_file_name(weights):
        raise InputError(
            f"classifier.weights: {weights!r} is neither a file nor one of torchvision's for {architecture} "
            f"({', '.join(published)})"
        )
    contents, state = read_classifier_file(architecture, weights)
    options = {"num_classes": head_size(architecture, state, weights)}
    network = get_model(architecture, weights=None, **options, **quick(architecture))
    if hasattr(network, "aux_logits") and not any(key.startswith(("aux", "AuxLogits")) for key in state):
        network = get_model(architecture, weights=None, **options, **quick(architecture), aux_logits=False)
    load_strictly(network, state, weights)
    if hasattr(network, "transform_input"):
        if "transform_input" not in contents:
            print(
                f"{weights}: does not say whether its {architecture} transforms its input (torchvision's published "
                "weights do); taken as: no. models.classifier.save_classifier(network, ...) notes it"
            )
        network.transform_input = bool(contents.get("transform_input", False))
    return network, contents


def quick(architecture: str) -> dict:
    """Options that leave out an initialisation which the weights replace: minutes for some architectures."""
    return {"init_weights": False} if architecture in ("googlenet", "inception_v3") else {}


def from_timm(architecture: str, weights: str | None) -> tuple[nn.Module, dict]:
    try:
        import timm
    except ImportError:
        raise InputError(f"classifier.architecture: {architecture} needs timm: pip install timm") from None
    name = architecture.removeprefix("timm/")
    if not timm.is_model(name):
        raise InputError(f"classifier.architecture: timm has no model named {name!r}")
    if weights is not None and is_file_name(weights):
        contents, state = read_classifier_file(architecture, weights)
        network = timm.create_model(name, pretrained=False, num_classes=timm_classes(timm, name, state))
        load_strictly(network, state, weights)
    elif weights == "pretrained":
        contents = {}
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:  # of as many kinds as there are ways to be without a network
            reason = (str(error).splitlines() or ["no network"])[0]
            raise InputError(
                f"the weights of {architecture} can't be downloaded ({reason}): "
                "get them where there is a network, and name the file in classifier.weights"
            ) from None
    else:
        raise InputError(f"classifier.weights: {weights!r} is no file; for {architecture} name one, or 'pretrained'")
    data = timm.data.resolve_model_data_config(network)
    return network, {"mean": data["mean"], "std": data["std"]} | contents


def timm_classes(timm, name: str, state: dict[str, Tensor]) -> int:
    """Number of classes, read from the weights of the layer that timm calls its classifier."""
    config = timm.models.get_pretrained_cfg(name)
    tensor = state.get(f"{config.classifier if config else 'classifier'}.weight")
    return tensor.shape[0] if tensor is not None and tensor.ndim else 1000


def from_file(architecture: str, weights: str | None) -> tuple[nn.Module, dict]:
    path, _, function = architecture.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"classifier.architecture: {path}: no such file; expected FILE.py:FUNCTION")
    try:
        spec = importlib.util.spec_from_file_location(f"classifier_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        network = make() if callable(make) else None
    except Exception as error:  # the user's own code
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{architecture}: its code failed ({type(error).__name__}: {reason})") from None
    if not callable(make):
        raise InputError(f"classifier.architecture: {path} has no function {function!r}")
    if not isinstance(network, nn.Module):
        raise InputError(f"{architecture}: returned a {type(network).__name__}, expected a torch.nn.Module")
    noted = {key: getattr(module, key.upper()) for key in NOTED if hasattr(module, key.upper())}
    if weights is None:
        return network, noted
    if not is_file_name(weights):
        raise InputError(
            f"classifier.weights: {weights!r} is no file; null takes the network as {architecture} gives it"
        )
    contents, state = read_classifier_file(architecture, weights)
    load_strictly(network, state, weights)
    return network, noted | contents


NOTED = ("class_names", "mean", "std")  # beside the weights, or in capitals in FILE.py


def is_file_name(weights: str) -> bool:
    return bool(Path(weights).suffix) or Path(weights).exists()


def read_classifier_file(architecture: str, path: str) -> tuple[dict, dict[str, Tensor]]:
    """What stands beside the weights in a file, and the weights.

    Raises:
        InputError: no weights, or those of another architecture.
    """
    contents = load_file(path)
    state = unwrap(contents, path)
    if not isinstance(contents, dict) or not any(isinstance(value, dict) for value in contents.values()):
        return {}, state  # weights alone: what is called mean or std there is a buffer of the network's
    noted = contents.get("architecture", architecture)
    if noted != architecture:
        raise InputError(f"{path}: holds a {noted}; classifier.architecture says {architecture}")
    return {key: contents[key] for key in (*NOTED, "transform_input") if key in contents}, state


def published_weights(architecture: str) -> dict:
    """torchvision's weights of an architecture, by their names.

    Raises:
        InputError: torchvision has no such classifier.
    """
    if architecture not in list_models(module=torchvision.models):
        raise InputError(
            f"classifier.architecture: torchvision has no classifier named {architecture!r}; others are named "
            "timm/NAME or FILE.py:FUNCTION"
        )
    return {entry.name: entry for entry in get_model_weights(architecture)}


def download(architecture: str, entry) -> nn.Module:
    """torchvision's classifier and its published weights: downloaded once, checked against the hash in their name.

    torchvision itself reads a file that lies there already as it is, and would run code inside it.
    """
    name = entry.url.rsplit("/", 1)[-1]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        if not (folder / name).is_file():
            entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        load_file(folder / name)
        refuse_other_file(folder / name, name.rpartition("-")[2].removesuffix(".pth"))
        return get_model(architecture, weights=entry)
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"the weights of {architecture} can't be downloaded ({str(error).splitlines()[0]}): "
            f"put the file {name} into {folder}, or name a file of your own in classifier.weights"
        ) from None


def head_size(architecture: str, state: dict[str, Tensor], path: str) -> int:
    """Number of classes, read from the weights of the last layer."""
    with torch.device("meta"):
        key = f"{head_of(get_model(architecture, weights=None, **quick(architecture)))[0]}.weight"
    if key not in state:
        raise InputError(f"{path}: {key} is missing; are these weights of a {architecture} (classifier.architecture)?")
    if state[key].ndim < 2:
        raise InputError(f"{path}: {key} is {list(state[key].shape)}, no layer's weights")
    return state[key].shape[0]


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
    """Writes what `open_classifier` reads: weights, class names in the order of the scores, and the normalisation of
    the training (per channel, of images in [0,1]).

    `network` may be a state dict; the network itself also says what a state dict does not (GoogLeNet's and Inception's
    transform_input). `architecture` is noted if it is given: torchvision's name, timm/NAME or FILE.py:FUNCTION; so is
    what the classifier was trained for (see models.weights.trained_for).

    Raises:
        InputError: class names or a normalisation that `FrozenClassifier` would refuse.
    """
    mean, std = (values.tolist() for values in checked_normalisation(mean, std))
    contents = {"class_names": checked_class_names(class_names), "mean": mean, "std": std}
    if architecture is not None:
        contents["architecture"] = architecture
    if trained_for is not None:
        contents["trained_for"] = trained_for
    if isinstance(network, nn.Module):
        if hasattr(network, "transform_input"):
            contents["transform_input"] = bool(network.transform_input)
        network = network.state_dict()
    save_file(contents | {"state_dict": network}, path)


def noted_architecture(path: str | Path) -> str | None:
    """The architecture that `save_classifier` noted in a file, if it did."""
    contents = load_file(path)
    return contents.get("architecture") if isinstance(contents, dict) else None
