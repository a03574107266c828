"""Conversion of torch modules to ncnn graphs. ncnn is fast at 3x3 convolutions, as it has Winograd's algorithm.

A backbone is converted by pnnx, once per process. A flow is converted here, layer by layer: it has few kinds of layers,
and pnnx would take seconds per category. ncnn has no batches: a graph takes one image. Knows no whitening, no scores.

Shape legend: C channels, H W height and width of a scale's grid.

Sources: Lavin, Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308); ncnn's
docs/developer-guide/operators.md and param-and-model-file-structure.md.
"""

import importlib.util
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flawstream.engines.protocol import Float32Array
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.flow import FoldedFlow
from flawstream.imaging.pixels import Pixels
from schemas.errors import ConfigError

_MAGIC = 7767517
_FLOAT32 = np.zeros(1, "<u4").tobytes()
_NO_MEMORY = -100
_SQUARE, _EXP = 4, 7
_ADD, _MULTIPLY = 0, 2
_MEAN = 3


def ncnn_is_installed() -> bool:
    """Check whether the extra `ncnn` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("ncnn", "pnnx"))


def require_ncnn() -> None:
    """Require the extra `ncnn`.

    Raises:
        ConfigError: It is not installed.
    """
    if not ncnn_is_installed():
        raise ConfigError("ncnn is not installed; pip install 'flawstream[ncnn]', or use detector.engine=auto")


def is_mostly_3x3(backbone: Backbone) -> bool:
    """Check whether dense 3x3 convolutions of stride 1, which Winograd's algorithm computes, dominate a network."""
    winograd, others = 0, 0

    def count(module: nn.Conv2d, _: object, output: Tensor) -> None:
        nonlocal winograd, others
        multiplications = module.weight.numel() * output.shape[-2] * output.shape[-1]
        if module.kernel_size == (3, 3) and module.stride == (1, 1) and module.groups == 1:
            winograd += multiplications
        else:
            others += multiplications

    hooks = [module.register_forward_hook(count) for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    side = backbone.spec.input_size
    with torch.inference_mode():
        backbone(torch.zeros((1, side, side, 3), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return winograd > others


class NcnnGraph:
    """A loaded graph at batch size 1. Thread-safe.

    Args:
        param: ncnn's file of layers.
        weights: ncnn's file of weights.
        outputs: Names of the outputs.
        threads: CPU threads for an image.
    """

    def __init__(self, param: Path, weights: Path, outputs: Sequence[str], threads: int) -> None:
        import ncnn  # noqa: PLC0415 - an optional extra

        self._ncnn = ncnn
        self._outputs = outputs
        self._net = ncnn.Net()
        options = self._net.opt
        options.use_fp16_storage = options.use_fp16_packed = options.use_fp16_arithmetic = False
        options.use_bf16_storage = False
        options.num_threads = threads  # set before loading: weights are laid out for this number
        options.use_winograd63_convolution = False  # no faster than 4x4 tiles here, less exact, twice the memory
        if self._net.load_param(str(param)) or self._net.load_model(str(weights)):
            raise ConfigError("ncnn cannot load the graph of this model; choose detector.engine=openvino or torch")

    def __call__(self, values: Float32Array) -> list[Float32Array]:
        """Run the graph.

        Args:
            values: (C, H, W) float32, contiguous.

        Returns:
            A copy of the outputs, in the order of `outputs`.

        Raises:
            MemoryError: Out of memory.
        """
        return self._run(self._ncnn.Mat(values))

    def run_on_pixels(self, image: Pixels) -> list[Float32Array]:
        """Run the graph on an (H, W, 3) contiguous image; otherwise as `__call__`."""
        if image.dtype != np.uint8:
            return self(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))
        height, width, _ = image.shape
        return self._run(self._ncnn.Mat.from_pixels(image, self._ncnn.Mat.PixelType.PIXEL_RGB, width, height))

    def _run(self, values: Any) -> list[Float32Array]:
        with self._net.create_extractor() as extractor:
            extractor.input("in0", values)
            return [self._extract(extractor, name) for name in self._outputs]

    @staticmethod
    def _extract(extractor: Any, name: str) -> Float32Array:
        status, result = extractor.extract(name)
        if status == _NO_MEMORY:
            raise MemoryError("ncnn is out of memory")
        if status:
            raise RuntimeError(f"ncnn returned status {status} for {name}")
        return np.array(result)


def backbone_graphs(backbone: Backbone, threads: Sequence[int]) -> list[NcnnGraph]:
    """Convert a backbone with pnnx, which takes seconds.

    Args:
        backbone: On the CPU. The graph includes normalisation and takes pixels in [0, 255].
        threads: CPU threads of each graph to create.

    Raises:
        ConfigError: The extra is not installed, or ncnn cannot run the network.
    """
    require_ncnn()
    import pnnx  # noqa: PLC0415 - an optional extra

    side = backbone.spec.input_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # pnnx needs TorchScript
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            example = torch.zeros((1, 3, side, side))
            torch.jit.trace(_PixelBackbone(backbone).eval(), example).save(  # type: ignore[no-untyped-call]
                str(folder / "network.pt")
            )
        converter = subprocess.run(  # noqa: S603 - the path of the pnnx package
            [pnnx.EXEC_PATH, "network.pt", f"inputshape=[1,3,{side},{side}]", "fp16=0"],
            cwd=folder,
            capture_output=True,
            check=False,
        )
        param, weights = folder / "network.ncnn.param", folder / "network.ncnn.bin"
        if converter.returncode or not param.exists():
            raise ConfigError(
                f"ncnn cannot run {backbone.spec.name}: its converter exited with {converter.returncode}; "
                "choose detector.engine=openvino or torch"
            )
        outputs = [f"out{k}" for k in range(len(backbone.spec.channels))]
        return [NcnnGraph(param, weights, outputs, count) for count in threads]


class _PixelBackbone(nn.Module):
    """A backbone that takes (B, 3, S, S) float pixels: ncnn converts order and type when it reads an image."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network, self.shift, self.factor = backbone.network, backbone.shift, backbone.factor

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network((pixels - self.shift) * self.factor))


def flow_graphs(flow: FoldedFlow, threads: Sequence[int]) -> list[NcnnGraph]:
    """Convert the flow of one scale: (C, H, W) normalised features in, (H, W) grid in nats per channel out.

    Args:
        flow: The flow of one scale.
        threads: CPU threads of each graph to create.
    """
    writer = _Writer()
    passive, active = writer.layer("Slice", ["in0"], 2, f"-23300=2,{flow.halves[0]},{flow.halves[1]} 1=0")
    for step in flow.steps:
        passive, active = _write_step(writer, step, passive, active)
    (latents,) = writer.layer("Concat", [passive, active], 1, "0=0")
    (squares,) = writer.layer("UnaryOp", [latents], 1, f"0={_SQUARE}")
    writer.layer("Reduction", [squares], 1, f"0={_MEAN} 1=0 2=0.5 -23303=1,0 4=0 5=1", name="out0")
    with tempfile.TemporaryDirectory() as name:
        param, weights = Path(name) / "flow.param", Path(name) / "flow.bin"
        param.write_text(writer.text(), encoding="ascii")
        weights.write_bytes(b"".join(writer.weights))
        return [NcnnGraph(param, weights, ["out0"], count) for count in threads]


def _write_step(writer: "_Writer", step: Any, passive: str, active: str) -> tuple[str, str]:
    """Convert `FoldedStep.forward`."""
    first, _, last = step.subnet
    log_scale, shift = writer.layer(
        "Slice",
        [writer.convolution(last, writer.convolution(first, passive, relu=True))],
        2,
        f"-23300=2,{step.active},{step.active} 1=0",
    )
    (bounded,) = writer.layer("TanH", [log_scale], 1, "")
    exponent = writer.affine(torch.full_like(step.log_scale, step.clamp), step.log_scale, bounded)
    (factor,) = writer.layer("UnaryOp", [exponent], 1, f"0={_EXP}")
    (scaled,) = writer.layer("BinaryOp", [active, factor], 1, f"0={_MULTIPLY}")
    (active,) = writer.layer("BinaryOp", [scaled, shift], 1, f"0={_ADD}")
    if step.mixes:
        (both,) = writer.layer("Concat", [passive, active], 1, "0=0")
        first_half, second_half = (writer.convolution(mix, both) for mix in step.mixes)
        return first_half, second_half
    return writer.affine(step.passive_scale, step.passive_offset, passive), active


class _Writer:
    """Writes an ncnn graph. Adds a Split layer for values with several readers, as ncnn requires.

    Attributes:
        weights: Weights of all layers, in order.
    """

    def __init__(self) -> None:
        self.weights: list[bytes] = []
        self._layers: list[tuple[str, list[str], list[str], str]] = [("Input", [], ["in0"], "")]

    def layer(self, kind: str, inputs: list[str], outputs: int, parameters: str, *, name: str = "") -> list[str]:
        """Add a layer and return the names of its outputs."""
        names = [name] if name else [f"v{len(self._layers)}_{k}" for k in range(outputs)]
        self._layers.append((kind, inputs, names, parameters))
        return names

    def convolution(self, module: nn.Conv2d, value: str, *, relu: bool = False) -> str:
        """Add a convolution with padding that keeps height and width."""
        side = module.kernel_size[0]
        parameters = f"0={module.out_channels} 1={side} 4={side // 2} 5=1 6={module.weight.numel()} 9={int(relu)}"
        assert module.bias is not None  # noqa: S101 - folded layers have a bias
        self.weights += [_FLOAT32, _bytes(module.weight), _bytes(module.bias)]
        return self.layer("Convolution", [value], 1, parameters)[0]

    def affine(self, factor: Tensor, offset: Tensor, value: str) -> str:
        """Add a factor and an offset per channel."""
        self.weights += [_bytes(factor), _bytes(offset)]
        return self.layer("Scale", [value], 1, f"0={factor.numel()} 1=1")[0]

    def text(self) -> str:
        """Return the content of the param file."""
        readers: dict[str, int] = {}
        for _, inputs, _, _ in self._layers:
            for value in inputs:
                readers[value] = readers.get(value, 0) + 1
        lines: list[str] = []
        values, uses = 0, dict.fromkeys(readers, 0)
        for kind, inputs, outputs, parameters in self._layers:
            input_names = []
            for value in inputs:
                input_names.append(f"{value}_r{uses[value]}" if readers[value] > 1 else value)
                uses[value] += 1
            lines.append(_line(kind, len(lines), input_names, outputs, parameters))
            values += len(outputs)
            for value in outputs:
                if readers.get(value, 0) > 1:
                    copies = [f"{value}_r{k}" for k in range(readers[value])]
                    lines.append(_line("Split", len(lines), [value], copies, ""))
                    values += len(copies)
        return "\n".join([str(_MAGIC), f"{len(lines)} {values}", *lines, ""])


def _line(kind: str, number: int, inputs: list[str], outputs: list[str], parameters: str) -> str:
    return " ".join([kind, f"layer{number}", str(len(inputs)), str(len(outputs)), *inputs, *outputs, parameters])


def _bytes(tensor: Tensor) -> bytes:
    values: bytes = tensor.detach().numpy().astype("<f4").tobytes()
    return values
