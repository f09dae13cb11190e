"""Any JSON in any place of parameters.json and any --set: valid parameters, or one line."""

import json
import os

import pytest
from conftest import ROOT, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment.parameters import read_parameters
from models.errors import InputError

SOAK = os.environ.get("SOAK") == "1"
many = settings(
    max_examples=20_000 if SOAK else 400,
    deadline=None,
    derandomize=not SOAK,  # `make test` is the same every time, a soak looks elsewhere
    database=None,
    suppress_health_check=list(HealthCheck),
)
DEFAULTS = json.loads((ROOT / "parameters.json").read_text())


def places(values: object, path: tuple = ()) -> list[tuple]:
    """The key path of every value and section, the file itself included."""
    inner = values.items() if isinstance(values, dict) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


PLACES = st.sampled_from(places(DEFAULTS))
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 10**400, 1e-320, 1e308, 0.32])
WORDS = ["", "a\nb", "\x00", "\ud800", "\x1b[2J", "null", "x" * 5000, "auto", "bilinear", "cosine", "resnet50"]
TEXTS = st.text() | st.text(st.characters()) | st.sampled_from(WORDS)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = TEXTS | st.sampled_from(sorted({key for place in places(DEFAULTS) for key in place}))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
PATHS = PLACES.map(".".join) | TEXTS
JSON = VALUES.map(json.dumps)
SETTINGS = TEXTS | st.tuples(PATHS, TEXTS | JSON).map("=".join)
SETTINGS |= st.tuples(PATHS, TEXTS, JSON).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}")


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """Calls accepted(file, *settings): whether these are valid parameters; if they are not, there is one line."""
    path = tmp_path_factory.mktemp("fuzz") / "any.json"

    def call(file: object, *arguments: str) -> bool:
        path.write_bytes(file if isinstance(file, bytes) else json.dumps(file).encode())
        try:
            parameters = read_parameters(path, arguments)
        except InputError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 1000, ascii(message)
            return False
        path.write_text(json.dumps(parameters.model_dump(), allow_nan=False))  # as a run does, which resumes from them
        assert read_parameters(path) == parameters
        return True

    return call


def with_value(place: tuple, change) -> object:
    """The defaults with change(value) in place of one value."""
    if not place:
        return change(DEFAULTS)
    values = section = json.loads(json.dumps(DEFAULTS))
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = change(section[place[-1]])
    return values


@many
@given(place=PLACES, value=VALUES)
def test_any_value_in_any_place(accepted, place, value):
    accepted(with_value(place, lambda _: value))


@many
@given(place=PLACES, key=KEYS, value=SCALARS)
def test_any_key_in_any_section(accepted, place, key, value):
    accepted(with_value(place, lambda old: (old if isinstance(old, dict) else {}) | {key: value}))


@many
@given(contents=st.binary() | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_the_file(accepted, contents):
    accepted(contents)


@many
@given(data=st.data())
def test_any_damage_to_the_file(accepted, data):
    """Pieces of the real file cut out or put elsewhere: JSON that is nearly right."""
    text = json.dumps(DEFAULTS)
    for _ in range(data.draw(st.integers(1, 3))):
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        piece = data.draw(st.sampled_from(["", "1e999", "NaN", "{", "]", '"', ",", "null", text[a:b] * 2]))
        text = text[:a] + piece + text[b:]
    accepted(text.encode())


@many
@given(arguments=st.lists(SETTINGS, min_size=1, max_size=3))
def test_any_settings(accepted, arguments):
    accepted({}, *arguments)


@pytest.mark.parametrize("depth", [500, 900, 990, 5000, 100_000])
def test_depths_that_no_one_types(accepted, depth):
    assert not accepted(b'{"training": ' + b"[" * depth + b"]" * depth + b"}")
    assert not accepted(b'{"training": {"epochs": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}}")
    assert not accepted({}, ".".join(["training", *"a" * depth]) + "=1")
    assert not accepted({}, "training.epochs=" + "[" * depth)


def test_every_valid_value_is_reached(accepted):
    """Values that are right are accepted."""
    for section, values in DEFAULTS.items():
        for key, value in values.items():
            assert accepted({section: {key: value}}) and accepted({}, f"{section}.{key}={json.dumps(value)}")


def test_command_lines_of_a_script(start, tmp_path, monkeypatch):
    """The sampler, the quickest script: whatever is typed, one line and exit 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.json").write_text("{}")
    lines = [["--set"], ["--set", "a\nb"], ["--set", "training.a\nb=1"], ["--set", "data.seed=\x1b[2J"]]
    lines += [["--parameters", "no\nsuch\x07file"], ["--parameters", "."], ["--parameters", ""], ["--no-such\noption"]]
    lines += [["--se", "x"], ["extra\n", "words"], ["--set=data.train=\udce9"], ["--set", "=" * 3000]]
    lines += [["--parameters", "parameters.json", "--set", "data.seed=1", "--set", "data.seed"]]
    for arguments in lines:
        result = start("img_sampler_train", *arguments)
        one_line(result, "img_sampler_train")
        assert result.err.strip().isprintable() and len(result.err) < 2500
