"""Short versions of the long checks in soak/ (`make soak`)."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize(
    ("script", "arguments", "counted"),
    [("killed", ["4"], "4 of 4"), ("signals", ["11"], "4 of 4"), ("torchrun", ["1"], "1 of 1")],
)
def test_a_short_version(script, arguments, counted):
    if script == "torchrun" and not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = [sys.executable, str(ROOT / "soak" / f"{script}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and counted in result.stdout, result.stdout + result.stderr
