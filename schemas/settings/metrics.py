"""Metrics for Prometheus."""

from pydantic import Field

from schemas.settings.section import Section


class MetricsSettings(Section):
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
        500,
        ge=20,
        le=100_000,
        description="Latest images of a category that drift and score quantiles are of.",
    )
    report_s: float = Field(5.0, gt=0, description="Time between two measurements of backlog and drift.")
