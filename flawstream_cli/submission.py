"""Submitting a command to a Ray cluster as a Ray Job, and following it until its end."""

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from flawstream_cli.cluster import knock
from flawstream_cli.terminal import ExitCode, busy, out, print_json, print_message
from schemas.errors import ClusterLostError, ConfigError, one_line
from schemas.settings import Settings

_SECTIONS = ("model", "training", "limits", "detector", "registry", "metrics")
"""Sections of the settings that travel with a job; the others may have secrets, and the dashboard shows a job's."""
_LOCAL_OPTIONS = {"--submit": 1, "--ray": 1, "--config": 1, "--follow": 0, "--no-follow": 0}
"""Options that are not passed on to the job, and the number of their values."""
_ANSWER_S = 30.0
_POLL_S = 1.0
_LOST_AFTER_S = 60.0
_START_S = 120.0
_STARTING = "No available agent"
"""Part of Ray's answer while the agents of its nodes are starting, seconds after the dashboard answers."""


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
    """Ray's client, with a deadline for every request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_ANSWER_S, **options)


def submit_job(
    address: str, arguments: Sequence[str], settings: Settings, paths: Mapping[str, str], *, follow: bool, as_json: bool
) -> ExitCode | int:
    """Run a command of `flawstream` as a Ray Job.

    Args:
        address: The dashboard, `http://HOST:8265`.
        arguments: The command line after `flawstream`.
        settings: The settings here; those of training travel with the job.
        paths: What the job reads and writes, by the name of its option.
        follow: Print the job's log until its end; else return when it is accepted.
        as_json: Keep standard output for the job's document, or for the submitted job's name.

    Returns:
        The exit code of the job; 0 if it is not followed.

    Raises:
        ConfigError: The dashboard does not answer or refuses; or a path is relative.
        ClusterLostError: The cluster has not answered for a minute.
    """
    for name, path in paths.items():
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} {path!r} is a relative path, but the job runs on the cluster's machines: give a URL, or the "
                "absolute path of a folder that all of them have"
            )
    client = _connect(address)
    job = _submit(client, address, shlex.join(["flawstream", *_passed_on(arguments)]), _environment(settings))
    try:
        print_message(f"submitted {job}; stop it with: ray job stop --address {address} {job}")
        if not follow:
            if as_json:
                print_json({"job": job, "address": address})
            return ExitCode.OK
        return _follow(client, job, as_json=as_json)
    except KeyboardInterrupt:
        print_message(
            f"{job} goes on; follow it with: ray job logs --address {address} --follow {job}; "
            f"stop it with: ray job stop --address {address} {job}",
            "yellow",
        )
        raise


def _connect(address: str) -> JobSubmissionClient:
    try:
        knock(address)
        return _Client(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} needs its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the token that the cluster was started with"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray dashboard answers at {address} ({error}); give the address of the cluster's dashboard, as in "
            "http://HOST:8265"
        ) from error


def _submit(client: JobSubmissionClient, address: str, command: str, environment: Mapping[str, str]) -> str:
    """Submit the job and return its name; wait for a cluster that has started a moment ago."""
    started_s = time.monotonic()
    with busy("waiting for the cluster to take the job"):
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=command, runtime_env={"env_vars": environment}, metadata={"program": "flawstream"}
                    )
                )
            except (RuntimeError, requests.RequestException) as error:
                starting = _STARTING in str(error)
                if not starting or time.monotonic() - started_s > _START_S:
                    cure = "; look at dashboard_agent.log on its head: its port 52365 may be taken" if starting else ""
                    raise ConfigError(f"the cluster at {address} refused the job: {one_line(error)}{cure}") from error
            time.sleep(_POLL_S)


def _follow(client: JobSubmissionClient, job: str, *, as_json: bool) -> int:
    """Print a job's log as it grows, and return its exit code."""
    printed, document = "", ""
    for log, ended in _poll(client, job):
        lines = log.removeprefix(printed)
        if not ended:
            lines = lines[: lines.rfind("\n") + 1]
        printed += lines
        for line in lines.splitlines():
            if as_json and line.startswith("{") and _is_document(line):
                document = line
            elif as_json:
                print_message(line)
            else:
                out.file.write(f"{line}\n")
        out.file.flush()
    details = client.get_job_info(job)
    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        code = ExitCode.OK
    elif code is None or code < 0:  # Ray could not start it, or a signal ended it
        print_message(f"{job} {details.status.lower()}: {details.message}", "red")
        code = ExitCode.TERMINATED if details.status == JobStatus.STOPPED else ExitCode.FAILED
    if as_json:
        print_json(
            json.loads(document) if document else {"error": f"{job} {details.status.lower()}: {details.message}"}
        )
    return int(code)


def _poll(client: JobSubmissionClient, job: str) -> Iterator[tuple[str, bool]]:
    """Yield a job's log until its end, and whether it has ended.

    Raises:
        ClusterLostError: The cluster has not answered for a minute.
    """
    answered_s = time.monotonic()
    while True:
        try:
            ended = client.get_job_status(job).is_terminal()
            log = client.get_job_logs(job)
        except (RuntimeError, OSError, requests.RequestException) as error:
            if time.monotonic() - answered_s > _LOST_AFTER_S:
                raise ClusterLostError(
                    f"the cluster has not answered for {_LOST_AFTER_S:.0f} s ({error}); {job} may still run: look at "
                    "the cluster before you submit it again"
                ) from error
        else:
            answered_s = time.monotonic()
            yield log, ended
            if ended:
                return
        time.sleep(_POLL_S)


def _is_document(line: str) -> bool:
    try:
        return "trained" in json.loads(line)
    except ValueError:
        return False


def _passed_on(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments without the options that are for this machine."""
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if name not in _LOCAL_OPTIONS:
            yield argument
        elif not equals:
            for _ in range(_LOCAL_OPTIONS[name]):
                next(remaining)


def _environment(settings: Settings) -> dict[str, str]:
    """Return the settings given here, by file or environment, as the environment variables of the job."""
    given = settings.model_dump(mode="json", exclude_unset=True, include=set(_SECTIONS))
    return {
        f"FLAWSTREAM_{section}__{field}".upper(): value if isinstance(value, str) else json.dumps(value)
        for section, fields in given.items()
        for field, value in fields.items()
        if value is not None
    }
