"""The main job as a user does it, by the command line alone: train, serve, push, read, look, stop."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.raw_redis import RawRedis
from helpers.waiting import wait_until

from flawstream.imaging.maps import decode_map
from schemas.messages import AnomalyMap
from training.datasets.elpv import export_elpv
from workers.redis.embedded import free_port

PATIENCE_S = 250


class User:
    """Somebody in a folder of their own, with a data set, who has trained a category and serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # what this machine's environment says of flawstream is not the user's
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAWSTREAM_")}
        self.addresses: dict[str, str] = {}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "flawstream_cli", *map(str, arguments)]

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(  # noqa: S603 - our own interpreter
            self.command(*arguments),
            check=False,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE_S,
        )
        assert ran.returncode == code, f"{arguments} ended with {ran.returncode}: {ran.stderr}"
        assert "Traceback" not in ran.stderr
        return ran

    def json(self, *arguments: object, code: int = 0) -> list[Any]:
        """Run a command and read its standard output, which must be lines of JSON and nothing else."""
        return [json.loads(line) for line in self.run(*arguments, code=code).stdout.splitlines()]

    @property
    def redis(self) -> str:
        return self.addresses["redis"]

    @property
    def port(self) -> int:
        return int(self.redis.rsplit(":", 1)[1].split("/")[0])


def copy_some(source: Path, target: Path, count: int) -> None:
    target.mkdir(parents=True)
    for file in sorted(source.iterdir())[:count]:
        shutil.copy(file, target)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    """Give a user with 24 photographs of functional solar cells and 12 of defective ones."""
    user = User(tmp_path_factory.mktemp("user"))
    cells = export_elpv(tmp_path_factory.mktemp("elpv") / "cells") / "mono"
    copy_some(cells / "train" / "good", user.folder / "data" / "mono" / "train" / "good", 24)
    copy_some(cells / "test" / "good", user.folder / "data" / "mono" / "test" / "good", 6)
    copy_some(cells / "test" / "defective", user.folder / "data" / "mono" / "test" / "defective", 12)
    return user


@pytest.fixture(scope="module")
def trained(user: User) -> Any:
    """Train with defaults but for the time it takes."""
    (told,) = user.json("train", "data", "--epochs", 1, "--input-size", 64, "--json")
    return told


@pytest.fixture(scope="module")
def serving(user: User, trained: Any) -> Iterator[subprocess.Popen[str]]:
    """Serve with an embedded stream server, in a process group of its own as a terminal gives it."""
    assert trained["failed"] == {}
    with (user.folder / "serve.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            user.command("serve", "--port", free_port()),
            cwd=user.folder,
            env=user.environment,
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (user.folder / "serve.log").read_text(encoding="utf-8")
        user.addresses = json.loads(line)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.communicate()


def descendants(pid: int) -> set[int]:
    """Find all processes below one, by their parents."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {pid}


def is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_training_reports_what_it_made_as_json(trained: Any) -> None:
    (made,) = trained["trained"]
    assert made["category"] == "mono"
    assert made["training"]["train_images"] + made["training"]["calibration_images"] == 24
    assert (made["metrics"]["normal_images"], made["metrics"]["anomalous_images"]) == (6, 12)
    assert made["backbone"]["input_size"] == 64


def test_models_list_has_the_new_version_as_current(user: User, trained: Any) -> None:
    (listed,) = user.json("models", "list", "--json")
    assert [(one["version"], one["current"]) for one in listed] == [(trained["trained"][0]["version"], True)]


def test_evaluate_agrees_with_training_and_writes_a_report(user: User, trained: Any) -> None:
    (told,) = user.json("evaluate", "data", "--json", "--report", "report.html")
    made = trained["trained"][0]
    assert told["mono"]["model"] == f"mono@{made['version']}"
    assert told["mono"]["image_auroc"] == pytest.approx(made["metrics"]["image_auroc"], abs=1e-6)
    assert "<html" in (user.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("serving")
def test_doctor_finds_the_running_service_s_streams(user: User) -> None:
    (found,) = user.json("doctor", "--redis", user.redis, "--json")
    assert {name: check["ok"] for name, check in found.items()} == dict.fromkeys(
        ("packages", "hardware", "engine", "backbone", "registry", "versions", "streams"), True
    )


@pytest.mark.usefixtures("serving")
def test_pushed_photographs_come_back_judged(user: User) -> None:
    told = user.json("push", "data/mono/test", "--category", "mono", "--wait", "--json", "--redis", user.redis)
    files = {str(file.relative_to(user.folder)) for file in (user.folder / "data/mono/test").rglob("*.png")}
    assert {one["file"] for one in told} == files
    assert len(told) == 18
    assert all(one["verdict"] == ("anomalous" if one["score"] > one["threshold"] else "normal") for one in told)
    defective = [one["score"] for one in told if "defective" in one["file"]]
    good = [one["score"] for one in told if "good" in one["file"]]
    assert sum(defective) / len(defective) > sum(good) / len(good)


@pytest.mark.usefixtures("serving")
def test_image_of_a_producer_without_our_code_is_seen_by_watch(user: User) -> None:
    image = next((user.folder / "data/mono/test/good").iterdir()).read_bytes()
    with RawRedis(user.port) as redis:
        entry_id = redis("XADD", "flawstream:images", "*", "category", "mono", "image", image, "station", "7")
        assert isinstance(entry_id, bytes)
        seen: list[Any] = []
        while not any(one["id"] == entry_id.decode() for one in seen):
            results = redis.count("XLEN", "flawstream:results")
            seen = user.json(
                "watch", "-n", max(1, results), "--since", 0, "--maps", "maps", "--json", "--redis", user.redis
            )
    found = next(one for one in seen if one["id"] == entry_id.decode())
    assert found["category"] == "mono"
    assert found["extra"] == {"station": "7"}
    assert (user.folder / "maps" / f"{found['entry_id']}.jpg").read_bytes().startswith(b"\xff\xd8")


@pytest.mark.usefixtures("serving")
def test_file_that_is_no_image_is_a_dead_letter_that_can_be_looked_at(user: User) -> None:
    (user.folder / "broken.png").write_bytes(b"\x89PNG no more")
    push = ("push", "broken.png", "--category", "mono", "--wait", "--json", "--redis", user.redis)
    (told,) = user.json(*push, code=1)
    assert (told["file"], told["reason"]) == ("broken.png", "undecodable")
    listed = user.json("dead", "list", "--json", "--redis", user.redis)
    assert [(one["reason"], one["fields"]["file"]) for one in listed] == [("undecodable", "broken.png")]
    (shown,) = user.json("dead", "show", listed[0]["dead_id"], "--image", "refused.bin", "--redis", user.redis)
    assert shown == listed[0]
    assert (user.folder / "refused.bin").read_bytes() == b"\x89PNG no more"


@pytest.mark.usefixtures("serving")
def test_http_api_judges_a_photograph_and_gives_its_map(user: User) -> None:
    image = next((user.folder / "data/mono/test/defective").iterdir()).read_bytes()
    query = {"category": "mono", "map": "grid-f16", "id": "by-http"}
    answer = httpx.post(f"{user.addresses['api']}/v1/detect", params=query, content=image, timeout=60)
    assert answer.status_code == 200
    told = answer.json()
    assert (told["id"], told["image_shape"]) == ("by-http", [300, 300])
    encoded = told["map"] | {"data": base64.b64decode(told["map"]["data"])}
    assert decode_map(AnomalyMap(**encoded)).shape == (64, 64)


def test_second_service_is_refused_the_folder_of_the_first(user: User, serving: subprocess.Popen[str]) -> None:
    ran = user.run("serve", "--port", 1, code=3)
    assert "another server uses the folder" in ran.stderr
    assert ran.stdout == ""
    assert serving.poll() is None


def test_ctrl_c_ends_the_service_in_order_and_leaves_no_process_behind(
    user: User, serving: subprocess.Popen[str]
) -> None:
    children = descendants(serving.pid)
    assert len(children) > 5
    os.killpg(serving.pid, signal.SIGINT)
    rest, _ = serving.communicate(timeout=PATIENCE_S)
    log = (user.folder / "serve.log").read_text(encoding="utf-8")
    assert serving.returncode == 0, log
    assert rest == ""
    assert log.splitlines()[-1] == "stopped"
    assert "Traceback" not in log
    assert "INFO" not in log

    def left() -> set[int]:
        return {pid for pid in children if is_running(pid)}

    wait_until(lambda: not left(), lambda: f"the last ones are killed, {left()} are still there")
