"""One detector replica, and how many there are."""

from typing import Literal

from pydantic import Field

from schemas.settings.section import ScaledSection


class DetectorSettings(ScaledSection):
    """One detector replica: the backbone, and the heads of all categories."""

    replicas: int = Field(1, ge=1, description="Replicas to run; with max_replicas the fewest.")
    engine: Literal["auto", "cuda", "torch", "openvino", "ncnn", "triton"] = Field(
        "auto",
        description="`auto`: cuda on a GPU, else the first installed of ncnn, openvino, torch; `triton` is a server.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="For the engines cuda and torch: `auto` is the GPU if there is one; `cpu`, `cuda`, or `cuda:1` and "
        "so on.",
    )
    precision: Literal["auto", "f32"] = Field(
        "auto",
        description="`auto`: versions are judged in the faster arithmetic that their manifest proves harmless, float16 "
        "on a GPU and int8 on a CPU with instructions for it, else in float32; `f32`: always in float32, without TF32.",
    )
    triton_url: str = Field(
        "grpc://127.0.0.1:8001",
        pattern=r"^grpcs?://[^/@]+:\d+$",
        description="gRPC of the Triton server, `grpc://` or with TLS `grpcs://`, for engine triton.",
    )
    triton_timeout_s: float = Field(10.0, gt=0, description="Longest wait for an answer of the Triton server.")
    max_batch_images: int = Field(32, ge=1, le=4096, description="Most images the engine is given at once.")
    max_queue_images: int = Field(512, ge=1, description="Images waiting past which calls are refused.")
    target_batch_ms: float | None = Field(
        None,
        gt=0,
        description="How long a batch may take; larger ones are not made. Without it only their size counts.",
    )
    max_resident_mb: int = Field(
        8192,
        ge=1,
        description="Memory for loaded categories, in use or not, 10^6 bytes; the least recently used goes first.",
    )
    refresh_s: float = Field(2.0, gt=0, description="Time between two searches for newly promoted versions.")
    timeout_s: float = Field(
        60.0, gt=0, description="Longest wait for a replica's answer to one call; then the call is made again."
    )
    num_gpus: float = Field(0.0, ge=0, description="GPUs, or a share of one, that Ray reserves for a replica.")
