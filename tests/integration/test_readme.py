"""README's blocks print the verdict of the image they push, whatever else is on the stream and under way."""

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.fakes import png
from helpers.places import ROOT, TESTS
from helpers.raw_redis import RawRedis
from helpers.stream_work import working
from helpers.tiny_models import SPEC, TinyEngine, write_version
from helpers.waiting import wait_until_async

from flawstream.registry.registry import Registry
from schemas.settings import DetectorSettings, RedisSettings, Settings
from serving.detector import DetectorService
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

DARK, BRIGHT = 50, 220
"""Grey levels: `TinyEngine` scores them 0.5, which is normal, and 2.2, which is anomalous."""

after_others = pytest.mark.parametrize("others", [0, 3], ids=["on-an-empty-stream", "after-results-of-others"])


def blocks(language: str) -> str:
    """Give README's blocks of a language under the heading of pushing, one after the other."""
    section = (ROOT / "README.md").read_text().split("## Push an image from any language")[1].split("\n## ")[0]
    found = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", section)
    assert found
    return "\n".join(found)


def at_port(text: str, default: str, client: str) -> str:
    """Name the test's server where a block takes the default one."""
    assert text.count(default) == 1
    return text.replace(default, client)


def port_of(settings: RedisSettings) -> int:
    return int(settings.url.rsplit(":", 1)[1].split("/")[0])


def node_modules() -> Path | None:
    """Find npm's global packages if redis is among them."""
    if (npm := shutil.which("npm")) is None:
        return None
    found = subprocess.run([npm, "root", "--global"], check=True, capture_output=True, text=True)  # noqa: S603 - npm's own
    modules = Path(found.stdout.strip())
    return modules if (modules / "redis").is_dir() else None


async def output_of(command: Sequence[str], settings: RedisSettings, folder: Path, others: int) -> str:
    """Run a command that pushes `part.png`, a bright one, while a worker judges it and dark images of others.

    Args:
        command: It pushes one image and prints what came of it.
        settings: Where an empty server is.
        folder: Where the command runs.
        others: Results of other images that are on the stream before.

    Returns:
        The command's standard output.
    """
    (folder / "part.png").write_bytes(png(BRIGHT))
    registry = Registry(str(folder / "models"))
    write_version(registry, "bottle")
    detector = DetectorService(registry, TinyEngine(SPEC), DetectorSettings())
    await detector.start()

    with RawRedis(port_of(settings)) as raw:

        def push_other(number: int) -> None:
            raw("XADD", "flawstream:images", "*", "category", "bottle", "id", f"other-{number}", "image", png(DARK))

        async def length_is(stream: str, length: int) -> bool:
            return raw.count("XLEN", stream) == length

        async with make_client(settings) as client:
            for number in range(others):
                push_other(number)
            async with working(ShardedWorker(client, "before", detector, Settings(redis=settings))):
                await wait_until_async(lambda: length_is("flawstream:results", others), "the results of the others")
            push_other(others)  # its result comes after the block has noted the stream's end, and before its own
            process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=subprocess.PIPE)
            await wait_until_async(lambda: length_is("flawstream:images", 2), "the block has pushed its image")
            async with working(ShardedWorker(client, "now", detector, Settings(redis=settings))):
                printed, _ = await process.communicate()
        results = [fields["verdict"] for _, fields in raw.entries("flawstream:results")]
    await detector.stop()
    assert results == [b"normal"] * (others + 1) + [b"anomalous"]
    assert process.returncode == 0
    return printed.decode()


@pytest.mark.parametrize("cli", ["redis-cli", "stand-in"])
@after_others
async def test_shell_block_prints_the_verdict_of_its_own_image(
    cli: str, others: int, redis_settings: RedisSettings, tmp_path: Path
) -> None:
    program = ["env", f"PYTHONPATH={TESTS}", sys.executable, "-m", "helpers.redis_cli", str(port_of(redis_settings))]
    if cli == "redis-cli":
        if (real := shutil.which("redis-cli")) is None:
            pytest.skip("redis-cli is not installed (Debian: redis-tools); the stand-in runs the block")
        program = [real, "-p", str(port_of(redis_settings))]
    line = " ".join(f'"{part}"' for part in program)
    command = ["bash", "-c", f'redis-cli() {{ {line} "$@"; }}\n{blocks("bash")}']
    entry_id, *printed = (await output_of(command, redis_settings, tmp_path, others)).splitlines()
    assert re.fullmatch(r"\d+-\d+", entry_id)
    assert printed[:-1] == ["camera7-42", "category", "bottle", "verdict", "anomalous", "model", "bottle@v1", "score"]
    assert float(printed[-1]) == pytest.approx(2.2)


@after_others
async def test_python_blocks_print_the_verdict_of_their_own_image_and_read_its_map(
    others: int, redis_settings: RedisSettings, tmp_path: Path
) -> None:
    text = at_port(blocks("python"), "redis.Redis()", f"redis.Redis(port={port_of(redis_settings)})")
    plain, typed = (await output_of([sys.executable, "-c", text], redis_settings, tmp_path, others)).splitlines()
    verdict, score = plain.split()
    assert verdict == "anomalous"
    assert float(score) == pytest.approx(2.2)
    assert typed.startswith("anomalous (Box(x=0, y=0, width=8, height=8, ")
    assert float(typed.split()[-1]) == pytest.approx(2.2, rel=1e-3)  # the map is float16


@after_others
async def test_node_block_prints_the_verdict_of_its_own_image(
    others: int, redis_settings: RedisSettings, tmp_path: Path
) -> None:
    if (modules := node_modules()) is None:
        pytest.skip("Node's package redis is not installed (npm install --global redis)")
    (tmp_path / "node_modules").symlink_to(modules)
    script = tmp_path / "block.mjs"
    script.write_text(at_port(blocks("js"), "createClient()", f"createClient({{ url: '{redis_settings.url}' }})"))
    verdict, score = (await output_of(["node", str(script)], redis_settings, tmp_path, others)).split()
    assert verdict == "anomalous"
    assert float(score) == pytest.approx(2.2)
