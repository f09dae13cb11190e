"""The demo's clock, the README's first picture, and its lines of Python."""

import ast
import re
import time

import pytest
import torch
from conftest import ROOT, draw
from PIL import Image

from models.rrdbnet import RRDBNet


def test_the_clock_learns_from_the_steps(start, monkeypatch, tmp_path):
    """A machine that needs 0.1 s a training step; then it proves half as fast."""
    from examples.shapes import clock

    now = [1000.0]
    monkeypatch.setattr(clock, "CLOCK", tmp_path / "output" / "clock.json")
    monkeypatch.setattr(clock, "STEPS", {"a": (100, 0), "b": (1150, 5), "c": (1800, 0), "d": (500, 10)})
    monkeypatch.setattr(clock, "seconds_of_a_step", lambda runtime: 0.1)
    monkeypatch.setattr(time, "time", lambda: now[0])
    said = []
    monkeypatch.setattr("builtins.print", lambda text, **options: said.append(text))
    for number, moment in ((1, 0), (2, 10), (3, 260), (4, 620)):
        now[0] = 1000.0 + moment
        monkeypatch.setattr("sys.argv", ["clock.py", str(number)])
        clock.main()
    minutes = [re.findall(r"about (\d+) min|(less) than", text) for text in said]
    assert [[a or b for a, b in found] for found in minutes] == [
        ["less", "6", "6"],  # 10 + 120 + 180 + 60 seconds
        ["2", "6", "6"],
        ["6", "12", "8"],  # twice as long as thought: 260 of 130 seconds
        ["2", "12", "2"],
    ]


def test_a_step_of_the_clock_is_measured():
    from examples.shapes.clock import seconds_of_a_step
    from experiment.runtime import start_runtime

    assert 0 < seconds_of_a_step(start_runtime("auto")) < 4


def test_the_first_picture(tmp_path, monkeypatch):
    from examples.photographs import story
    from experiment import plots

    torch.manual_seed(0)
    torch.save(RRDBNet(8, 1, 4).state_dict(), tmp_path / "D.pt")
    drawn = {}
    monkeypatch.setattr(plots, "image_grid", lambda *arguments: drawn.update(zip("ctpn", arguments, strict=True)))
    arguments = ["story.py", "--set", f"darionet.weights={tmp_path / 'D.pt'}", "--esrgan", str(tmp_path / "D.pt")]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.chdir(ROOT)
    assert story.main() == 0
    assert list(drawn["c"]) == ["Original", "Small", "Bilinear", "Real-ESRGAN", "DarioNet"]
    assert all(len(images) == 4 for images in drawn["c"].values())
    assert all(re.fullmatch(r"Photograph: .+, CC BY 2\.0, .*flickr\.com/\S+", note) for note in drawn["n"])
    colours = [row[0][1] for row in drawn["t"]]  # of the originals, which the classifier reads mostly
    assert colours.count(plots.GOOD) >= 3


def test_the_lines_of_python_in_the_readme(tmp_path, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([one for one in ast.parse(lines).body if not isinstance(one, ast.ImportFrom)]) <= 5
    if not (ROOT / "assets/models/DarioNet_photographs.pt").is_file():
        pytest.skip("the weights for photographs are not there")
    draw("discs", 1, 24).save(tmp_path / "thumbnail.png")
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    names = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert isinstance(names["rebuilt"], Image.Image) and names["rebuilt"].size == (96, 96)
    (best, *others) = eval(capsys.readouterr().out)
    assert len(others) == 4 and best[1] >= others[0][1] and isinstance(best[0], str)
