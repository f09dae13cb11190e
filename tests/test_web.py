"""The page of examples/web.py, over its functions and in a browser."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import CLASSES, ROOT, draw, one_line
from PIL import Image

from experiment.evaluation import ask
from experiment.parameters import read_parameters
from models.images import to_image
from models.pipeline import Enlarge, Pipeline, unchanged
from models.scaler import Reduction, Stored

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

TIMEOUT = 120  # seconds: for a machine with other work


def test_without_gradio_it_says_what_to_install(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    one_line(start("examples/web"), "needs gradio: pip install gradio")


@pytest.fixture
def web():
    """examples/web.py; without gradio the test is skipped."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from examples import web

    return web


@pytest.fixture
def networks(trained, web):
    return web.open_networks(read_parameters("parameters.json"), ["DarioNet.pt"])


def read(networks, name: str, reduce, image):
    """What a row rebuilds of an image, and its best prediction."""
    restore = Enlarge("bilinear") if name == "Bilinear" else networks.upscalers[name]
    _, rebuilt, ((best,),) = ask(Pipeline(name, networks.classifier, reduce, restore), image, networks.runtime)
    return rebuilt[0], best


@pytest.mark.parametrize(("method", "antialias", "quality"), [("bicubic", True, None), ("bilinear", False, 40)])
def test_what_the_page_shows(web, networks, method, antialias, quality):
    """The pictures and labels are those of try_darionet.py without a page, for any way of reducing."""
    draw("checks", 5, 90).save("a.png")
    image, reduce = networks.load(Path("a.png")), Reduction(0.25, method, antialias)
    if quality:
        reduce = Stored(reduce, "JPEG", quality)
    rows = web.read_all(networks, image, web.way_to_reduce(4, method, antialias, quality or web.NO_JPEG))
    assert list(rows) == ["Original", "Small", "Bilinear", "DarioNet"] and rows["Small"].size == (8, 8)
    assert rows["Original"].image == to_image(image)
    assert rows["Small"].image.resize((8, 8), Image.Resampling.NEAREST) == to_image(reduce(image))
    for name in ("Bilinear", "DarioNet"):
        rebuilt, prediction = read(networks, name, reduce, image)
        assert rows[name].image == to_image(rebuilt)
        labels = rows[name].labels
        assert set(labels) == set(CLASSES) and sum(labels.values()) == pytest.approx(1, abs=1e-5)
        assert next(iter(labels)) == prediction["label"] and max(labels.values()) == prediction["probability"]


def test_a_classifier_that_reads_no_small_images(web, networks, monkeypatch):
    monkeypatch.setattr(networks.classifier, "refusal", lambda height, width: "too small")
    rows = web.read_all(networks, torch.rand(1, 3, 32, 32), Reduction(0.25))
    assert rows["Small"].labels == {} and len(rows["Bilinear"].labels) == 3


def test_examples_have_their_credits(web):
    examples = web.example_photographs({"n01820546": "lorikeet", "n02279972": "monarch"})
    assert [example.label for example in examples] == ["lorikeet", "monarch"] and examples[0].path.is_file()
    for part in ("Paul Reynolds</a>", "https://www.flickr.com/photos/bigtallguy/29072932140", "CC BY 2.0</a>"):
        assert part in examples[0].credit
    assert web.example_photographs({"discs": "discs"}) == []
    row = {"author": "<b>", "page": 'https://x/"', "licence": "https://creativecommons.org/licenses/by-sa/4.0/"}
    assert "&lt;b&gt;" in web.credit(row) and "CC BY-SA 4.0" in web.credit(row) and "x/&quot;" in web.credit(row)


@contextmanager
def served(*arguments, stop: signal.Signals = signal.SIGINT, **options):
    """The address of the page and where its files are; then it is stopped, its exit code and its folder checked."""
    command = [sys.executable, str(ROOT / "examples/web.py"), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        options |= {"env": os.environ | {"TMPDIR": folder}}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
        try:
            line = next((line for line in process.stdout if "shows the page" in line), "")
            assert line, "it did not start"
            yield line.split()[0], Path(folder)
        finally:
            process.send_signal(stop)
            code = process.wait(TIMEOUT)
        assert code == 128 + stop and not list(Path(folder).glob("darionet_*"))


@contextmanager
def browser(address: str, **options):
    """A browser's page at `address`, once it shows the first image; it asks no other machine for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(**options)
        page.set_default_timeout(TIMEOUT * 1000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#slider img")
        yield page
        chromium.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def upload(address: str, contents: bytes) -> int:
    """The status that an upload of a file ends with."""
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--b--\r\n' % contents
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        return urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", part, headers)).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_is_for_this_machine_and_gives_no_other_files(web, trained):
    draw("discs", 1, 90).save("a.png")
    with served("a.png", stop=signal.SIGTERM) as (address, folder):
        port = int(re.search(r":(\d+)/", address)[1])
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), 5)  # it would answer if the page were open to a network
        for path in ("a.png", "parameters.json"):
            with pytest.raises(urllib.error.HTTPError, match="403|404"):
                urllib.request.urlopen(f"{address}gradio_api/file={trained / path}")
        assert upload(address, bytes(1000)) == 200
        assert upload(address, bytes(web.LARGEST_UPLOAD + 1)) == 413
        assert list(folder.rglob("a.png"))


def first_labels(networks, path: str, scale: float) -> dict[str, str]:
    """What the page should show first in every row but Small."""
    image = networks.load(Path(path))
    best = {name: read(networks, name, Reduction(scale), image)[1] for name in ("Bilinear", "DarioNet")}
    best["Original"] = read(networks, "Bilinear", unchanged, image)[1]
    return {name: f"{one['label']} {round(100 * one['probability'])}%" for name, one in best.items()}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(web, networks, trained):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    draw("discs", 1, 90).save("first.png")
    draw("checks", 2, 90).save("second.png")
    (trained / "broken.png").write_bytes(b"broken")

    def has(page, name: str, text: str) -> None:
        """The first label that is read in a row, once it is there."""
        script = "([i, text]) => document.querySelector(`#labels_${i}`).innerText.replace(/\\s+/g, ' ').includes(text)"
        page.wait_for_function(script, arg=[["Original", "Small", "Bilinear", "DarioNet"].index(name), text])

    size = {"width": 1200, "height": 1000}
    with served("first.png") as (address, folder), browser(address, viewport=size) as page:
        assert page.inner_text("#heading") == "first.png"
        page.set_input_files("#upload input[type=file]", "second.png")
        page.wait_for_function("document.querySelector('#heading').innerText == 'second.png'")
        for name, text in first_labels(networks, "second.png", 0.32).items():
            has(page, name, text)
        page.fill("#times input[type=number]", "2")
        page.keyboard.press("Tab")
        page.wait_for_selector("text=Small, 16 x 16")
        for name, text in first_labels(networks, "second.png", 0.5).items():
            has(page, name, text)
        with page.expect_download() as download:
            page.click("#picture_3 a[download]")
        assert download.value.suggested_filename == "DarioNet.png"
        with Image.open(download.value.path()) as saved:
            assert (saved.format, saved.size) == ("PNG", (32, 32))
        assert not list(folder.rglob("second.png"))  # read, and removed
        page.set_input_files("#upload input[type=file]", "broken.png")
        page.wait_for_selector("text=broken.png: cannot identify image file")
        assert page.inner_text("#wrong").count("\n") == 0 and page.inner_text("#heading") == "second.png"


@pytest.mark.skipif("SCREENSHOT" not in os.environ, reason="SCREENSHOT=FILE.png makes the picture of the page")
def test_screenshot():
    """The first example, with its credit, as the shipped network rebuilds it."""
    with served(cwd=ROOT) as (address, _), browser(address, viewport={"width": 1200, "height": 800}) as page:
        page.wait_for_function("[...document.images].every(image => image.complete)")
        page.wait_for_timeout(3000)  # the bars grow
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture = picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
        picture.save(os.environ["SCREENSHOT"], optimize=True)
    assert Path(os.environ["SCREENSHOT"]).stat().st_size <= 300_000
