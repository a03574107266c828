"""One stream worker, and how many there are."""

from pydantic import Field

from schemas.messages import MapCodec
from schemas.settings.section import MIB, ScaledSection


class WorkerSettings(ScaledSection):
    """One stream worker."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Consumer name of `flawstream worker`; absent: the host's. A worker that restarts under its name "
        "resumes its pending entries at once; one whose name another live worker has does not start.",
    )
    batch_size: int = Field(16, ge=1, le=1024, description="Most entries read, decoded and detected together.")
    batch_bytes: int = Field(
        64 * MIB,
        ge=1024,
        description="Bytes past which a batch takes no further entry; times in_flight, it bounds the images in memory.",
    )
    in_flight: int = Field(3, ge=1, le=64, description="Batches of one worker in flight at once, over all shards.")
    decode_threads: int | None = Field(
        None, ge=1, le=64, description="Threads that decode images; absent: one for each CPU that the process may use."
    )
    claim_idle_ms: int = Field(
        60_000, ge=100, description="Time without a heartbeat after which a pending entry is claimed by another worker."
    )
    stage_timeout_s: float = Field(
        70.0,
        gt=0,
        description="Longest time that decoding a batch, a call of the detector, or building results may take. Past it "
        "the delivery counts, and the worker ends, to be replaced. Behind Ray Serve, more than `detector.timeout_s`.",
    )
    max_deliveries: int = Field(
        5, ge=1, description="An entry delivered more often than this becomes a dead letter: `poison`."
    )
    sweep_s: float = Field(5.0, gt=0, description="Time between two searches for entries of dead workers.")
    drain_s: float = Field(
        20.0, ge=0, description="Time to finish the batches in flight at shutdown; the rest is released at once."
    )
    map_codec: MapCodec = Field(MapCodec.GRID_F16, description="How maps are written into results.")
