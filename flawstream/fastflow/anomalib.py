"""Import of FastFlow checkpoints of anomalib: tensors are converted to a `Backbone` and a `FastFlowHead`.

The model is inferred from the names and shapes of tensors. Knows no registry. A pickle is never executed.

Shape legend: C channels, H W height and width of a scale's grid, s a scale, k a step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawstream.fastflow.backbone import Backbone, make_network
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.weights import matches, read_state_dict
from schemas.errors import ConfigError, WeightsError, one_line
from schemas.manifest import FlowSpec
from schemas.presets import PRESETS, PresetName
from schemas.settings import ModelSettings, Resize

_PRESETS: tuple[PresetName, ...] = ("resnet18", "wide_resnet50_2", "deit", "cait")
"""The presets with the backbones of anomalib."""

ANOMALIB_BACKBONES: dict[str, dict[str, Any]] = {
    PRESETS[name].fields["backbone"]: {
        field: PRESETS[name].fields[field]
        for field in ("backbone", "strides", "blocks", "input_size")
        if field in PRESETS[name].fields
    }
    for name in _PRESETS
}
"""By timm's name of each backbone of anomalib: the `ModelSettings` fields that give the same features."""

_CLAMP = 2.0
"""anomalib's constant; checkpoints do not contain it."""

_STEP = re.compile(r"fast_flow_blocks\.(\d+)\.module_list\.(\d+)\.(.+)")
_TENSORS = {
    "global_scale": "raw_scale",
    "global_offset": "offset",
    "subnet.0.weight": "subnet.0.weight",
    "subnet.0.bias": "subnet.0.bias",
    "subnet.2.weight": "subnet.2.weight",
    "subnet.2.bias": "subnet.2.bias",
}
"""A step's tensors: anomalib's name to ours. `_permutation` converts the permutation."""

_MISSING = torch.empty(())

_CURE = (
    "it must be a Lightning .ckpt of anomalib's Fastflow, or a state dict. If you have an exported model.pt or another "
    "checkpoint, save a state dict in anomalib: torch.save(model.state_dict(), 'weights.pt')"
)


@dataclass(frozen=True, slots=True)
class AnomalibModel:
    """A converted checkpoint.

    Attributes:
        settings: Backbone, layers, input size and resize.
        flow: Configuration of the flows.
        backbone_tensors: By timm's names; may contain more than is needed.
        head_tensors: The state dict of a `FastFlowHead`.
    """

    settings: ModelSettings
    flow: FlowSpec
    backbone_tensors: dict[str, Tensor]
    head_tensors: dict[str, Tensor]

    def make_backbone(self) -> Backbone:
        """Create the backbone with the checkpoint's weights."""
        named = self.settings.model_copy(update={"weights": "anomalib"})
        return Backbone(named, self.backbone_tensors)

    def make_head(self, backbone: Backbone) -> FastFlowHead:
        """Create the head.

        Raises:
            WeightsError: The flows do not fit the backbone.
        """
        head = FastFlowHead(backbone.spec, self.flow)
        try:
            head.load_state_dict(self.head_tensors)
        except RuntimeError as error:
            raise WeightsError(
                f"the checkpoint's flows do not fit {backbone.spec.name} at {backbone.spec.layers} and "
                f"{backbone.spec.input_size} px: {one_line(error)}"
            ) from error
        return head.eval()


def read_anomalib(path: Path, backbone: str = "auto", resize: Resize = "antialias") -> AnomalibModel:
    """Read a checkpoint of anomalib's FastFlow.

    Args:
        path: A Lightning .ckpt, a state dict of the Lightning module or of its `FastflowModel`, pickled by torch or
            as .safetensors.
        backbone: The expected backbone, by timm's name; `auto` takes the first that fits the tensors.
        resize: The filter that resizes images; anomalib's pre-processor uses `antialias`.

    Raises:
        ConfigError: anomalib has no such backbone.
        WeightsError: The file cannot be read without executing it, is of another model, or has an unsupported flow.
    """
    if backbone not in ("auto", *ANOMALIB_BACKBONES):
        raise ConfigError(
            f"anomalib's FastFlow has no backbone {backbone!r}; choose one of auto, {', '.join(ANOMALIB_BACKBONES)}"
        )
    candidates = list(ANOMALIB_BACKBONES.values()) if backbone == "auto" else [ANOMALIB_BACKBONES[backbone]]
    state_dict = read_state_dict(path, f"an anomalib checkpoint from {path}", _CURE)
    tensors = _without_prefix({name: tensor for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}, path)
    backbone_tensors = {
        name.removeprefix("feature_extractor."): tensor
        for name, tensor in tensors.items()
        if name.startswith("feature_extractor.")
    }
    steps = _group_steps(tensors, path)
    norms = [tensors[f"norms.{s}.weight"] for s in range(len(steps)) if f"norms.{s}.weight" in tensors]
    settings = _match_backbone(backbone_tensors, norms, candidates, path)
    head: dict[str, Tensor] = {}
    for s, scale in enumerate(steps):
        for k, step in enumerate(scale):
            prefix = f"flows.{s}.steps.{k}"
            head |= {f"{prefix}.{new}": step[old].float() for old, new in _TENSORS.items()}
            head[f"{prefix}.permutation"] = _permutation(step, f"{path}: step {k} of scale {s}")
        if norms:
            head |= {f"statistics.{s}.{name}": tensors[f"norms.{s}.{name}"].float() for name in ("weight", "bias")}
    flow = FlowSpec(
        steps=len(steps[0]),
        hidden_ratio=_hidden_ratio([step for scale in steps for step in scale], path),
        conv3x3_only=all(step["subnet.0.weight"].shape[-1] == 3 for scale in steps for step in scale),  # noqa: PLR2004 - 3x3
        clamp=_CLAMP,
        normalisation="layer_norm" if norms else "none",
    )
    return AnomalibModel(settings.model_copy(update={"resize": resize}), flow, backbone_tensors, head)


def _without_prefix(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the prefix of wrappers from the names of `FastflowModel`, and drop other tensors."""
    for name in tensors:
        prefix, separator, _ = name.partition("fast_flow_blocks.")
        if separator:
            return {full.removeprefix(prefix): tensor for full, tensor in tensors.items() if full.startswith(prefix)}
    raise WeightsError(f"{path} has no fast_flow_blocks: it is not a checkpoint of anomalib's Fastflow; {_CURE}")


def _group_steps(tensors: Mapping[str, Tensor], path: Path) -> list[list[dict[str, Tensor]]]:
    """Group the flows' tensors by scale and step; refuse missing tensors and different numbers of steps."""
    steps_found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _STEP.fullmatch(name):
            steps_found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
    scales, steps = (max((index[axis] for index in steps_found), default=-1) + 1 for axis in (0, 1))
    expected = [(s, k) for s in range(scales) for k in range(steps)]
    missing = [
        f"fast_flow_blocks.{s}.module_list.{k}.{name}"
        for s, k in expected
        for name in (*_TENSORS, "w_perm")
        if steps_found.get((s, k), {}).get(name, _MISSING).ndim != (1 if name.endswith("bias") else 4)
    ]
    if missing or not expected:
        raise WeightsError(
            f"{path} lacks tensors of the flows, {', '.join(missing[:1]) or 'all of them'}; truncated files and "
            "learned Householder permutations (w_0) cannot be imported"
        )
    return [[steps_found[s, k] for k in range(steps)] for s in range(scales)]


def _match_backbone(
    backbone: Mapping[str, Tensor], norms: Sequence[Tensor], candidates: Sequence[Mapping[str, Any]], path: Path
) -> ModelSettings:
    tried = []
    for candidate in candidates:
        settings = ModelSettings.model_validate(candidate)
        tried.append(settings.backbone)
        if bool(norms) == bool(settings.blocks):  # anomalib has layer norms for CNNs and none for transformers
            continue
        with torch.device("meta"):
            network = make_network(settings, pretrained=False)
        if not matches(network.module, backbone):
            continue
        if not norms:
            return settings
        sides = {stride * side for norm, stride in zip(norms, network.strides, strict=True) for side in norm.shape[1:]}
        if len(sides) > 1:
            raise WeightsError(
                f"{path} was trained on images of {' x '.join(map(str, sorted(sides)))} pixels, but flawstream needs "
                "square images; train it again with input_size=(256, 256)"
            )
        return ModelSettings.model_validate({**candidate, "input_size": sides.pop()})
    raise WeightsError(
        f"the backbone in {path} is none of {', '.join(tried)}: a tensor is missing or has another shape. "
        "only backbones of anomalib can be imported"
    )


def _permutation(step: Mapping[str, Tensor], where: str) -> Tensor:
    """Convert a (C, C, 1, 1) permutation matrix to the (C,) index: row i takes channel index[i]."""
    matrix = step["w_perm"].flatten(start_dim=1)
    index = matrix.argmax(dim=1)
    is_permutation = torch.equal(index.sort().values, torch.arange(matrix.shape[1])) and torch.equal(
        matrix, torch.zeros_like(matrix).scatter_(1, index[:, None], 1.0)
    )
    inverse = step.get("w_perm_inv")
    if not is_permutation or (inverse is not None and not torch.equal(inverse.flatten(start_dim=1), matrix.T)):
        raise WeightsError(
            f"{where} mixes channels by a matrix that is not a permutation (permute_soft=True?), which cannot be "
            "imported; train it with hard permutations, anomalib's default"
        )
    return index


def _hidden_ratio(steps: Sequence[Mapping[str, Tensor]], path: Path) -> float:
    """Find the ratio with the fewest digits that gives every subnet its hidden channels, `int(inputs * ratio)`."""
    widths = {tuple(step["subnet.0.weight"].shape[1::-1]) for step in steps}
    lowest = max(hidden / inputs for inputs, hidden in widths)
    for digits in range(8):
        ratio = math.ceil(lowest * 10.0**digits) / 10.0**digits
        if all(int(inputs * ratio) == hidden for inputs, hidden in widths):
            return ratio
    raise WeightsError(
        f"{path}: no single hidden ratio gives subnets of (input, hidden) channels {sorted(widths)}; "
        "anomalib has one ratio for all"
    )
