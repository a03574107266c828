"""Detection on a Triton server, whose repository `flawstream models export --format triton` wrote.

Uses the synchronous client: `detect` runs in a thread of the batcher, and threads that load versions may share gRPC's
channel. Needs the extra `triton`.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files, score_batch
from flawstream.export.triton import FRONT, MODEL, SPEC_PARAMETER, WEIGHTS_PARAMETER
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import WEIGHTS_FILE
from schemas.errors import ConfigError, RegistryError, TransientError
from schemas.manifest import Arithmetic, BackboneSpec, ModelManifest

_TRANSIENT = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED"}


class TritonEngine:
    """Sends batches to a Triton server, which has backbone and heads.

    Args:
        url: gRPC URL of the server, `grpc://host:port` or with TLS `grpcs://host:port`.
        timeout_s: Timeout of a request.

    Raises:
        ConfigError: The server has no model repository of flawstream.
        TransientError: The server does not answer.
    """

    precision: Arithmetic = "float32"
    trial_arithmetic: Arithmetic | None = None
    concurrent_batches = 1
    usable = True

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        scheme, _, address = url.partition("://")
        self._client = grpc.InferenceServerClient(address, ssl=scheme == "grpcs")
        try:
            with self._transient_errors():
                config = self._client.get_model_config(FRONT, client_timeout=timeout_s).config
        except InferenceServerException as error:
            raise ConfigError(
                f"the Triton server at {url} has no model {FRONT!r} ({error.message()}); write its repository with "
                "`flawstream models export CATEGORY --format triton --to FOLDER`, or correct detector.triton_url"
            ) from error
        self.spec = BackboneSpec.model_validate_json(config.parameters[SPEC_PARAMETER].string_value)
        self._max_batch = config.max_batch_size
        self._grids = [f"grid_{scale}" for scale in range(len(self.spec.strides))]

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> str:
        """Check that the server has the version; load it if the server is in explicit model control mode.

        Raises:
            RegistryError: The server does not have the version, or has other weights for it.
            TransientError: The server does not answer.
        """
        del head, read
        if manifest is None:
            raise RegistryError("a Triton server has only published versions; use another engine")
        name = manifest.model
        self._require(name)
        with self._transient_errors():
            config = self._client.get_model_config(name, client_timeout=self._timeout_s).config
        server_sha256 = config.parameters[WEIGHTS_PARAMETER].string_value
        if server_sha256 != manifest.files.get(WEIGHTS_FILE, ""):
            raise RegistryError(
                f"the Triton server at {self._url} has other weights for {name} ({server_sha256[:12]}) than the "
                "registry; remove the model there and export the version again"
            )
        return name

    def memory_of(self, head: FastFlowHead) -> int:
        """Return 0: the weights are on the server."""
        del head
        return 0

    def warm_up(self) -> None:
        """Do nothing: the server warms up itself."""

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Compute a batch, split into requests of the server's maximum batch size; see `Engine`.

        Raises:
            RegistryError: The server no longer has one of the versions.
            TransientError: The server does not answer.
        """
        return score_batch(self._detect(images, heads), heads)

    def _detect(self, images: Pixels, heads: Sequence[HeadRows]) -> list[NDArray[np.float32]]:
        names = np.empty((len(images), 1), object)
        for name, rows, _ in heads:
            names[rows] = name.encode()
        with self._transient_errors():
            try:
                return self._infer_batch(images, names)
            except InferenceServerException:
                missing = [name for name, *_ in heads if not self._is_ready(name)]
                if not missing:
                    raise
        for name in missing:  # a restarted server has lost the models that clients loaded
            self._require(name)
        with self._transient_errors():
            return self._infer_batch(images, names)

    def _infer_batch(self, images: Pixels, names: NDArray[np.object_]) -> list[NDArray[np.float32]]:
        starts = range(0, len(images), self._max_batch)
        parts = [
            self._infer(images[start : start + self._max_batch], names[start : start + self._max_batch])
            for start in starts
        ]
        return [np.concatenate(grids) for grids in zip(*parts, strict=True)]

    def _infer(self, images: Pixels, names: NDArray[np.object_]) -> list[NDArray[np.float32]]:
        pixels = grpc.InferInput("images", images.shape, np_to_triton_dtype(images.dtype))
        pixels.set_data_from_numpy(images)
        versions = grpc.InferInput(MODEL, names.shape, "BYTES")
        versions.set_data_from_numpy(names)
        response = self._client.infer(
            FRONT,
            [pixels, versions],
            outputs=[grpc.InferRequestedOutput(name) for name in self._grids],
            client_timeout=self._timeout_s,
        )
        return [response.as_numpy(name) for name in self._grids]

    def _is_ready(self, name: str) -> bool:
        return bool(self._client.is_model_ready(name, client_timeout=self._timeout_s))

    def _require(self, name: str) -> None:
        with self._transient_errors():
            if self._is_ready(name):
                return
            try:
                self._client.load_model(name, client_timeout=self._timeout_s)
            except InferenceServerException as error:
                if error.status() in _TRANSIENT:
                    raise
                raise RegistryError(
                    f"the Triton server at {self._url} does not have {name} ({error.message()}); add it to its "
                    f"repository with `flawstream models export {name} --format triton --to FOLDER`"
                ) from error

    @contextlib.contextmanager
    def _transient_errors(self) -> Iterator[None]:
        """Raise `TransientError` if the server is unavailable or overloaded; pass on other errors."""
        try:
            yield
        except InferenceServerException as error:
            if error.status() not in _TRANSIENT:
                raise
            raise TransientError(
                f"the Triton server at {self._url} did not answer within {self._timeout_s:g} s "
                f"({error.status()}: {error.message()})"
            ) from error
