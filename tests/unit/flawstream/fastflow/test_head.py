"""A head as bytes, its seed, and what its constructor leaves alone."""

import pytest
import safetensors.torch
import torch
from helpers.heads import FLOW, SPEC, features, make_head
from hypothesis import given
from hypothesis import strategies as st

from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.errors import RegistryError
from schemas.manifest import BackboneSpec, FlowSpec

DATA = make_head().to_bytes()


def test_head_read_back_gives_the_same_bits() -> None:
    head = make_head()
    read = FastFlowHead.from_bytes(head.to_bytes(), SPEC, FLOW)
    assert not read.training
    for one, other in zip(FoldedHead(head)(features()), FoldedHead(read)(features()), strict=True):
        assert torch.equal(one, other)


def test_writing_twice_gives_the_same_bytes() -> None:
    assert make_head().to_bytes() == DATA


@given(st.integers(0, len(DATA) - 1))
def test_head_cut_short_is_refused(length: int) -> None:
    with pytest.raises(RegistryError, match="do not fit their manifest"):
        FastFlowHead.from_bytes(DATA[:length], SPEC, FLOW)


@given(st.binary(max_size=64))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RegistryError, match="do not fit their manifest"):
        FastFlowHead.from_bytes(data, SPEC, FLOW)


@given(st.integers(0, int.from_bytes(DATA[:8], "little") + 7), st.integers(1, 255))
def test_damaged_header_is_refused_or_harmless(position: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= change
    try:
        read = FastFlowHead.from_bytes(bytes(damaged), SPEC, FLOW)
    except RegistryError:
        return
    assert read.state_dict().keys() == make_head().state_dict().keys()


def test_safetensors_of_something_else_are_refused() -> None:
    with pytest.raises(RegistryError, match="do not fit their manifest"):
        FastFlowHead.from_bytes(safetensors.torch.save({"weight": torch.zeros(3)}), SPEC, FLOW)


@pytest.mark.parametrize(
    ("spec", "flow"),
    [
        (SPEC, FLOW.model_copy(update={"steps": 3})),
        (SPEC, FLOW.model_copy(update={"hidden_ratio": 0.5})),
        (SPEC.model_copy(update={"input_size": 64}), FLOW),
        (SPEC.model_copy(update={"channels": (3, 5)}), FLOW),
    ],
)
def test_head_of_another_shape_is_refused_in_few_words(spec: BackboneSpec, flow: FlowSpec) -> None:
    with pytest.raises(RegistryError, match="do not fit their manifest") as refused:
        FastFlowHead.from_bytes(DATA, spec, flow)
    assert len(str(refused.value)) < 500


def test_seed_decides_the_head() -> None:
    one, same, other = (FastFlowHead(SPEC, FLOW, seed=seed).to_bytes() for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_constructor_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    FastFlowHead(SPEC, FLOW, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_folding_leaves_the_head_as_it_was() -> None:
    head = FastFlowHead(SPEC, FLOW)
    head.train()
    folded = FoldedHead(head)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert all(module.training for module in head.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    ours = {tensor.data_ptr() for tensor in [*head.parameters(), *head.buffers()]}
    assert not ours & {tensor.data_ptr() for tensor in [*folded.parameters(), *folded.buffers()]}


def test_folded_head_scores_what_the_head_maps() -> None:
    head = make_head()
    latents, _ = head(features())
    for grid, z in zip(FoldedHead(head)(features()), latents, strict=True):
        torch.testing.assert_close(grid, 0.5 * z.square().mean(dim=1))
