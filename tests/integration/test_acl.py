"""What `flawstream acl` prints: rights enough for every script, in a line that a server takes."""

import re
from hashlib import sha256
from pathlib import Path

import pytest
from helpers.acl_plant import PASSWORD
from helpers.command_line import make_run
from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.redis_servers import running as running_server

from flawstream_cli.terminal import ExitCode
from schemas.errors import ConfigError
from workers.acl import HASH_PLACEHOLDER, Role, access_rules, user_line
from workers.redis import scripts as scripts_module

SCRIPTS = Path(scripts_module.__file__).parent / "lua"
WHO_RUNS = {
    "ask_capacity.lua": (Role.PRODUCER, Role.SERVICE),
    "measure_backlog.lua": (Role.WORKER, Role.SERVICE),
    "claim.lua": (Role.WORKER, Role.SERVICE),
    "count_refusal.lua": (Role.PRODUCER, Role.SERVICE, Role.OPERATOR),
    "repair_pending.lua": (Role.WORKER, Role.SERVICE),
    "remove_stale_consumers.lua": (Role.WORKER, Role.SERVICE),
    "list_dead_letters.lua": (Role.OPERATOR,),
    "_owned_by.lua": (Role.WORKER, Role.SERVICE),
    "publish_outcomes.lua": (Role.WORKER, Role.SERVICE),
    "push_image.lua": (Role.PRODUCER, Role.SERVICE),
    "read_new.lua": (Role.WORKER, Role.SERVICE),
    "release.lua": (Role.WORKER, Role.SERVICE),
    "replay_dead_letter.lua": (Role.OPERATOR,),
    "trim.lua": (Role.WORKER, Role.SERVICE),
    "_capacity.lua": (Role.PRODUCER, Role.SERVICE, Role.OPERATOR),
    "hold_lease.lua": (Role.WORKER, Role.SERVICE),
    "heartbeat.lua": (Role.WORKER, Role.SERVICE),
    "shard_heartbeat.lua": (Role.WORKER, Role.SERVICE),
}
"""Whoever adds a script says here who runs it."""
TOLD = {"list_dead_letters.lua": {"command": ("XRANGE", "XREVRANGE")}}
"""Commands that a script is told by its caller, by the name of the variable."""
OPTIONAL = {(Role.PRODUCER, "push_image.lua"): {"xrange"}}
"""Commands that a script tries and can do without: no producer reads images."""


def granted(role: Role) -> set[str]:
    return set(re.findall(r"\+([a-z|]+)", access_rules(role, "flawstream", 12)))


def called(script: str) -> set[str]:
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    for name, commands in TOLD.get(script, {}).items():
        text = text.replace(f"redis.call({name},", " ".join(f"redis.call('{command}'," for command in commands))
    containers = {"XINFO", "XGROUP", "MEMORY", "OBJECT", "CONFIG", "SCRIPT", "CLIENT", "FUNCTION"}
    calls = re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", text)
    assert len(calls) == len(re.findall(r"redis\.p?call\b", text)), "a call whose command this test cannot read"
    return {f"{name}|{sub}".lower() if name in containers else name.lower() for name, sub in calls}


def test_who_runs_each_script_is_known_here() -> None:
    assert set(WHO_RUNS) == {path.name for path in SCRIPTS.rglob("*.lua")}


@pytest.mark.parametrize("script", WHO_RUNS)
def test_script_calls_nothing_that_its_callers_may_not(script: str) -> None:
    for role in WHO_RUNS[script]:
        assert called(script) - OPTIONAL.get((role, script), set()) <= granted(role)


def test_command_prints_users_who_can_push_and_look_at_dead_letters(
    acl_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = make_run(monkeypatch, capsys)
    (tmp_path / "password").write_text(f"{PASSWORD}\n", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setenv("FLAWSTREAM_REDIS__PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("FLAWSTREAM_REDIS__URL", acl_server.url)
    for role in (Role.PRODUCER, Role.OPERATOR):
        printed = run("acl", role, "--password-file", tmp_path / "password")
        assert PASSWORD not in printed.out + printed.err
        with RawRedis(acl_server.port) as raw:
            raw(*printed.out.split())
    monkeypatch.setenv("FLAWSTREAM_REDIS__USERNAME", "flawstream-producer")
    assert run("push", tmp_path / "a.png", "-c", "bottle").code == 0
    assert run("dead", "list").code == ExitCode.CANNOT_START
    monkeypatch.setenv("FLAWSTREAM_REDIS__USERNAME", "flawstream-operator")
    assert run("dead", "list").code == 0


def test_command_prints_one_line_however_long_and_says_what_is_to_be_filled_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(monkeypatch, capsys)
    as_file = run("acl", "service", "--shards", 1024, "--user", "node-1", "--format", "aclfile")
    (line,) = as_file.out.splitlines()
    assert line.startswith(f"user node-1 on #{HASH_PLACEHOLDER} ")
    assert HASH_PLACEHOLDER in as_file.err
    monkeypatch.setenv("FLAWSTREAM_REFERENCES__ALLOW", '["key:frames:"]')
    assert "(%R~frames:* +get +strlen)" in run("acl", "worker").out
    assert "frames" not in run("acl", "producer").out


def test_server_takes_the_line_as_its_acl_file(tmp_path: Path) -> None:
    line = user_line("camera", access_rules(Role.PRODUCER, "flawstream"), sha256(b"secret").hexdigest(), acl_file=True)
    (tmp_path / "users.acl").write_text(f"user default on nopass ~* +@all\n{line}\n", encoding="utf-8")
    server = Server(tmp_path / "server", f"aclfile {tmp_path / 'users.acl'}")
    with running_server(server), RawRedis(server.port) as raw:
        raw("AUTH", "camera", "secret")
        raw("XADD", "flawstream:images", "*", "category", "bottle", "image", "x")
        with pytest.raises(RuntimeError, match="NOPERM"):
            raw("XRANGE", "flawstream:images", "-", "+")


@pytest.mark.parametrize("name", ["two words", "a)", 'a"b', "", "neue\nzeile", "~*"])
def test_name_that_would_break_a_rule_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        user_line(name, access_rules(Role.READER, "flawstream"))
    with pytest.raises(ConfigError):
        access_rules(Role.READER, name)


def test_line_of_an_acl_file_has_the_same_rules() -> None:
    rules = access_rules(Role.READER, "flawstream")
    command = user_line("line", rules, "0" * 64)
    in_file = user_line("line", rules, "0" * 64, acl_file=True)
    assert command.removeprefix("ACL SETUSER line reset ") == in_file.removeprefix("user line ")
    assert "password" in user_line("line", rules)
