"""The README's first picture, and its lines of Python."""

import ast
import re

import pytest
import torch
from conftest import ROOT, draw
from PIL import Image

from models.rrdbnet import RRDBNet


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
