"""The one tree of settings: defaults, then a YAML file, then `FLAWSTREAM_<SECTION>__<FIELD>` in the environment.

A part of the program receives its section and never the tree. Nothing is read at import.
"""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from schemas.errors import ConfigError
from schemas.messages import MapCodec
from schemas.presets import PRESETS, PresetName
from schemas.references import parse_allowed

ENV_PREFIX = "FLAWSTREAM_"
_MIB = 1 << 20

_SERVICE_LINK = re.compile(
    r"_SERVICE_HOST=|_SERVICE_PORT(_\w+)?=\d+$|_PORT(_\d+_(TCP|UDP|SCTP))?=\w+://|_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)="
)
"""What Kubernetes puts into every pod's environment for a Service whose name starts with flawstream: none of ours."""

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]

Resize = Literal["area", "antialias"]
"""How an image becomes the square that a model sees: `flawstream.imaging.resize`."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class RedisSettings(_Section):
    """Where the streams live. Any Redis 7 or Valkey server."""

    url: str = Field(
        "redis://127.0.0.1:6379/0", description="Server URL, `redis://` or `rediss://`, without a password."
    )
    username: str | None = Field(None, description="ACL user.")
    password: SecretStr | None = Field(None, description="Password; never printed.")
    password_file: Path | None = Field(
        None, description="File that holds the password, such as a mounted secret; instead of `password`."
    )
    tls_ca_file: Path | None = Field(
        None, description="PEM file of authorities to trust with `rediss://`, beside the system's."
    )
    tls_cert_file: Path | None = Field(
        None, description="PEM file of the client's certificate, where one is asked for."
    )
    tls_key_file: Path | None = Field(None, description="PEM file of the certificate's key.")
    sentinels: tuple[str, ...] = Field(
        (),
        description="`host:port` of each Sentinel; they tell where the primary is, `url` the scheme and database.",
    )
    sentinel_primary: str = Field("mymaster", min_length=1, description="What the Sentinels call the primary.")
    cluster: bool = Field(False, description="`url` names any node of a Redis Cluster; needs `shards`.")  # noqa: FBT003
    shards: int = Field(
        0,
        ge=0,
        le=1024,
        description="Sets of streams to spread images over: `<prefix>:{0}:images` and on; 0: one, `<prefix>:images`.",
    )
    wait_replicas: int = Field(
        0, ge=0, le=16, description="Replicas that must have an image before a push is done (WAIT); 0 does not wait."
    )
    wait_local_fsync: bool = Field(
        False,  # noqa: FBT003
        description="A push is done only when the image is on the server's disk (WAITAOF: Redis 7.2, Valkey; AOF).",
    )
    prefix: str = Field("flawstream", min_length=1, max_length=64, description="What every key starts with.")
    timeout_s: float = Field(5.0, gt=0, description="Longest wait for a reply, and for a connection.")
    block_ms: int = Field(
        1000, ge=1, description="How long a read waits at the server for a new entry; must stay below timeout_s."
    )

    @field_validator("url")
    @classmethod
    def _url_holds_no_password(cls, url: str) -> str:
        if urlsplit(url).password:  # the URL is printed and logged
            raise ValueError("a password must not stand in the URL; put it into redis.password")
        return url

    @model_validator(mode="after")
    def _one_way_to_the_server(self) -> Self:
        if self.cluster and self.sentinels:
            raise ValueError("cluster and sentinels exclude each other: a cluster fails over by itself")
        if self.cluster and not self.shards:
            raise ValueError("cluster needs shards, as many as the cluster has primaries or more: set redis.shards=8")
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file are both set; leave one of them out")
        return self

    @model_validator(mode="after")
    def _block_is_shorter_than_the_timeout(self) -> Self:
        if self.block_ms >= self.timeout_s * 1000:
            raise ValueError(
                f"block_ms={self.block_ms} must stay below timeout_s={self.timeout_s}: a read would time out"
            )
        return self


class LimitSettings(_Section):
    """What is refused before anything is decoded."""

    max_image_bytes: int = Field(16 * _MIB, ge=1024, description="Longest compressed image.")
    max_fields_bytes: int = Field(64 * 1024, ge=256, description="All fields of an entry but the image, together.")
    max_pixels: int = Field(64_000_000, ge=64, description="Largest width times height.")
    max_aspect: float = Field(32.0, ge=1.0, description="Largest ratio of the longer to the shorter side.")


class ReferenceSettings(_Section):
    """Images by reference: which may be fetched, and within what limits. None may, unless it is listed here."""

    allow: tuple[str, ...] = Field(
        (),
        description="What a reference must start with: `key:frames:`, `s3://bucket/folder/`, `https://host[:port]/path/`.",
    )
    timeout_s: float = Field(10.0, gt=0, description="Longest time to fetch one image, tries included.")
    tries: int = Field(3, ge=1, le=10, description="Tries before an image that cannot be fetched is a dead letter.")
    concurrency: int = Field(16, ge=1, le=256, description="Images that one worker fetches at once.")

    @field_validator("allow")
    @classmethod
    def _allow_is_read_once_here(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for number, entry in enumerate(allow, 1):
            try:
                parse_allowed(entry)
            except ValueError as error:
                raise ValueError(f"entry {number} of the list cannot be allowed: {error}") from None
        return allow


class BacklogSettings(_Section):
    """When producers are refused, and what is kept of the results. All per shard."""

    max_images: int = Field(10_000, ge=1, description="Entries on the images stream past which a push is refused.")
    max_bytes: int = Field(
        2048 * _MIB,
        ge=_MIB,
        description="Bytes of the images stream, as the server estimates, past which a push is refused.",
    )
    keep_results: int = Field(
        100_000,
        ge=1,
        description="Results kept on the stream; older ones go, but never what a registered group has yet to read.",
    )
    keep_results_s: float = Field(
        7 * 86_400.0,
        gt=0,
        description="Age past which a result goes, be the stream short or long; never what a group has yet to read.",
    )


class WorkerSettings(_Section):
    """One stream worker."""

    replicas: int = Field(1, ge=0, description="Stream workers to run; with max_replicas the fewest.")
    max_replicas: int | None = Field(
        None, ge=1, description="Most stream workers; with it their number follows the backlog."
    )
    images_per_replica: int = Field(
        500, ge=1, description="Images waiting for each worker, above which there are to be more workers."
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Consumer name of `flawstream worker`; absent: the host's. Started again under its name, a worker "
        "goes on with what it had.",
    )
    batch_size: int = Field(16, ge=1, le=1024, description="Most entries read, decoded and detected together.")
    batch_bytes: int = Field(
        64 * _MIB,
        ge=1024,
        description="Bytes past which a batch takes no further entry; with in_flight the worker's bound.",
    )
    in_flight: int = Field(3, ge=1, le=64, description="Batches of one worker under way at once, over all shards.")
    decode_threads: int = Field(2, ge=1, le=64, description="Threads that decode images.")
    claim_idle_ms: int = Field(
        60_000, ge=100, description="A pending entry untouched for so long belongs to a dead worker."
    )
    max_deliveries: int = Field(
        5, ge=1, description="An entry given out more often than this is a dead letter: `poison`."
    )
    sweep_s: float = Field(5.0, gt=0, description="Time between two looks for entries of dead workers.")
    drain_s: float = Field(
        20.0, ge=0, description="Time to finish what is in hand when told to stop; the rest is handed back at once."
    )
    map_codec: MapCodec = Field(MapCodec.GRID_F16, description="How maps are written into results.")
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for a worker.")


class DetectorSettings(_Section):
    """One detector replica: the backbone, and the heads of all categories."""

    replicas: int = Field(1, ge=1, description="Detector replicas to run; with max_replicas the fewest.")
    max_replicas: int | None = Field(
        None, ge=1, description="Most detector replicas; with it their number follows the backlog."
    )
    images_per_replica: int = Field(
        500, ge=1, description="Images waiting for each replica, above which there are to be more replicas."
    )
    engine: Literal["auto", "torch", "openvino", "ncnn", "triton"] = Field(
        "auto",
        description="`auto`: torch on a GPU, else the first installed of ncnn, openvino, torch; `triton` is a server.",
    )
    precision: Literal["auto", "f32", "bf16"] = Field(
        "auto",
        description="On a CPU: `auto` judges in int8 what its manifest proves harmless, where the CPU has instructions "
        "for it, and in float32 else; `f32` never; `bf16` computes in bfloat16, proven or not (engines openvino and "
        "torch). On a GPU (engine torch): `auto` computes convolutions in float16; `f32` all in float32, without TF32; "
        "`bf16` is refused, as nothing proves it harmless.",
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
        8192, ge=1, description="Memory for loaded categories, 10^6 bytes; the least recently used goes first."
    )
    refresh_s: float = Field(2.0, gt=0, description="Time between two looks for newly promoted versions.")
    timeout_s: float = Field(
        60.0, gt=0, description="Longest wait for a replica's answer to one call; then the call is made again."
    )
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for a replica.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs, or a share of one, that Ray reserves for a replica.")


class ApiSettings(_Section):
    """The HTTP API."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    tokens: tuple[SecretStr, ...] = Field(
        (), description="Tokens of which a request must carry one, as `Authorization: Bearer`; none: all may ask."
    )
    tokens_file: Path | None = Field(
        None, description="File of tokens, one a line, such as a mounted secret; instead of `tokens`."
    )


class ModelSettings(_Section):
    """The frozen backbone and the shape of the flows on it. Fixed in a model version's manifest once trained."""

    preset: PresetName | None = Field(
        None,
        description="A configuration by name; what else is given here stands above it. `flawstream models presets`.",
    )
    backbone: str = Field(
        "tf_efficientnet_lite0", description="Any timm model that yields features by stage or, a transformer, by block."
    )
    weights: str = Field(
        "auto",
        description="`auto`: the installed package for tf_efficientnet_lite0 and tf_efficientnet_lite2, timm's own "
        "loading for all others. `package`, `timm`, or the path of a .safetensors, .pth or .pt state dict.",
    )
    strides: tuple[int, ...] = Field(
        (8, 16),
        min_length=1,
        description="Feature stages by their stride in pixels; stages past the last are cut off.",
    )
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="A transformer's blocks by index from 0, in place of stages: where given, strides are not used. "
        "Later blocks are cut off, and the network's last norm is applied.",
    )
    input_size: int = Field(
        256, ge=32, le=2048, multiple_of=32, description="Side in pixels that images are resized to."
    )
    resize: Resize = Field(
        "area",
        description="How images are resized: `area` averages what a pixel covers, on JPEGs while they are decoded; "
        "`antialias` is the resize of torchvision and anomalib.",
    )
    flow_steps: int = Field(8, ge=1, le=64, description="Flow steps at each stage.")
    hidden_ratio: float = Field(1.0, gt=0, le=4, description="Hidden channels of a subnet over its input channels.")
    conv3x3_only: bool = Field(False, description="3x3 subnets in every step; otherwise 3x3 and 1x1 take turns.")  # noqa: FBT003
    clamp: float = Field(2.0, gt=0, description="Soft clamp of the log scale.")
    top_fraction: float = Field(
        0.03,
        ge=0,
        le=1,
        description="The image score is the mean of this share of the map's highest values; 0: the maximum.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _preset_fills_what_is_not_given(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, Mapping) or given.get("preset") not in PRESETS:
            return handler(given)
        filled = handler({**PRESETS[given["preset"]].fields, **given})
        filled.model_fields_set.intersection_update(given)  # so that another preset on the command line replaces it
        return filled


class TrainingSettings(_Section):
    """The recipe: one set of defaults for all categories."""

    epochs: int = Field(
        20, ge=1, description="Passes over the training images. The last epoch is kept, never the best."
    )
    batch_size: int = Field(16, ge=1, description="Images in a step.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak of the one-cycle schedule.")
    weight_decay: float = Field(1e-5, ge=0, description="AdamW's decoupled decay.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a gradient.")
    calibration_fraction: Fraction = Field(
        0.2, description="Share of the normal images that never trains the flow and sets thresholds and p-values."
    )
    false_alarm_rate: Fraction = Field(0.05, description="Share of normal parts that may be called anomalous.")
    seed: int = Field(0, ge=0, description="Seed of the split, the permutations, the weights and the order of images.")
    int8: bool = Field(
        True,  # noqa: FBT003
        description="Make an int8 graph of each version, on CPUs that have instructions for it, and keep it where it "
        "scores as float32 does.",
    )
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs, or a share of one, that Ray reserves for a category in training."
    )


class RegistrySettings(_Section):
    """Where model versions are kept."""

    root: str = Field(".flawstream/models", description="A folder, or an fsspec URL such as s3://bucket/models.")


class MetricsSettings(_Section):
    """Numbers for Prometheus. Inside Ray they go out through Ray's own port, whatever `port` says."""

    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port on which a process without Ray answers Prometheus; 0 takes any free one, absent opens none.",
    )
    host: str = Field("127.0.0.1", description="Address to answer on; 0.0.0.0 opens it to the network.")
    max_categories: int = Field(
        200, ge=1, description="Categories that one process names in labels; those that come after count as `other`."
    )
    window_images: int = Field(
        500, ge=20, le=100_000, description="Latest images of a category from which drift and score quantiles are told."
    )
    report_s: float = Field(5.0, gt=0, description="Time between two looks at the backlog and at drift.")


class LoggingSettings(_Section):
    """Log lines, on standard error."""

    format: Literal["text", "json"] = Field(
        "text", description="`text` for a person; `json`: one object a line, as the image has it."
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "WARNING",
        description="The least that is said: from INFO on each dead letter, from DEBUG on each result. Libraries are "
        "heard from WARNING on.",
    )


class TracingSettings(_Section):
    """Spans of images, to a collector of OpenTelemetry; needs the extra `otel`."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/@]+(/\S*)?$",
        description="OTLP over HTTP, such as http://collector:4318; absent: nothing is traced. Headers, as for a "
        "token, in OTEL_EXPORTER_OTLP_HEADERS.",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of images traced whose producer sent no decision along with `traceparent`."
    )
    service_name: str = Field("flawstream", min_length=1, description="Under which the collector shows the spans.")


class Settings(BaseSettings):
    """All of flawstream's settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    redis: RedisSettings = RedisSettings()
    limits: LimitSettings = LimitSettings()
    references: ReferenceSettings = ReferenceSettings()
    backlog: BacklogSettings = BacklogSettings()
    worker: WorkerSettings = WorkerSettings()
    detector: DetectorSettings = DetectorSettings()
    api: ApiSettings = ApiSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    registry: RegistrySettings = RegistrySettings()
    metrics: MetricsSettings = MetricsSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the environment above what is handed in, which is what the YAML file said."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings, the environment's word over the file's.

    Args:
        path: A YAML file of sections; absent: `FLAWSTREAM_CONFIG` names one, or none is read.

    Raises:
        ConfigError: A file that cannot be read, a name nobody knows, or a value out of bounds.
    """
    _refuse_unknown_sections()
    named = path or os.environ.get(f"{ENV_PREFIX}CONFIG")
    from_file: dict[str, Any] = {}
    if named:
        try:
            from_file = yaml.safe_load(Path(named).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the settings file {named}: {error}") from error
        if not isinstance(from_file, dict) or not all(isinstance(section, str) for section in from_file):
            raise ConfigError(f"the settings file {named} must hold sections by name, such as `redis:`")
    try:
        return Settings(**from_file)
    except SettingsError as error:  # a variable that must be JSON and is not; the value may be a secret: not printed
        raise ConfigError(f"the environment's settings cannot be read: {error}") from None
    except ValidationError as error:
        raise ConfigError(
            f"settings refused: {settings_problems(error)}. `flawstream doctor --settings` lists every field"
        ) from None


def settings_problems(error: ValidationError, *section: str) -> str:
    """Say which fields are wrong and why, never with their values: one may be a password.

    Args:
        error: What pydantic found.
        *section: The section's name, where a section alone was read.
    """
    return "; ".join(
        f"{'.'.join(map(str, (*section, *problem['loc'])))}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )


def _refuse_unknown_sections() -> None:
    """pydantic-settings drops a variable whose section has a typo without a word."""
    known = set(Settings.model_fields) | {"config"}
    for name, value in os.environ.items():
        if name.upper().startswith(ENV_PREFIX) and not _SERVICE_LINK.search(f"{name}={value}"):
            section = name[len(ENV_PREFIX) :].split("__")[0].lower()
            if section not in known:
                close = get_close_matches(section, known, n=1)
                hint = f"; did you mean {ENV_PREFIX}{close[0].upper()}?" if close else ""
                raise ConfigError(f"the environment sets {name}, and there is no section {section!r}{hint}")
