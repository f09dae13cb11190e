"""Any JSON in any place of parameters.json and any --set: valid parameters, or one line."""

import json
import os

from conftest import ROOT, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment.parameters import Parameters, read_parameters
from models.errors import InputError

SOAK = os.environ.get("SOAK") == "1"
EXAMPLES = 20_000 if SOAK else 400
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SOAK,  # `make test` is the same every time, a soak looks elsewhere
    database=None,
    suppress_health_check=list(HealthCheck),
)
DEFAULTS = json.loads((ROOT / "parameters.json").read_text())


def places(values: dict, path: tuple = ()) -> list[tuple]:
    """The key path of every value and section, the file itself included."""
    found = [path]
    for key, value in values.items():
        found += places(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


PLACES = places(DEFAULTS)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 10**400, 1e-320, 1e308, 0.32])
TEXTS = (
    st.text()
    | st.text(st.characters())
    | st.sampled_from(["", "a\nb", "\x00", "\ud800", "\x1b[2J", "null", "x" * 5000])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["auto", "bilinear", "cosine", "resnet50"])
KNOWN = st.sampled_from(sorted({key for place in PLACES for key in place}))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KNOWN | TEXTS, inner, max_size=4),
    max_leaves=12,
)


def accepted(path, arguments: list[str] = ()) -> bool:
    """Whether these are valid parameters; where they are not, there is one printable line."""
    try:
        parameters = read_parameters(path, arguments)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and message.isprintable(), ascii(message)
        assert len(message) < 1000
        return False
    assert isinstance(parameters, Parameters)
    written = json.dumps(parameters.model_dump(), allow_nan=False)
    path.write_text(written, encoding="utf-8")  # a run writes them, and is resumed from them
    assert read_parameters(path) == parameters
    return True


def with_value(place: tuple, value: object) -> object:
    if not place:
        return value
    values = json.loads(json.dumps(DEFAULTS))
    section = values
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    return values


@many
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_in_any_place(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(with_value(place, value)), encoding="utf-8")
    accepted(path)


@many
@given(place=st.sampled_from(PLACES), key=TEXTS | KNOWN, value=SCALARS)
def test_any_key_in_any_section(tmp_path_factory, place, key, value):
    section = DEFAULTS
    for name in place:
        section = section[name]
    if not isinstance(section, dict):
        place, section = (), DEFAULTS
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(with_value(place, section | {key: value})), encoding="utf-8")
    accepted(path)


@many
@given(contents=st.binary() | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_the_file(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(contents)
    accepted(path)


@many
@given(data=st.data())
def test_any_damage_to_the_file(tmp_path_factory, data):
    """Pieces of the real file cut out or put elsewhere: JSON that is nearly right."""
    text = json.dumps(DEFAULTS)
    for _ in range(data.draw(st.integers(1, 3))):
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = (
            text[:a]
            + data.draw(st.sampled_from(["", "1e999", "NaN", "{", "]", '"', ",", "null", text[a:b] * 2]))
            + text[b:]
        )
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(text, encoding="utf-8")
    accepted(path)


KEYS = st.sampled_from([".".join(place) for place in PLACES]) | TEXTS
SETTINGS = (
    st.text()
    | TEXTS
    | st.tuples(KEYS, TEXTS).map("=".join)
    | st.tuples(KEYS, VALUES.map(json.dumps)).map("=".join)
    | st.tuples(KEYS, TEXTS, VALUES.map(json.dumps)).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}")
)


@many
@given(arguments=st.lists(SETTINGS, min_size=1, max_size=3))
def test_any_settings(tmp_path_factory, arguments):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text("{}")
    accepted(path, arguments)


def test_depths_that_no_one_types(tmp_path):
    path = tmp_path / "deep.json"
    for depth in (500, 900, 990, 5000, 100_000):
        path.write_text('{"training": ' + "[" * depth + "]" * depth + "}")
        assert not accepted(path)
        path.write_text('{"training": {"epochs": ' + '{"a": ' * depth + "1" + "}" * depth + "}}")
        assert not accepted(path)
        path.write_text("{}")
        assert not accepted(path, [".".join(["training", *"a" * depth]) + "=1"])
        assert not accepted(path, ["training.epochs=" + "[" * depth])


def test_every_valid_value_is_reached(tmp_path):
    """The property is not empty: values that are right are accepted."""
    path = tmp_path / "some.json"
    for section, values in DEFAULTS.items():
        for key, value in values.items():
            path.write_text(json.dumps({section: {key: value}}))
            assert accepted(path) and accepted(path, [f"{section}.{key}={json.dumps(value)}"])


def test_command_lines_of_a_script(start, tmp_path, monkeypatch):
    """The sampler, the quickest script: whatever is typed, one line and exit 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.json").write_text("{}")
    lines = [
        ["--set"],
        ["--set", "a\nb"],
        ["--set", "training.a\nb=1"],
        ["--set", "data.seed=\x1b[2J"],
        ["--parameters", "no\nsuch\x07file"],
        ["--parameters", "."],
        ["--parameters", ""],
        ["--no-such\noption"],
        ["--se", "x"],
        ["extra\n", "words"],
        ["--set=data.train=\udce9"],
        ["--set", "=" * 3000],
        ["--parameters", "parameters.json", "--set", "data.seed=1", "--set", "data.seed"],
    ]
    for arguments in lines:
        result = start("img_sampler_train", *arguments)
        one_line(result, "img_sampler_train")
        assert result.err.strip().isprintable() and len(result.err) < 2500
