"""Scores a run's parts on a Ray cluster: Ray Data maps a pool of actors, each with an engine, over the parts.

A part is read, judged and written by one call of one actor, and its file appears whole or not at all: whatever is
killed, no image is in two files, and the parts without a file are what remains to be done.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from flawstream.telemetry.logs import set_up_logging
from schemas.errors import ConfigError, FlawstreamError, TransientError
from schemas.settings import Settings
from serving.detector import DetectorService, open_detector
from serving.scoring.attempts import Attempt
from serving.scoring.listing import ListedImage
from serving.scoring.output import Output, Run
from serving.scoring.rows import Outcome, build_table, count_outcomes
from serving.scoring.scorer import PinnedRegistry, Scorer

_log = logging.getLogger(__name__)

_MAX_CPUS = 4
"""CPUs of one actor by default: engines gain less from each further thread."""


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """A part that is written.

    Attributes:
        part: Its number.
        images: Its images.
        failed: Those that were not judged.
        anomalous: Those judged anomalous.
        engine: The engine that judged.
        duration_s: From reading its listing to its file.
    """

    part: int
    images: int
    failed: int
    anomalous: int
    engine: str
    duration_s: float


class PartScorer:
    """Scores one part a call, in an actor of Ray Data.

    Args:
        output_url: The folder of the run.
        run: The run.
        settings: All settings; the engine's and the limits are the run's.
        threads: CPU threads of this actor.
    """

    def __init__(self, output_url: str, run: Run, settings: Settings, threads: int) -> None:
        self._output, self._run, self._settings, self._threads = Output(output_url), run, settings, threads
        self._loop = asyncio.Runner()
        self._opened: tuple[DetectorService, Scorer] | None = None

    def __call__(self, batch: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """Score the one part of a batch.

        Loads the models at the first call: an exception of the constructor would be seen as a dead actor.

        Raises:
            FlawstreamError: The listing, the models or the storage cannot be used on this node.
        """
        (part,) = batch["part"].tolist()
        try:
            scored = self._loop.run(self._score(part))
        except FlawstreamError as error:
            if isinstance(error, TransientError) and self._opened is not None and not self._opened[0].alive:
                _log.exception("the detector is lost; Ray starts this process anew")
                os._exit(1)
            raise type(error)(f"on node {socket.gethostname()}: {error}") from None
        return {name: np.array([value]) for name, value in asdict(scored).items()}

    def close(self) -> None:
        """End the threads and the loop."""
        if self._opened is not None:
            detector, scorer = self._opened
            scorer.close()
            self._loop.run(detector.stop())
        self._loop.close()

    async def _score(self, part: int) -> ScoredPart:
        began_s = time.perf_counter()
        images = self._output.read_listing(part)
        detector, scorer = self._opened or await self._open()
        attempt = Attempt(self._output.attempt_file(part))
        try:
            outcomes = await _score_alone(scorer, images, attempt) if attempt.is_careful else await scorer.score(images)
            table = build_table(images, outcomes, self._run.parameters.maps)
            await asyncio.to_thread(self._output.write_part, part, table)
        except Exception:
            attempt.end()
            raise
        attempt.end()
        return ScoredPart(
            part=part,
            **count_outcomes(outcomes),
            engine=str(detector.status()["engine"]),
            duration_s=time.perf_counter() - began_s,
        )

    async def _open(self) -> tuple[DetectorService, Scorer]:
        ours = version("flawstream")
        if ours != self._run.flawstream:
            raise ConfigError(
                f"flawstream is {ours} here and the run was started with {self._run.flawstream}; install the same "
                "version on every node, or start anew with --again"
            )
        set_up_logging(self._settings.logging)
        registry = PinnedRegistry(self._run.parameters.registry, self._run.versions)
        detector = open_detector(registry, self._settings.model, self._settings.detector, threads=self._threads)
        await detector.start()
        self._opened = detector, Scorer(detector, self._settings, self._run.parameters.maps, self._threads)
        return self._opened


async def _score_alone(scorer: Scorer, images: Sequence[ListedImage], attempt: Attempt) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for row, image in enumerate(images):
        refusal = attempt.begin_alone(row)
        outcomes += [refusal] if refusal is not None else await scorer.score([image])
    return outcomes


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors of a run.

    Attributes:
        actors: Their number.
        cpus: CPUs of each.
        gpus: GPUs of each, or a share of one.
    """

    actors: int
    cpus: int
    gpus: float


def size_pool(nodes: Sequence[Mapping[str, float]], parts: int, cpus: float, gpus: float) -> Pool:
    """Choose as many actors as fit on the nodes, and no more than there are parts.

    Args:
        nodes: Resources of each node, `CPU` and `GPU`.
        parts: Parts to score.
        cpus: CPUs of an actor; 0: those of the smallest node, at most 4.
        gpus: GPUs of an actor; 0: one if the cluster has any.

    Raises:
        ConfigError: An actor fits on no node.
    """
    gpus = gpus or (1.0 if any(node.get("GPU") for node in nodes) else 0.0)
    usable = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    each = int(cpus) or min((_MAX_CPUS, *(int(node["CPU"]) for node in usable)))
    actors = sum(min(int(node["CPU"]) // each, int(node["GPU"] / gpus + 1e-6) if gpus else parts) for node in usable)
    if not actors:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes) or "no node"
        raise ConfigError(
            f"no node has {each} CPUs and {gpus:g} GPUs for an engine; the cluster has: {have}. Lower "
            "detector.num_cpus or detector.num_gpus, or add a node"
        )
    return Pool(min(actors, parts), each, gpus)


def score_parts(output: Output, run: Run, settings: Settings, parts: Sequence[int]) -> Iterator[ScoredPart]:
    """Score parts on the joined Ray cluster. Closing the iterator stops the actors.

    An actor or a node that dies is replaced, and what it had not written is scored again.

    Args:
        output: The folder of the run.
        run: The run.
        settings: All settings.
        parts: The parts to score.

    Yields:
        Each part when its file is written, in any order.

    Raises:
        ConfigError: An actor fits on no node, or a node does not see the folder.
        FlawstreamError: The models or the storage cannot be used.
    """
    if not parts:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pool = size_pool(nodes, len(parts), settings.detector.num_cpus, settings.detector.num_gpus)
    _quiet()
    scored = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        PartScorer,
        fn_constructor_args=(output.url, run, settings, pool.cpus),
        batch_size=1,
        compute=ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    with contextlib.closing(_rows(scored)) as rows:
        for row in rows:
            yield ScoredPart(
                **{name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
            )


def _rows(scored: Any) -> Generator[dict[str, Any], None, None]:
    try:
        yield from scored.iter_rows()
    except (RayError, FlawstreamError) as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """Return our own error if one is the cause of an error of Ray's."""
    inner: BaseException | None = error
    while isinstance(inner, RayError) or (inner is not None and not isinstance(inner, FlawstreamError)):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error if inner is None else inner


def _quiet() -> None:
    """Turn off Ray Data's own progress bars and log lines on this process's terminal."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
