"""Access rules (ACL) for the server's users: what each role needs, and nothing else. Knows no server and no password.

A rule has selectors (Redis 7, Valkey): each grants its commands on its own keys only, so that a producer may SET the
keys that remember ids, and no stream. Scripts run with their caller's rights, so a role is granted all that its
scripts call.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from schemas.errors import ConfigError
from schemas.keys import StreamKeys

HASH_PLACEHOLDER = "<sha256-of-the-password-in-hex>"

_SAFE = re.compile(r"[A-Za-z0-9._:@/{}*?\[\]\\^-]+")
"""Blanks separate the parts of a rule, and a shell, redis-cli and an ACL file each read quotes differently."""
_USER = re.compile(r"[A-Za-z0-9._@-]+")
_SCRIPTS = "eval evalsha"
_CONNECTION = "ping select client|setinfo"
_CLUSTER = "asking cluster|nodes cluster|shards cluster|slots command"
"""Each client library asks for a cluster's layout by one of these."""


class Role(StrEnum):
    """The role that a user of the server has."""

    PRODUCER = "producer"
    WORKER = "worker"
    READER = "reader"
    OPERATOR = "operator"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class _Grant:
    """Commands, and the keys they may use: names of `StreamKeys`, separated by blanks; empty for commands without."""

    commands: str
    keys: str = ""


_PRODUCER = (
    _Grant("wait waitaof"),
    _Grant(_SCRIPTS, "images image_bytes seen counters"),
    _Grant("xadd xlen exists memory|usage", "images"),
    _Grant("get set", "seen image_bytes"),
    _Grant("hincrby", "counters"),
)
_WORKER = (
    _Grant("time"),
    _Grant(_SCRIPTS, "images results dead counters workers lease"),
    _Grant(
        "xreadgroup xack xdel xlen xrange xpending xclaim xautoclaim "
        "xgroup|create xgroup|delconsumer xinfo|groups xinfo|consumers",
        "images",
    ),
    _Grant("xadd xlen", "results dead"),
    _Grant("xtrim xpending xinfo|groups", "results"),
    _Grant("hincrby hgetall", "counters"),
    _Grant("hincrby hget hgetall hdel", "workers"),
    _Grant("get pttl set", "lease"),
    _Grant("get append", "seen"),
    _Grant("set", "outcomes_since"),
)
_GRANTS = {
    Role.PRODUCER: _PRODUCER,
    Role.WORKER: _WORKER,
    Role.READER: (
        _Grant(
            f"{_SCRIPTS} xread xreadgroup xack xpending xautoclaim xrange xlen xgroup|create xinfo|stream", "results"
        ),
    ),
    Role.OPERATOR: (
        _Grant(_SCRIPTS, "images image_bytes dead seen counters"),
        _Grant("xread xrange xrevrange xlen xdel xtrim xinfo|stream", "dead"),
        _Grant("xadd xlen memory|usage", "images"),
        _Grant("get set", "image_bytes"),
        _Grant("set", "seen"),
        _Grant("hincrby", "counters"),
    ),
    Role.SERVICE: (*_PRODUCER, *_WORKER),
}


def access_rules(role: Role, prefix: str, shards: int = 0, references: Sequence[str] = ()) -> str:
    """Return the rules of a role, in the form of `ACL SETUSER` and of ACL files.

    Args:
        role: The role.
        prefix: Prefix of every key (`redis.prefix`).
        shards: Sets of streams (`redis.shards`); the rules allow more later, up to the next power of ten.
        references: Prefixes of the keys that images are fetched from by reference; for workers only.

    Raises:
        ConfigError: A name has characters that no rule can hold.
    """
    connection = _CONNECTION if not shards else f"{_CONNECTION} {_CLUSTER}"
    parts = ["resetkeys", "resetchannels", "-@all", _allow(connection)]
    for grant in _GRANTS[role]:
        patterns = " ".join(f"~{base}{suffix}" for base in _bases(prefix, shards) for suffix in _suffixes(grant.keys))
        parts.append(f"({patterns} {_allow(grant.commands)})" if patterns else _allow(grant.commands))
    if references and role in (Role.WORKER, Role.SERVICE):
        patterns = " ".join(f"%R~{_literal(start)}*" for start in references)
        parts.append(f"({patterns} {_allow('get strlen')})")
    return " ".join(parts)


def user_line(user: str, rules: str, password_sha256: str | None = None, *, acl_file: bool = False) -> str:
    """Return a user and its rules as one line, for `redis-cli` or for an ACL file.

    Args:
        user: The user's name.
        rules: From `access_rules`.
        password_sha256: In hex; absent: a placeholder to be replaced.
        acl_file: Return the form of the server's `aclfile`.

    Raises:
        ConfigError: The name has characters that no rule can hold.
    """
    if not _USER.fullmatch(user):
        raise ConfigError(f"the user's name {user!r} may have letters, digits, '.', '_', '@' and '-' only")
    secret = f"#{password_sha256 or HASH_PLACEHOLDER}"
    return f"user {user} on {secret} {rules}" if acl_file else f"ACL SETUSER {user} reset on {secret} {rules}"


def _allow(commands: str) -> str:
    return " ".join(f"+{command}" for command in commands.split())


def _suffixes(names: str) -> list[str]:
    keys = (getattr(StreamKeys(prefix=""), name) for name in names.split())
    return [key("*") if callable(key) else key for key in keys]  # of every id, or of every consumer


def _bases(prefix: str, shards: int) -> list[str]:
    """Return patterns of the prefixes of keys; a shard is digits only, so that no producer's id can look like one."""
    literal = _literal(prefix)
    if not shards:
        return [literal]
    digits = len(str(shards - 1))
    return [f"{literal}:{{{'[0-9]' * length}}}" for length in range(1, digits + 1)]


def _literal(text: str) -> str:
    """Escape a text so that a pattern matches it alone."""
    if not _SAFE.fullmatch(text):
        raise ConfigError(
            f"{text!r} cannot be part of an access rule; use letters, digits and any of . _ - : @ / {{ }} in key names"
        )
    return re.sub(r"[*?\[\]\\]", r"\\\g<0>", text)
