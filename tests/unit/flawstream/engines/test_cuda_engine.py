"""What the engine for GPUs does beyond the contract. On a CPU, where its program runs without graphs."""

import gc
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
from helpers import engine_bench
from helpers.engine_bench import FLOW, SIZE, TOP_FRACTION, assert_same, judge, load, make_head, make_images
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.engines.cuda import engine as cuda_engine
from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.cuda.errors import cuda_errors
from flawstream.engines.cuda.lane import LADDER, Lane, ladder
from flawstream.engines.protocol import HeadRows
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.fold import fold_batch_norms
from flawstream.fastflow.stacked import StackedHeads
from flawstream.imaging.pixels import Pixels
from schemas.errors import ConfigError, DeviceLostError, RegistryError
from schemas.settings import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(ModelSettings(input_size=SIZE))


def make_engine(backbone: Backbone, *, max_batch: int = 4) -> CudaEngine:
    return CudaEngine(backbone, half=False, max_batch=max_batch, device=CPU)


def test_slots_grow_with_the_categories_and_32_are_judged_as_each_alone(backbone: Backbone) -> None:
    engine = make_engine(backbone, max_batch=32)
    heads = [make_head(backbone, seed) for seed in range(32)]
    loaded = [load(engine, head, seed) for seed, head in enumerate(heads)]
    images = make_images(32)
    order = np.random.default_rng(0).permutation(32)
    together = engine_bench.mixed(engine, images, [(loaded[k], np.array([row])) for row, k in enumerate(order)])
    for row in (0, 7, 31):
        alone = judge(engine, loaded[order[row]], images[row : row + 1])
        assert_same([grid[row : row + 1] for grid in together], alone)


def test_slot_is_free_again_when_its_version_is_gone(backbone: Backbone) -> None:
    engine = make_engine(backbone)
    kept = load(engine, make_head(backbone, 0), 0)
    expected = judge(engine, kept, make_images(2))
    indices = set()
    for seed in range(1, 20):
        version = load(engine, make_head(backbone, seed), seed)
        indices.add(version.index)
        del version
        gc.collect()
    assert indices == {kept.index + 1}
    assert_same(judge(engine, kept, make_images(2)), expected)


def test_categories_are_swapped_while_others_are_judged(backbone: Backbone) -> None:
    engine = make_engine(backbone)
    kept = load(engine, make_head(backbone, 0), 0)
    images = make_images(3)
    expected = judge(engine, kept, images)
    stop = threading.Event()
    swaps: list[int] = []

    def swap() -> None:
        held = []
        seed = 0
        while not stop.is_set() or len(swaps) < 12:
            seed += 1
            held.append(load(engine, make_head(backbone, 1 + seed % 3), 1))
            swaps.append(seed)
            del held[: -10 if len(swaps) % 2 else -1]  # more than the first eight slots at times

    thread = threading.Thread(target=swap)
    thread.start()
    batches = 0
    while batches < 20 or len(swaps) < 12:
        assert_same(judge(engine, kept, images), expected)
        batches += 1
    stop.set()
    thread.join()


def test_batch_above_the_largest_graph_is_split(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(backbone, max_batch=2)
    loaded = [load(engine, make_head(backbone, seed), seed) for seed in range(2)]
    images = make_images(7)
    rows = [np.array([0, 2, 4, 6]), np.array([1, 3, 5])]
    sizes: list[int] = []
    run = Lane.run

    def recorded(
        lane: Lane, pixels: Pixels, slots: NDArray[np.int64], counts: NDArray[np.int64], size: int
    ) -> list[NDArray[np.generic]]:
        sizes.append(size)
        return run(lane, pixels, slots, counts, size)

    monkeypatch.setattr(Lane, "run", recorded)
    together = engine_bench.mixed(engine, images, list(zip(loaded, rows, strict=True)))
    assert sizes == [2, 2, 2, 1]
    for version, own in zip(loaded, rows, strict=True):
        assert_same([grid[own] for grid in together], judge(engine, version, images[own]))


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (32, (1, 2, 4, 8, 16, 32)), (500, LADDER)]
)
def test_ladder_reaches_the_largest_batch(largest: int, sizes: tuple[int, ...]) -> None:
    assert ladder(largest) == sizes


def capture_up_to(fits: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs of more than so many images run out of memory."""
    captured: list[int] = []

    def capture(_: Lane, size: int) -> None:
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        captured.append(size)

    monkeypatch.setattr(Lane, "capture", capture)
    return captured


def test_ladder_is_shorter_where_memory_is(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(backbone, max_batch=16)
    version = load(engine, make_head(backbone, 0), 0)
    expected = judge(engine, version, make_images(5))
    captured = capture_up_to(2, monkeypatch)
    engine.warm_up()
    assert sorted(set(captured)) == [1, 2]
    assert "batches of 4 images do not fit in the GPU's memory" in caplog.text
    assert_same(judge(engine, version, make_images(5)), expected)


def test_device_without_memory_for_one_image_is_refused(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(backbone)
    load(engine, make_head(backbone, 0), 0)
    capture_up_to(0, monkeypatch)
    with pytest.raises(ConfigError, match="too little memory for even one image"):
        engine.warm_up()


def test_category_for_which_there_is_no_memory_is_refused_and_the_others_serve_on(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backbone)
    kept = [load(engine, make_head(backbone, 0), k) for k in range(8)]
    expected = judge(engine, kept[0], make_images(2))

    monkeypatch.setattr(cuda_engine, "StackedHeads", out_of_memory)
    with pytest.raises(RegistryError, match=r"no memory for another category .* lower detector\.max_resident_mb"):
        load(engine, make_head(backbone, 1), 8)
    assert_same(judge(engine, kept[0], make_images(2)), expected)
    assert engine.usable


def test_no_memory_for_graphs_over_more_slots_leaves_the_batch_sizes_as_they_are(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backbone)
    kept = [load(engine, make_head(backbone, 0), k) for k in range(8)]
    engine.warm_up()
    expected = judge(engine, kept[0], make_images(4))
    with monkeypatch.context() as patch:
        capture_up_to(0, patch)
        with pytest.raises(RegistryError, match="no memory for another category"):
            load(engine, make_head(backbone, 1), 8)
    assert_same(judge(engine, kept[0], make_images(4)), expected)
    assert load(engine, make_head(backbone, 1), 8).index >= 8


def test_engine_whose_first_category_did_not_fit_can_be_warmed_up(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backbone)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_engine, "StackedHeads", lambda *_, **__: pytest.fail("is not reached"))
        patch.setattr(CudaEngine, "_family_with_room", out_of_memory)
        with pytest.raises(RegistryError, match="no memory"):
            load(engine, make_head(backbone, 0), 0)
    engine.warm_up()
    judge(engine, load(engine, make_head(backbone, 0), 0), make_images(1))


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")


def test_capture_that_ran_out_of_memory_is_told_from_a_lost_device() -> None:
    """What a capture raises last hides what went wrong in it."""
    with pytest.raises(MemoryError), cuda_errors():  # noqa: PT012 - the one error comes of the other
        try:
            out_of_memory()
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904


def test_sizes_are_captured_before_the_engine_is_ready_and_again_when_slots_grow(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backbone, max_batch=2)
    kept = [load(engine, make_head(backbone, 0), 0)]
    captured: list[int] = []
    monkeypatch.setattr(Lane, "capture", lambda _, size: captured.append(size))
    engine.warm_up()
    assert captured == [2, 2, 1, 1]
    captured.clear()
    kept += [load(engine, make_head(backbone, 0), k) for k in range(7)]
    assert not captured
    kept.append(load(engine, make_head(backbone, 0), 8))
    assert captured == [2, 2, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 1.50 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_every_library_s_lack_of_memory_is_a_memory_error(text: str) -> None:
    with pytest.raises(MemoryError), cuda_errors():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later",
        "CUDA error: unspecified launch failure",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: no CUDA-capable device is detected",
    ],
)
def test_device_that_failed_ends_the_engine(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    engine = make_engine(backbone)
    version = load(engine, make_head(backbone, 0), 0)

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(Lane, "run", fail)
    assert engine.usable
    with pytest.raises(DeviceLostError, match="must be replaced"):
        engine.detect(make_images(1), [HeadRows(version, np.arange(1), TOP_FRACTION)])
    assert not engine.usable


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), cuda_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_memory_of_a_head_is_its_slot(backbone: Backbone) -> None:
    head = make_head(backbone, 0)
    assert make_engine(backbone).memory_of(head) == StackedHeads(backbone.spec, FLOW, 1).slot_bytes


@pytest.mark.parametrize(("name", "folds"), [("resnet18", 20), ("tf_efficientnet_lite0", 48)])
def test_batch_norms_are_folded(name: str, folds: int) -> None:
    network = timm.create_model(name, features_only=True, pretrained=False).eval()
    randomise(network)
    example = torch.rand(2, 3, 64, 64)
    folded, count = fold_batch_norms(network, example)
    assert count == folds
    with torch.no_grad():
        for one, other in zip(network(example), folded(example), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


class BothWays(nn.Module):
    """The output of its convolution is read beside the norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        y = self.convolution(x)
        return [y, self.norm(y)]


def test_fold_that_changes_the_features_is_undone() -> None:
    network = BothWays().eval()
    randomise(network)
    example = torch.rand(2, 3, 16, 16)
    same, count = fold_batch_norms(network, example)
    assert count == 0
    with torch.no_grad():
        for one, other in zip(network(example), same(example), strict=True):
            torch.testing.assert_close(other, one)


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


WHITEN = """
import torch
from flawstream.engines.cuda.whiten_kernel import whiten_in_place
from flawstream.fastflow.stacked import whiten_plainly
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16):
    for size in (1, 5, 8):
        matrices = torch.randn(3, 4, 2, size, size, generator=generator).to(dtype)
        positions = torch.randn(6, 4, 2, size, generator=generator).to(dtype)
        slots = torch.tensor([2, 0, 1, 1, 2, 0])
        found = whiten_in_place(positions, matrices, slots)
        torch.testing.assert_close(found, whiten_plainly(positions, matrices, slots))
"""


def test_triton_kernel_whitens_as_plain_torch_does() -> None:
    """Interpreted, which needs no GPU; Triton reads the variable when the kernel is defined."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", WHITEN], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_triton_kernel_compiles_for_a_gpu() -> None:
    """Which needs none; only to run it would."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    from flawstream.engines.cuda.whiten_kernel import multiply  # noqa: PLC0415 - needs Triton

    signature = {"positions": "*fp16", "matrices": "*fp16", "slots": "*i64", "out": "*fp16", "per_image": "i32"}
    source = compiler.ASTSource(
        fn=multiply,
        signature=signature | {"size": "constexpr", "width": "constexpr"},
        constexprs={"size": 40, "width": 64},
    )
    compiled = compiler.compile(source, target=backends.GPUTarget("cuda", 90, 32))
    assert "ptx" in compiled.asm
