"""Detection on a Triton server elsewhere, whose repository `flawstream models export --format triton` wrote.

The client is the synchronous one: `detect` runs in the batcher's own thread, which has nothing else to do while it
waits, and gRPC's channel may be used by the threads that load versions meanwhile. Needs the extra `triton`.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from flawstream.engines.protocol import Read, no_files
from flawstream.export.triton import FRONT, MODEL, SPEC_PARAMETER, WEIGHTS_PARAMETER
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import WEIGHTS_FILE
from schemas.errors import ConfigError, RegistryError, TransientError
from schemas.manifest import Arithmetic, BackboneSpec, ModelManifest

_LATER = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED"}


class TritonEngine:
    """Sends batches to a server; backbone and heads are there.

    Args:
        url: Of the server's gRPC, `grpc://host:port` or with TLS `grpcs://host:port`.
        timeout_s: Longest wait for an answer.

    Raises:
        ConfigError: The server has no repository of ours.
        TransientError: It does not answer.
    """

    precision: Arithmetic = "float32"
    int8 = False
    concurrent_batches = 1
    copies = 0  # they are at the server

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        scheme, _, address = url.partition("://")
        self._client = grpc.InferenceServerClient(address, ssl=scheme == "grpcs")
        try:
            with self._answering():
                config = self._client.get_model_config(FRONT, client_timeout=timeout_s).config
        except InferenceServerException as error:
            raise ConfigError(
                f"the Triton server at {url} has no model {FRONT!r} ({error.message()}); write its repository with "
                "`flawstream models export CATEGORY --format triton --to FOLDER`, or correct detector.triton_url"
            ) from error
        self.spec = BackboneSpec.model_validate_json(config.parameters[SPEC_PARAMETER].string_value)
        self._most = config.max_batch_size
        self._grids = [f"grid_{scale}" for scale in range(len(self.spec.strides))]

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> str:
        """See that the server has the version, and have it loaded where the server leaves that to clients.

        Raises:
            RegistryError: The server has no such version, or one of other weights.
            TransientError: The server does not answer.
        """
        del head, read
        if manifest is None:
            raise RegistryError("a Triton server has published versions alone; give one, or use another engine")
        name = manifest.model
        self._require(name)
        with self._answering():
            config = self._client.get_model_config(name, client_timeout=self._timeout_s).config
        theirs = config.parameters[WEIGHTS_PARAMETER].string_value
        if theirs != manifest.files.get(WEIGHTS_FILE, ""):
            raise RegistryError(
                f"the Triton server at {self._url} has other weights for {name} ({theirs[:12]}) than the registry; "
                "one of the two was changed: remove the model there and export the version anew"
            )
        return name

    def detect(self, images: Pixels, heads: Sequence[tuple[str, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """Have a batch judged, in as many requests as the server's largest batch asks for; see `Engine`.

        Raises:
            RegistryError: The server no longer has one of the versions.
            TransientError: The server does not answer.
        """
        names = np.empty((len(images), 1), object)
        for name, rows in heads:
            names[rows] = name.encode()
        with self._answering():
            try:
                return self._judge(images, names)
            except InferenceServerException:
                absent = [name for name, _ in heads if not self._is_ready(name)]
                if not absent:
                    raise
        for name in absent:  # a server that was started anew has lost what clients had it load
            self._require(name)
        with self._answering():
            return self._judge(images, names)

    def _judge(self, images: Pixels, names: NDArray[np.object_]) -> list[NDArray[np.float32]]:
        starts = range(0, len(images), self._most)
        parts = [self._infer(images[start : start + self._most], names[start : start + self._most]) for start in starts]
        return [np.concatenate(grids) for grids in zip(*parts, strict=True)]

    def _infer(self, images: Pixels, names: NDArray[np.object_]) -> list[NDArray[np.float32]]:
        pixels = grpc.InferInput("images", images.shape, np_to_triton_dtype(images.dtype))
        pixels.set_data_from_numpy(images)
        versions = grpc.InferInput(MODEL, names.shape, "BYTES")
        versions.set_data_from_numpy(names)
        answer = self._client.infer(
            FRONT,
            [pixels, versions],
            outputs=[grpc.InferRequestedOutput(name) for name in self._grids],
            client_timeout=self._timeout_s,
        )
        return [answer.as_numpy(name) for name in self._grids]

    def _is_ready(self, name: str) -> bool:
        return bool(self._client.is_model_ready(name, client_timeout=self._timeout_s))

    def _require(self, name: str) -> None:
        with self._answering():
            if self._is_ready(name):
                return
            try:
                self._client.load_model(name, client_timeout=self._timeout_s)
            except InferenceServerException as error:
                if error.status() in _LATER:
                    raise
                raise RegistryError(
                    f"the Triton server at {self._url} does not have {name} ({error.message()}); put it into its "
                    f"repository with `flawstream models export {name} --format triton --to FOLDER`"
                ) from error

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Tell a server that is lost from one that says what is wrong."""
        try:
            yield
        except InferenceServerException as error:
            if error.status() not in _LATER:
                raise
            raise TransientError(
                f"the Triton server at {self._url} does not answer within {self._timeout_s:g} s "
                f"({error.status()}: {error.message()})"
            ) from error
