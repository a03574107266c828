"""What OpenVINO does to the process: it reports nothing, forks nothing, and leaves signals working."""

import subprocess
import sys

import pytest

from flawstream.engines.openvino.compile import openvino_is_installed

pytestmark = pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")

_CONVERSION = """
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

_GRAPHS_COME_AND_GO = """
import signal
import numpy as np
import openvino
import openvino.opset13 as opset
from flawstream.engines.openvino.compile import CompiledGraph

def compiled():
    values = opset.parameter([-1, 3], np.float32)
    return CompiledGraph(openvino.Model([opset.relu(values)], [values], "relu"))

first, second = compiled(), compiled()
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("drained"))
signal.raise_signal(signal.SIGTERM)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)  # noqa: S603 - our own interpreter


def test_conversion_reports_nothing_and_forks_nothing() -> None:
    ran = run(_CONVERSION)
    assert ran.stdout.split() == ["openvino.tools.ovc.telemetry_stub"], ran.stderr


def test_signal_after_graphs_have_come_and_gone_is_handled() -> None:
    ran = run(_GRAPHS_COME_AND_GO)
    assert (ran.returncode, ran.stdout) == (0, "drained\n"), ran.stderr
