"""Stacked heads score every image as the head of its slot does alone."""

import pytest
import torch
from helpers import heads as tiny
from torch import Tensor

from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.stacked import Rows, StackedHeads, windows
from schemas.manifest import FlowSpec, Normalisation

NORMALISATIONS: tuple[Normalisation, ...] = ("statistics", "layer_norm", "none")


def make_heads(count: int, flow: FlowSpec) -> list[FastFlowHead]:
    """Heads whose every tensor is away from where it starts, each with permutations of its own."""
    found = []
    for seed in range(count):
        head = FastFlowHead(tiny.SPEC, flow, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*head.parameters(), *head.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
        found.append(head.eval())
    return found


def make_features(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn((count, *shape), generator=generator) for shape in tiny.SPEC.feature_shapes]


def assert_scores_as_each_head_alone(
    stack: StackedHeads, heads: dict[int, FastFlowHead], slots: list[int], tolerance: float = 1e-5
) -> None:
    features = make_features(len(slots))
    with torch.no_grad():
        grids = stack(features, torch.tensor(slots))
        for row, slot in enumerate(slots):
            alone = FoldedHead(heads[slot])([scale[row : row + 1] for scale in features])
            for grid, expected in zip(grids, alone, strict=True):
                assert grid.dtype == torch.float32
                torch.testing.assert_close(
                    grid[row], expected[0], rtol=tolerance, atol=tolerance * float(expected.abs().max())
                )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("conv3x3_only", [True, False])
@pytest.mark.parametrize("categories", [1, 2, 32])
def test_every_image_of_a_mixed_batch_is_scored_by_its_own_head(
    normalisation: Normalisation, categories: int, *, conv3x3_only: bool
) -> None:
    flow = FlowSpec(steps=3, hidden_ratio=1.0, conv3x3_only=conv3x3_only, clamp=2.0, normalisation=normalisation)
    heads = make_heads(categories, flow)
    stack = StackedHeads(tiny.SPEC, flow, categories)
    for slot, head in enumerate(heads):
        stack.put(slot, head)
    slots = [*range(categories), 0, categories - 1]
    assert_scores_as_each_head_alone(stack, dict(enumerate(heads)), slots)


def test_writing_a_slot_changes_no_other() -> None:
    heads = make_heads(3, tiny.FLOW)
    stack = StackedHeads(tiny.SPEC, tiny.FLOW, 2)
    stack.put(0, heads[0])
    stack.put(1, heads[1])
    stack.put(1, heads[2])
    assert_scores_as_each_head_alone(stack, {0: heads[0], 1: heads[2]}, [0, 1, 1, 0])


def test_larger_stack_takes_over_the_slots_of_a_smaller_one() -> None:
    heads = make_heads(3, tiny.FLOW)
    small, large = (StackedHeads(tiny.SPEC, tiny.FLOW, slots) for slots in (2, 4))
    small.put(0, heads[0])
    small.put(1, heads[1])
    large.copy_slots(small)
    large.put(2, heads[2])
    assert_scores_as_each_head_alone(large, dict(enumerate(heads)), [2, 1, 0])


def test_float16_stays_near_float32() -> None:
    heads = make_heads(2, tiny.FLOW)
    stack = StackedHeads(tiny.SPEC, tiny.FLOW, 2, dtype=torch.float16)
    for slot, head in enumerate(heads):
        stack.put(slot, head)
    assert_scores_as_each_head_alone(stack, dict(enumerate(heads)), [0, 1, 0], tolerance=0.01)


def test_putting_a_head_leaves_it_as_it_was() -> None:
    (head,) = make_heads(1, tiny.FLOW)
    before = head.to_bytes()
    StackedHeads(tiny.SPEC, tiny.FLOW, 1).put(0, head)
    assert head.to_bytes() == before


def test_slot_bytes_are_what_one_more_slot_takes() -> None:
    sizes = [sum(buffer.nbytes for buffer in StackedHeads(tiny.SPEC, tiny.FLOW, slots).buffers()) for slots in (3, 4)]
    assert StackedHeads(tiny.SPEC, tiny.FLOW, 1).slot_bytes == sizes[1] - sizes[0]


def test_windows_are_torch_s_unfold() -> None:
    x = make_features(2)[0]
    torch.testing.assert_close(windows(x, 3), torch.nn.functional.unfold(x, 3, padding=1))


def test_packed_row_gives_back_its_parts() -> None:
    parts = {"a": torch.rand(3, 5), "b": torch.rand(2), "c": torch.rand(70)}
    rows = Rows({name: tuple(part.shape) for name, part in parts.items()})
    packed = torch.stack([torch.zeros(rows.size), rows.pack(parts)])
    for name, part in parts.items():
        torch.testing.assert_close(rows.part(packed, name)[1], part)
