"""FrozenClassifier: the teacher of the distillation. It normalises its own input and never changes."""

import hashlib
import json
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from models.errors import InputError
from models.fast import fold
from models.weights import load_file, load_strictly, refuse_other_file, save_file, unwrap

LABELS_FILE = Path(__file__).parent.parent / "assets" / "labels.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the training images, as in every torchvision recipe
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_labels() -> dict[str, str]:
    """WordNet id -> readable name of ImageNet's 1000 classes, in the order of the classifiers' scores."""
    return dict(json.loads(LABELS_FILE.read_text(encoding="utf-8")).values())


class FrozenClassifier(nn.Module):
    """Any torchvision classifier by name, frozen: (N,3,H,W) in [0,1] -> logits (N, classes).

    Args:
        architecture: a name that `torchvision.models.get_model` knows.
        weights: the name of torchvision's weights (IMAGENET1K_V1), or a file: a state dict, or a dictionary of
            `state_dict`, `class_names` and, where they are not ImageNet's, `mean` and `std` (see `save_classifier`).

    Attributes:
        class_names: folder names of the classes (ImageNet: WordNet ids), in the order of the scores.
        labels: the names to show.

    Raises:
        InputError: unknown architecture or weights, no network, a file that does not fit.
    """

    def __init__(self, architecture: str = "resnet50", weights: str = "IMAGENET1K_V1"):
        super().__init__()
        published = published_weights(architecture)
        if weights in published:
            entry = published[weights]
            self.network = download(architecture, entry)
            mean, std = entry.transforms().mean, entry.transforms().std
            self.class_names = list(imagenet_labels())
        elif Path(weights).suffix or Path(weights).exists():
            contents = load_file(weights)
            state = unwrap(contents, weights)
            noted = contents.get("architecture", architecture)
            if noted != architecture:
                raise InputError(f"{weights}: holds a {noted}; classifier.architecture says {architecture}")
            classes = head_size(architecture, state, weights)
            self.network = get_model(architecture, weights=None, num_classes=classes)
            load_strictly(self.network, state, weights)
            self.class_names = own_class_names(contents, classes, weights)
            mean, std = own_normalisation(contents, weights)
        else:
            raise InputError(
                f"classifier.weights: {weights!r} is neither a file nor one of torchvision's for {architecture} "
                f"({', '.join(published)})"
            )
        readable = imagenet_labels()
        self.labels = [readable.get(name, name) for name in self.class_names]
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.folded: dict[torch.dtype, nn.Module | None] = {}  # no part of the state: made of it, dropped with it
        self.requires_grad_(False)
        self.train(False)

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
            device = self.mean.device.type
            self.folded[dtype] = fold(self.network, dtype, device, head_of(self.network)[0])

    def network_in_use(self) -> nn.Module:
        """The network itself, or its folded copy where autocast lowers the precision anyway."""
        device = self.mean.device.type
        if not torch.is_autocast_enabled(device) or self.mean.dtype != torch.float32:
            return self.network
        dtype = torch.get_autocast_dtype(device)
        if not torch.compiler.is_compiling():
            self.fold(dtype)
        return self.folded.get(dtype) or self.network

    @torch.no_grad()
    def reads(self, height: int, width: int) -> bool:
        """Whether it takes images of this size: some architectures want one size, others can't read small ones."""
        try:
            self.network(self.mean.new_zeros(1, 3, height, width))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # each architecture has its own way of refusing
            return False
        return True

    def require(self, side: int, key: str) -> None:
        """Raises InputError where it can't read images of `side` x `side` pixels, the value of the parameter `key`."""
        if not self.reads(side, side):
            raise InputError(
                f"the classifier can't read images of {side}x{side} pixels ({key}): set transformations.resize_size, "
                "train_crop_size and val_crop_size to the size that it was made for, such as 224"
            )

    def fingerprint(self) -> str:
        """The first 16 digits of a SHA-256 of its weights and buffers."""
        sha256 = hashlib.sha256()
        for tensor in self.state_dict().values():
            sha256.update(tensor.cpu().contiguous().numpy())
        return sha256.hexdigest()[:16]

    def train(self, mode: bool = True) -> "FrozenClassifier":
        """Stays in evaluation mode, whatever is asked: BatchNorm statistics that drift would change the teacher."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) float in [0,1] -> logits (N, classes)."""
        return self.network_in_use()((images - self.mean) / self.std)

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N,3,H,W) float in [0,1] -> logits (N, classes) and the last layer's input, (N, features)."""
        seen = []
        head = self.network_in_use().get_submodule(head_of(self.network)[0])
        hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = self(images)
        finally:
            hook.remove()
        return logits, seen[0].flatten(1)


def published_weights(architecture: str) -> dict:
    """torchvision's weights of an architecture, by their names.

    Raises:
        InputError: torchvision has no such classifier.
    """
    if architecture not in list_models(module=torchvision.models):
        raise InputError(f"classifier.architecture: torchvision has no classifier named {architecture!r}")
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


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the layer that gives the scores: torchvision defines it last in every classifier."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return layers[-1]


def head_size(architecture: str, state: dict[str, Tensor], path: str) -> int:
    """Number of classes, read from the weights of the last layer."""
    with torch.device("meta"):
        key = f"{head_of(get_model(architecture, weights=None))[0]}.weight"
    if key not in state:
        raise InputError(f"{path}: {key} is missing; are these weights of a {architecture} (classifier.architecture)?")
    if state[key].ndim < 2:
        raise InputError(f"{path}: {key} is {list(state[key].shape)}, no layer's weights")
    return state[key].shape[0]


def own_class_names(contents: dict, classes: int, path: str) -> list[str]:
    """The class names stored beside the weights; ImageNet's for 1000 classes without names."""
    names = contents.get("class_names")
    if names is None and classes == 1000:
        return list(imagenet_labels())
    if not isinstance(names, list) or len(names) != classes or len(set(map(str, names))) != classes:
        raise InputError(f"{path}: class_names has to list the {classes} names of its classes, each once")
    return [str(name) for name in names]


def own_normalisation(contents: dict, path: str) -> tuple[list[float], list[float]]:
    """The mean and standard deviation stored beside the weights; ImageNet's where there are none."""
    found = contents.get("mean", IMAGENET_MEAN), contents.get("std", IMAGENET_STD)
    try:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in found)
        fits = mean.shape == std.shape == (3,) and bool(
            mean.isfinite().all() and std.isfinite().all() and std.min() > 0
        )
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"{path}: mean and std have to be three numbers each, std over 0; found {found}"[:300])
    return mean.tolist(), std.tolist()


def save_classifier(
    state_dict: dict[str, Tensor],
    class_names: list[str],
    path: str | Path,
    *,
    architecture: str | None = None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> None:
    """Writes what `FrozenClassifier` reads: a state dict, the class names in the order of the scores, the
    normalisation of the training (per channel, of images in [0,1]) and torchvision's name of the architecture.
    """
    contents = {"class_names": list(class_names), "mean": list(mean), "std": list(std)}
    if architecture is not None:
        contents["architecture"] = architecture
    save_file(contents | {"state_dict": state_dict}, path)


def noted_architecture(path: str | Path) -> str | None:
    """The architecture that `save_classifier` noted in a file, if it did."""
    contents = load_file(path)
    return contents.get("architecture") if isinstance(contents, dict) else None
