"""`flawstream acl`: prints ACL users for the stream server, with only the rights that each role needs."""

from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer

from flawstream_cli.terminal import ConfigOption, out, print_message, read_settings
from schemas.errors import ConfigError
from workers.acl import HASH_PLACEHOLDER, Role, access_rules, user_line

_KEY_REFERENCE = "key:"


class Format(StrEnum):
    """Syntax of the printed line."""

    COMMANDS = "commands"
    ACLFILE = "aclfile"


def acl(
    role: Annotated[
        Role,
        typer.Argument(
            help="producer: pushes images. worker: `flawstream worker`. reader: reads results. "
            "operator: `flawstream dead`. service: `flawstream serve`, which is worker and producer."
        ),
    ],
    prefix: Annotated[
        str | None, typer.Option(help="Prefix of every key; by default `redis.prefix` of the settings.")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="Number of shards; by default `redis.shards` of the settings."),
    ] = None,
    user: Annotated[str | None, typer.Option(help="Name of the user; by default PREFIX-ROLE.")] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="File that holds the password. Only its SHA-256 is printed.")
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="commands: for redis-cli. aclfile: for the server's `aclfile`.")
    ] = Format.COMMANDS,
    config: ConfigOption = None,
) -> None:
    """Print an ACL user for the stream server, with only the rights that its role needs.

    Example: `flawstream acl producer --user camera-7 --password-file secret.txt | redis-cli`
    """
    settings = read_settings(config, redis={"prefix": prefix, "shards": shards})
    references = [
        start.removeprefix(_KEY_REFERENCE) for start in settings.references.allow if start.startswith(_KEY_REFERENCE)
    ]
    rules = access_rules(role, settings.redis.prefix, settings.redis.shards, references)
    digest = None if password_file is None else _digest(password_file)
    name = user or f"{settings.redis.prefix}-{role}"
    # not through rich, which would break the line
    print(user_line(name, rules, digest, acl_file=format_ is Format.ACLFILE), file=out.file)
    if digest is None:
        print_message(f"replace {HASH_PLACEHOLDER} by the password's SHA-256, or use --password-file")


def _digest(password_file: Path) -> str:
    password = password_file.read_text(encoding="utf-8").strip()
    if not password:
        raise ConfigError(f"the password file {password_file} is empty")
    return sha256(password.encode()).hexdigest()
