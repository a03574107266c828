"""The HTTP API."""

from pydantic import Field, SecretStr

from schemas.settings.section import FilePath, Section


class ApiSettings(Section):
    """The HTTP API."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    hosts: tuple[str, ...] = Field(
        (),
        description="Names in the Host header by which the API may be called; none: those of this machine while `host` "
        "is a loopback address, and any otherwise.",
    )
    tokens: tuple[SecretStr, ...] = Field(
        (), description="Tokens of which a request must carry one, as `Authorization: Bearer`; none: all may ask."
    )
    tokens_file: FilePath | None = Field(
        None, description="File of tokens, one a line, such as a mounted secret; instead of `tokens`."
    )
    replicas: int = Field(1, ge=1, description="Replicas to run, behind one address on every node.")
    num_cpus: float = Field(
        0.1,
        ge=0,
        description="CPUs that Ray reserves for a replica; with 0 one may run on a head that has no CPUs for work.",
    )
