"""Weights by name, from a server on this machine that cuts connections."""

import hashlib
import io
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line

from experiment.evaluation import open_restore
from models import published
from models.darionet import build_darionet, load_upscalers, write_note
from models.errors import InputError
from models.published import published_file
from models.rrdbnet import RRDBNet
from models.scaler import Reduction
from models.weights import PUBLISHED

NAME = "RealESRGAN_x4plus"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tiny weights as NAME; `cuts` are the bytes after which a connection ends, one for each request."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = io.BytesIO()
    torch.save(RRDBNet(8, 1, 4).state_dict(), file)
    state = SimpleNamespace(contents=file.getvalue(), cuts=[], asked=[], ranges=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            state.asked.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            if start and start >= len(state.contents):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.contents) - start))
            self.end_headers()
            self.wfile.write(state.contents[start:][: state.cuts.pop(0) if state.cuts else None])

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setitem(published.URLS, NAME, f"http://127.0.0.1:{http.server_port}/{NAME}.pth")
        monkeypatch.setitem(PUBLISHED, f"{NAME}.pth", hashlib.sha256(state.contents).hexdigest())
        state.folder = tmp_path / "torch/hub/checkpoints"
        yield state
        http.shutdown()
        thread.join()


def test_downloaded_once_and_gone_on_with_where_it_was_cut(server, capsys):
    server.cuts = [1000, 500]
    network = build_darionet(8, 1, 4, NAME)
    assert server.asked == [None, "bytes=1000-", "bytes=1500-"]
    assert (server.folder / f"{NAME}.pth").read_bytes() == server.contents
    assert network.conv_first.weight.equal(torch.load(io.BytesIO(server.contents))["conv_first.weight"])
    assert [path.name for path in server.folder.iterdir()] == [f"{NAME}.pth"]
    assert NAME in capsys.readouterr().out
    path = server.folder.parent / "DarioNet.pt"
    path.write_bytes(server.contents)
    write_note(path, {"loss": {"logits": 1}})
    assert list(load_upscalers([str(path)], NAME)) == ["ESRGAN", "DarioNet"]
    enlarged = open_restore(NAME, Reduction(0.5), "cpu").network
    assert enlarged.conv_first.weight.equal(network.conv_first.weight)
    assert len(server.asked) == 3


def test_the_next_run_goes_on(server):
    server.cuts = [1000, 0]
    with pytest.raises(InputError, match="cut"):
        published_file(NAME)
    published_file(NAME)
    assert server.asked[-1] == "bytes=1000-"
    (server.folder / f"{NAME}.pth").rename(server.folder / f".{NAME}.pth.0.part")  # killed before it was renamed
    published_file(NAME)
    assert (server.folder / f"{NAME}.pth").read_bytes() == server.contents


def test_a_server_without_ranges_starts_anew(server):
    server.ranges, server.cuts = False, [1000]
    published_file(NAME)
    assert (server.folder / f"{NAME}.pth").read_bytes() == server.contents


def test_what_is_not_the_published_file_is_removed(server, monkeypatch):
    monkeypatch.setitem(PUBLISHED, f"{NAME}.pth", "0" * 64)
    with pytest.raises(InputError, match=r"not the published file .* not 00000000"):
        published_file(NAME)
    assert not list(server.folder.iterdir())


def test_without_a_network_it_says_which_file_to_put_where(start, experiment, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(experiment / "torch"))
    monkeypatch.setitem(published.URLS, NAME, "http://127.0.0.1:9/x.pth")  # nobody listens there
    folder = str(experiment / "torch/hub/checkpoints")
    refused = start("train_darionet", "--set", f"darionet.initial_weights={NAME}")
    one_line(refused, "http://127.0.0.1:9/x.pth", f"put {NAME}.pth into {folder}")
    torch.save(RRDBNet(8, 1, 4).state_dict(), "DarioNet.pt")
    evaluated = start("test", "--set", f"darionet.initial_weights={NAME}")  # needs no start
    assert evaluated.code == 0 and "Note: no row for darionet.initial_weights" in evaluated.out + evaluated.err
    for name in published.BY_HAND:
        with pytest.raises(InputError) as refused:
            build_darionet(8, 1, 4, name)
        assert "https://github.com/xinntao/ESRGAN" in str(refused.value)
        assert f"put {name}.pth into {folder}" in str(refused.value)


def test_every_name_has_its_hash():
    for name, url in published.URLS.items():
        assert url.endswith(f"/{name}.pth") and re.fullmatch("[0-9a-f]{64}", PUBLISHED[f"{name}.pth"])
