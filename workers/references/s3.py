"""Images in buckets of S3, or of a store with its protocol.

Endpoint and credentials are configured as for the registry: AWS's variables, or fsspec's (`FSSPEC_S3_ENDPOINT_URL`).
"""

from importlib.util import find_spec
from typing import Any

from fsspec import filesystem

from schemas.errors import ConfigError
from schemas.references import Reference
from workers.references.source import RetryableError, too_large, unavailable


class S3Source:
    """A `Source` on S3. Asynchronous: a fetch that takes too long is cancelled, and leaves no thread behind.

    Args:
        max_bytes: Largest image.
        timeout_s: Longest wait for a connection, and for the next bytes.
        concurrency: Most connections.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, max_bytes: int, timeout_s: float, concurrency: int) -> None:
        if find_spec("s3fs") is None:
            raise ConfigError(
                "references.allow names s3:// and the package s3fs is not installed; "
                "run `pip install flawstream[s3]`, or leave s3:// out"
            )
        self._max_bytes = max_bytes
        self._options = {
            "asynchronous": True,
            "skip_instance_cache": True,  # the registry's own file system lives on another event loop
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
                "max_pool_connections": concurrency,
                "retries": {"total_max_attempts": 1},
            },
        }
        self._files: Any = None
        self._session: Any = None

    async def read(self, reference: Reference) -> bytes:
        """Read an object, after a check of its size; see `Source`."""
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - an optional extra

        path = f"{reference.host}/{reference.path}"
        try:
            files = await self._open()
            about = await files._info(path, refresh=True)  # noqa: SLF001 - fsspec's names for the asynchronous calls
            if about["type"] != "file":
                raise unavailable(reference, "it is a folder")
            size_bytes = int(about["size"])
            if size_bytes > self._max_bytes:
                raise too_large(reference, size_bytes, self._max_bytes)
            if not size_bytes:  # S3 refuses an empty range
                raise unavailable(reference, "the object is empty")
            data: bytes = await files._cat_file(path, start=0, end=size_bytes)  # noqa: SLF001 - the same
        except FileNotFoundError:
            raise unavailable(reference, "there is no such object or bucket") from None
        except PermissionError:
            raise unavailable(reference, "the store does not let the worker read it") from None
        except (OSError, BotoCoreError, ClientError) as error:
            raise RetryableError(f"the store does not answer ({type(error).__name__})") from None
        return data

    async def close(self) -> None:
        """Close the connections."""
        session, self._session, self._files = self._session, None, None
        if session is not None:
            await session.close()

    async def _open(self) -> Any:
        if self._files is None:
            files = filesystem("s3", **self._options)
            files.retries = 1  # the fetcher retries, within its deadline
            self._files = files
        self._session = await self._files.set_session()
        return self._files
