import hashlib
import os
import pickle
import stat

import pytest
import torch

from models.darionet import build_darionet, initial_name, load_rrdbnet, note_of
from models.errors import InputError
from models.rrdbnet import RRDBNet
from models.weights import PUBLISHED, generator_size, load_file, load_generator, save_file


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return RRDBNet(8, 3, 4).state_dict()


def basicsr_names(weights: dict) -> dict:
    """The ESRGAN repository's names turned into BasicSR's, by the table of both projects."""
    top = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "upconv1": "conv_up1", "upconv2": "conv_up2"}
    top |= {"HRconv": "conv_hr"}
    renamed = {}
    for key, tensor in weights.items():
        first, rest = key.split(".", 1)
        renamed[f"{top.get(first, first)}.{rest.replace('RDB', 'rdb')}"] = tensor
    return renamed


def first_release_names(weights: dict, blocks: int) -> dict:
    top = {"conv_first": "model.0", "trunk_conv": f"model.1.sub.{blocks}", "upconv1": "model.3", "upconv2": "model.6"}
    top |= {"HRconv": "model.8", "conv_last": "model.10"}
    renamed = {}
    for key, tensor in weights.items():
        first, rest = key.split(".", 1)
        if first == "RRDB_trunk":
            index, block, conv, kind = rest.split(".")
            renamed[f"model.1.sub.{index}.{block}.{conv}.0.{kind}"] = tensor
        else:
            renamed[f"{top[first]}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("family", ["own", "basicsr", "first release"])
@pytest.mark.parametrize("wrapper", [None, "params_ema", "state_dict", "module.", "layers.0."])
def test_every_family_and_wrapper_is_read(weights, family, wrapper, tmp_path):
    stored = {"own": weights, "basicsr": basicsr_names(weights), "first release": first_release_names(weights, 3)}[
        family
    ]
    if wrapper and wrapper.endswith("."):
        stored = {wrapper + key: tensor for key, tensor in stored.items()}
    elif wrapper:
        stored = {"step": 3, "params": {"old": torch.ones(1)}, wrapper: stored}
        if wrapper != "params_ema":
            del stored["params"]
    torch.save(stored, tmp_path / "w.pth")
    network = load_rrdbnet(str(tmp_path / "w.pth"))
    assert generator_size(network.state_dict()) == (8, 3, 4)
    for key, tensor in weights.items():
        assert network.state_dict()[key].equal(tensor), key


def test_what_is_written_has_the_published_names(weights, tmp_path):
    save_file(weights, tmp_path / "out.pt")
    stored = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(stored) == list(weights)


def refused(contents, tmp_path, *parts: str, loader=load_rrdbnet) -> None:
    torch.save(contents, tmp_path / "w.pth")
    with pytest.raises(InputError) as error:
        loader(str(tmp_path / "w.pth"))
    message = str(error.value)
    assert "w.pth" in message and "\n" not in message
    for part in parts:
        assert part in message


def test_each_thing_that_can_be_wrong_is_named(weights, tmp_path):
    refused(weights | {"trunk_conv.weight": torch.ones(8, 9, 3, 3)}, tmp_path, "trunk_conv.weight is [8, 9, 3, 3]")
    refused({k: v for k, v in weights.items() if k != "HRconv.bias"}, tmp_path, "HRconv.bias is missing")
    refused(weights | {"extra.weight": torch.ones(1)}, tmp_path, "extra.weight is not a part")
    refused(weights | {"conv_last.bias": torch.tensor([0, float("nan"), 0])}, tmp_path, "conv_last.bias", "not finite")
    refused(weights | {"conv_first.weight": torch.ones(8, 12, 3, 3)}, tmp_path, "factor of 2")
    refused({"fc.weight": torch.ones(2)}, tmp_path, "not an RRDBNet", "fc.weight")
    refused([1, 2], tmp_path, "no state dict")
    refused({}, tmp_path, "no state dict")


def test_odd_state_dicts_are_refused(weights, tmp_path):
    loop: dict = {}
    loop["model"] = loop
    refused(loop, tmp_path, "no state dict")
    refused({3: torch.ones(1)}, tmp_path, "no state dict")
    first = "conv_first.weight"
    for tensor in (torch.ones(8, 3, 3, 3).to_sparse(), torch.ones(1).expand(10**6), torch.ones(3, device="meta")):
        refused(weights | {first: tensor}, tmp_path, "no state dict")
    refused(weights | {first: torch.tensor(1.0)}, tmp_path, "not an RRDBNet")
    refused(weights | {"RRDB_trunk.999999999.x": torch.ones(1)}, tmp_path, "not an RRDBNet", "1000000000 blocks")
    refused(weights | {first: torch.ones(2000, 3, 3, 3)}, tmp_path, "not an RRDBNet", "2000 features")


def test_another_file_under_a_published_name(weights, tmp_path, monkeypatch):
    torch.save(weights, tmp_path / "RealESRGAN_x4plus.pth")
    with pytest.raises(InputError, match=r"RealESRGAN_x4plus\.pth: not the file published .* not 4fa0d389"):
        load_rrdbnet(str(tmp_path / "RealESRGAN_x4plus.pth"))
    own = hashlib.sha256((tmp_path / "RealESRGAN_x4plus.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "RealESRGAN_x4plus.pth", own)
    assert load_rrdbnet(str(tmp_path / "RealESRGAN_x4plus.pth"))


def test_initial_weights_of_another_size(weights, tmp_path):
    refused(weights, tmp_path, "(8, 3, 4)", "(8, 2, 4)", loader=lambda path: build_darionet(8, 2, 4, path))


@pytest.mark.parametrize(
    "contents", [b"", b"not weights", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50)]
)
def test_files_that_are_no_weights(contents, tmp_path):
    (tmp_path / "w.pth").write_bytes(contents)
    with pytest.raises(InputError, match=r"w\.pth: not a"):
        load_file(tmp_path / "w.pth")


def test_a_truncated_file_is_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a"):
        load_generator(tmp_path / "w.pth")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_inside_a_pickle_never_runs(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"state_dict": Canary(canary)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(InputError, match="would run code"):
            load_file(tmp_path / name)
    assert not canary.exists()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()

    def no_space(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        save_file({"other": torch.ones(3)}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_saved_files_have_the_users_mode(weights, tmp_path):
    before = os.umask(0o027)
    try:
        save_file(weights, tmp_path / "w.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.pt").stat().st_mode) == 0o640


def test_names_of_the_initial_weights(tmp_path):
    path = tmp_path / "RRDB_PSNR_x4.pth"
    assert initial_name(str(path)) == "ESRGAN"
    note_of(path).write_text('{"loss": {"logits": 0, "pixels": 1, "features": 0}}')
    assert initial_name(str(path)) == "Pixels"
    note_of(path).write_text('{"loss": {"logits": 1, "pixels": 0, "features": 0}}')
    assert initial_name(str(path)) == "Initial"
