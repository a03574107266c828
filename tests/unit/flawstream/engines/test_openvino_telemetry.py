"""OpenVINO reports nothing of what is converted, and forks no process to do so."""

import subprocess
import sys

import pytest

from flawstream.engines.openvino.compile import openvino_is_installed

_PROGRAM = """
import os
import torch
from flawstream.engines.openvino.compile import convert

def fork():
    raise AssertionError("the conversion forks the process")

os.fork = fork
convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), [(3, 8, 8)], torch.float32)
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__)
"""


@pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")
def test_conversion_reports_nothing_and_forks_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)  # noqa: S603 - our own interpreter
    assert ran.stdout.split() == ["openvino.tools.ovc.telemetry_stub"]
