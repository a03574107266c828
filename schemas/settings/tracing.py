"""Spans of images, for OpenTelemetry."""

from pydantic import Field

from schemas.settings.section import Section


class TracingSettings(Section):
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
