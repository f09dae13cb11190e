"""A page to play with: an image reduced, rebuilt and read, in a browser on this machine.

    python examples/web.py                       the first of the examples
    python examples/web.py my_photograph.jpg
    python examples/web.py --weights assets/logs/train_20260101-120000/best.pt

It needs gradio (pip install gradio, then pip install -r requirements.txt). The page asks no other machine for anything,
and no other machine can open it. Uploads are read and removed at once; what it shows is in a temporary folder, which is
removed at the end.
"""

import csv
import html
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

from PIL import Image
from torch import Tensor

from experiment.data import photograph, to_float
from experiment.evaluation import ask, make_pipelines
from experiment.metrics import BASELINE, ORIGINAL, SMALL
from experiment.parameters import Parameters, TransformationsSection, parameters_or_shipped
from experiment.runtime import Runtime, Stopper, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, open_classifier
from models.darionet import load_upscalers, other_input, to_device
from models.errors import InputError
from models.images import UnreadableImage, to_image
from models.pipeline import Upscale
from models.scaler import INTERPOLATIONS, Reduction, Scaler, Stored

LEAST, MOST = 2, 6  # times smaller
NO_JPEG = "no"
QUALITIES = (NO_JPEG, 90, 75, 40)
BEST = 5  # labels
LARGEST_UPLOAD = 20 * 2**20  # bytes
CLEANING = 600, 3600  # seconds: how often files are looked at, and how old they get
PHOTOGRAPHS = Path(__file__).parent / "photographs"
EXAMPLES = (  # of PHOTOGRAPHS, in the page's order
    *("01244097ca8ffdfa", "0d85e0103989c850", "444109f3ccfacc7b"),
    *("11954d93a7051cb5", "c3e9a84e039df3ce", "1733cbc68a2ae05d"),
)


class Example(NamedTuple):
    path: Path
    label: str
    credit: str  # HTML: author, page, licence


def example_photographs(labels: dict[str, str]) -> list[Example]:
    """Free photographs of classes that the classifier knows; `labels` says what it calls them, by WordNet id."""
    with (PHOTOGRAPHS / "CREDITS.tsv").open(encoding="utf-8", newline="") as file:
        credits = {row["image"]: row for row in csv.DictReader(file, dialect="excel-tab", quoting=csv.QUOTE_NONE)}
    paths = [next(PHOTOGRAPHS.glob(f"free/*/{name}.jpg")) for name in EXAMPLES]
    return [
        Example(path, labels[path.parent.name], credit(credits[path.stem]))
        for path in paths
        if path.parent.name in labels
    ]


def credit(row: dict[str, str]) -> str:
    """HTML that names the author of a row of CREDITS.tsv, and leads to the photograph's page and to its licence."""
    author, page, licence = (html.escape(row[key]) for key in ("author", "page", "licence"))
    kind = "CC " + licence.partition("/licenses/")[2].strip("/").replace("/", " ").upper()
    leave = 'style="padding: 0" target="_blank" rel="noopener noreferrer"'
    return f'<a href="{page}" {leave}>{author}</a>, <a href="{licence}" {leave}>{kind}</a>'


def way_to_reduce(times: float, interpolation: str, antialias: bool, jpeg: str | int) -> Callable[[Tensor], Tensor]:
    """Makes images `times` smaller; `jpeg` is the quality of the file that they were stored in, or NO_JPEG."""
    reduction = Reduction(1 / times, interpolation, antialias)
    return reduction if jpeg == NO_JPEG else Stored(reduction, "JPEG", int(jpeg))


class Row(NamedTuple):
    image: Image.Image
    labels: dict[str, float]  # the classifier's best labels -> probability
    size: tuple[int, int]  # width and height that the classifier read, pixels


class Networks(NamedTuple):
    """What the page asks."""

    classifier: FrozenClassifier
    upscalers: dict[str, Upscale]  # by the name of their row
    weights: list[str]  # their files
    t: TransformationsSection
    runtime: Runtime

    def load(self, path: Path) -> Tensor:
        """(1,3,H,W) in [0,1], cropped as for the test; raises UnreadableImage."""
        return to_float(photograph(path, self.t.resize_size, self.t.val_crop_size)[None], self.runtime.device)


def read_all(networks: Networks, image: Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, Row]:
    """What the classifier reads in an image (1,3,H,W) in [0,1], in what `reduce` leaves of it, and in what is rebuilt.

    Raises:
        InputError: the scores are not finite.
    """
    rows = {}
    for pipeline in make_pipelines(networks.classifier, reduce, networks.upscalers):
        name = pipeline.name
        if name == "Bicubic":
            continue
        if name == SMALL and networks.classifier.refusal(*reduce(image).shape[-2:]):
            shown, best = reduce(image), []
        else:
            _, shown, (best,) = ask(pipeline, image, networks.runtime, top=BEST)
        labels, size = {one["label"]: one["probability"] for one in best}, tuple(shown.shape[:-3:-1])
        if name == SMALL:  # every pixel as a square
            shown = Scaler(tuple(image.shape[-2:]), "nearest")(shown)
        rows[name] = Row(to_image(shown), labels, size)
    return rows


def make_page(networks: Networks, image: Tensor | None, title: str, folder: Path):
    """The page; it begins with `image` (1,3,H,W), called `title`, else with the first example.

    `folder` is where it keeps what it shows.
    """
    import gradio as gr
    from gradio.processing_utils import save_pil_to_cache

    names = [ORIGINAL, SMALL, BASELINE, *networks.upscalers]
    classifier, t = networks.classifier, networks.t
    examples = example_photographs(dict(zip(classifier.class_names, classifier.labels, strict=True)))

    def take(path: str):
        """An upload -> nothing in its place, the image, its title, what is wrong with it."""
        name = html.escape(Path(path).name)
        try:
            return None, networks.load(Path(path)), name, ""
        except UnreadableImage as error:
            reason = str(error).replace("add --small", "try_darionet.py --small reads such images")
            return None, gr.skip(), gr.skip(), f"{name}: {html.escape(reason)}"
        finally:
            Path(path).unlink(missing_ok=True)

    def example(index: int) -> tuple[Tensor, str]:
        """The image and its title."""
        _, label, author = examples[index]
        return networks.load(examples[index].path), f"{html.escape(label)}. Photograph: {author}, resized"

    def pick(event: gr.SelectData):
        """An example -> the image, its title, nothing wrong with it."""
        return *example(event.index), ""

    def show(image: Tensor | None, times: float, interpolation: str, antialias: bool, jpeg, left: str, right: str):
        """Everything below the choices."""
        if image is None:
            return [gr.skip()] * len(outputs)
        try:
            rows = read_all(networks, image, way_to_reduce(times, interpolation, antialias, jpeg))
        except InputError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        reduction = Reduction(1 / times, interpolation, antialias)
        notes = "; ".join(filter(None, (other_input(path, reduction) for path in networks.weights)))
        images = {name: row.image for name, row in rows.items()}
        pictures = []
        for name, (picture, _, (width, height)) in rows.items():
            file = re.sub(r"[^\w-]+", "_", name)  # a browser saves the picture by this name
            path = save_pil_to_cache(picture, str(folder), file, "png")
            pictures.append(gr.Image(path, label=f"{name}, {width} x {height}"))
        labels = [row.labels or None for row in rows.values()]
        return [images, html.escape(notes), (images[left], images[right]), *pictures, *labels]

    def compare(images: dict[str, Image.Image] | None, left: str, right: str):
        return (images[left], images[right]) if images else gr.skip()

    if image is None and examples:
        image, title = example(0)
    with gr.Blocks(title="DarioNet", analytics_enabled=False, delete_cache=CLEANING) as page:
        chosen, shown = gr.State(image), gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=360):
                upload = gr.File(label=f"An image, up to {LARGEST_UPLOAD >> 20} MB", height=120, elem_id="upload")
                wrong = gr.HTML(elem_id="wrong")
                first = min(max(1 / t.scale, LEAST), MOST)
                times = gr.Slider(LEAST, MOST, first, step=0.125, label="Times smaller", elem_id="times")
                with gr.Row():
                    interpolation = gr.Dropdown(list(INTERPOLATIONS), value=t.interpolation, label="Interpolation")
                    jpeg = gr.Dropdown(list(QUALITIES), value=NO_JPEG, label="Stored as JPEG")
                antialias = gr.Checkbox(t.antialias, label="Antialias")
                files = [str(one.path) for one in examples]
                options = {"columns": 3, "height": 240, "allow_preview": False, "buttons": [], "elem_id": "examples"}
                gallery = gr.Gallery(files, label="Examples", visible=bool(examples), **options)
                gr.HTML("; ".join(f"{html.escape(one.label)}: {one.credit}" for one in examples))
            with gr.Column(scale=2, min_width=400):
                heading = gr.HTML(title, elem_id="heading")
                with gr.Row():
                    left = gr.Dropdown(names, value=BASELINE, label="Left")
                    right = gr.Dropdown(names, value=names[-1], label="Right")
                options = {"format": "png", "interactive": False, "buttons": ["fullscreen"], "elem_id": "slider"}
                slider = gr.ImageSlider(label="Under the slider", **options)
                note = gr.HTML(elem_id="note")
        with gr.Row():
            pictures, labels = [], []
            for i, name in enumerate(names):
                with gr.Column(min_width=180):
                    options = {"interactive": False, "buttons": ["download", "fullscreen"], "elem_id": f"picture_{i}"}
                    pictures.append(gr.Image(label=name, **options))
                    labels.append(gr.Label(label=f"Read in {name}", show_heading=False, elem_id=f"labels_{i}"))
        outputs = [shown, note, slider, *pictures, *labels]
        arguments = show, [chosen, times, interpolation, antialias, jpeg, left, right], outputs
        options = {"api_visibility": "private", "show_progress": "minimal"}
        upload.upload(take, upload, [upload, chosen, heading, wrong], **options).then(*arguments, **options)
        gallery.select(pick, None, [chosen, heading, wrong], **options).then(*arguments, **options)
        changes = [page.load, *(choice.change for choice in (times, interpolation, antialias, jpeg))]
        gr.on(changes, *arguments, trigger_mode="always_last", **options)
        gr.on([left.change, right.change], compare, [shown, left, right], slider, **options)
    return page


def main() -> int:
    """Serves the page on this machine alone until Ctrl-C, SIGTERM or SIGHUP."""
    parser = script_parser(__doc__)
    parser.add_argument("image", nargs="?", type=Path, help="the image that the page begins with")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks (default: darionet.weights)")
    arguments = parser.parse_args()
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install gradio, then pip install -r requirements.txt")

    parameters = parameters_or_shipped(arguments.parameters, arguments.set, arguments.weights)
    networks = open_networks(parameters, arguments.weights or [parameters.darionet.weights])
    try:
        image = arguments.image and networks.load(arguments.image)
    except UnreadableImage as error:
        raise InputError(f"{arguments.image}: {error}") from None
    title = html.escape(arguments.image.name) if arguments.image else ""
    with Stopper() as stopper, tempfile.TemporaryDirectory(prefix="darionet_", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        page = make_page(networks, image, title, Path(folder))
        try:
            _, address, _ = page.queue(max_size=20).launch(
                server_name="127.0.0.1",
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=LARGEST_UPLOAD,
                allowed_paths=[str(PHOTOGRAPHS / "free")],
                footer_links=[],
            )
        except OSError as error:
            raise InputError(f"the page: {error}") from None
        print(f"{address} shows the page; Ctrl-C ends it", flush=True)
        while not stopper.requested:
            time.sleep(0.1)
        page.close(verbose=False)
    return stopper.code


def open_networks(parameters: Parameters, weights: list[str]) -> Networks:
    t, runtime = parameters.transformations, start_runtime(parameters.test.precision, parameters.test.seed)
    classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    classifier.check(t.val_crop_size, "transformations.val_crop_size")
    upscalers = load_upscalers(weights, None, runtime.device, t.interpolation, t.antialias)
    return Networks(classifier, upscalers, weights, t, runtime)


if __name__ == "__main__":
    run_script(main)
