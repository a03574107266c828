"""Where the streams live, and how to reach them."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from schemas.settings.section import FilePath, Section


class RedisSettings(Section):
    """Where the streams live. Any Redis 7 or Valkey server."""

    url: str = Field(
        "redis://127.0.0.1:6379/0", description="Server URL, `redis://` or `rediss://`, without a password."
    )
    username: str | None = Field(None, description="ACL user.")
    password: SecretStr | None = Field(None, description="Password; never printed.")
    password_file: FilePath | None = Field(
        None, description="File that holds the password, such as a mounted secret; instead of `password`."
    )
    tls_ca_file: FilePath | None = Field(
        None, description="PEM file of authorities to trust with `rediss://`, beside the system's."
    )
    tls_cert_file: FilePath | None = Field(
        None, description="PEM file of the client's certificate, where one is asked for."
    )
    tls_key_file: FilePath | None = Field(None, description="PEM file of the certificate's key.")
    sentinels: tuple[str, ...] = Field(
        (),
        description="`host:port` of each Sentinel; they name the primary, `url` the scheme and database.",
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
            raise ValueError("a password must not be in the URL; put it into redis.password")
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
