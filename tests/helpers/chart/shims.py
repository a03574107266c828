"""What stands in for a program on the page's PATH: `python shims.py PROGRAM ARGUMENTS`. It notes how it was called.

Where the real thing can be had, it is the real thing that runs: what `kubectl exec` runs in a pod runs here, with the
pod's folders elsewhere; Helm packs charts; curl and Redis commands go to real servers, at the ports that there are.
"""

import base64
import json
import os
import sys
from pathlib import Path

HOME = Path(os.environ["PAGE_HOME"])
"""Of what is noted, of Secrets, and of the pod's folders."""

GIVEN_BY_THE_CLUSTER = {
    "rayservice": "line-flawstream-x7k2p",
    "auth_token": base64.b64encode(b"of-the-cluster").decode(),
}


def main(program: str, arguments: list[str]) -> None:  # noqa: C901 - a case for each
    """Note the call, and do what can be done."""
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([program, *arguments]) + "\n")
    match [program, *arguments[2 * (arguments[:1] == ["--namespace"]) :]]:
        case ["kubectl", "exec", *_]:
            _run(*arguments[arguments.index("--") + 1 :])
        case ["kubectl", "create", "secret", _, name, *literals]:
            pairs = (one.removeprefix("--from-literal=").partition("=") for one in literals if "--from-literal" in one)
            (HOME / f"secret-{name}.json").write_text(json.dumps({key: value for key, _, value in pairs}))
        case ["kubectl", "get", "secret", name, "--output", path] if path.startswith("jsonpath={.data."):
            key = path.removeprefix("jsonpath={.data.").removesuffix("}")
            file = HOME / f"secret-{name}.json"
            text = json.loads(file.read_text())[key] if file.exists() else ""
            sys.stdout.write(base64.b64encode(text.encode()).decode() if text else GIVEN_BY_THE_CLUSTER[key])
        case ["kubectl", "get", "rayservice", _, "--output", _]:
            sys.stdout.write(GIVEN_BY_THE_CLUSTER["rayservice"])
        case ["helm", "package", chart]:
            import helm_python  # noqa: PLC0415 - the others do without

            helm_python.package(chart, destination=Path.cwd())
        case ["helm", "pull", _, "--version", version]:
            Path(f"kuberay-operator-{version}.tgz").write_text("in place of another's chart")
        case ["docker", "save", "--output", file, _]:
            Path(file).write_text("in place of an image")
        case ["docker", "load", "--input", file]:
            Path(file).read_text()
        case ["git", "rev-parse", "HEAD"]:
            sys.stdout.write("0" * 40)
        case ["curl", *rest]:
            here = f"127.0.0.1:8000:127.0.0.1:{os.environ['PAGE_API']}"
            os.execv(os.environ["PAGE_CURL"], ["curl", "--silent", "--connect-to", here, *rest])  # noqa: S606 - the page's own
        case ["redis-cli", *rest]:
            _redis(rest)


def _run(program: str, *arguments: str) -> None:
    """Run here what would run in a pod."""
    moved = [_moved(one) for one in arguments]
    if program == "flawstream":
        os.execv(sys.executable, [sys.executable, "-m", "flawstream_cli", *moved])  # noqa: S606 - our own program
    os.execvp(program, [program, *moved])  # noqa: S606 - the page's own line


def _moved(text: str) -> str:
    for folder in ("/data", "/models", "/tmp/part.png"):  # noqa: S108 - the pod's
        text = text.replace(folder, f"{HOME}/pod{folder}")
    return text


def _redis(arguments: list[str]) -> None:
    from helpers.raw_redis import RawRedis  # noqa: PLC0415 - the others do without

    last = [sys.stdin.buffer.read()] if arguments[0] == "-x" else []
    with RawRedis(int(os.environ["PAGE_REDIS"])) as redis:
        redis("AUTH", os.environ["REDISCLI_AUTH"])
        sys.stdout.write(repr(redis(*(one for one in arguments if one != "-x"), *last)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
