"""The command line without a service: help, errors, exit codes, the registry's commands, what reaches the terminal."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.command_line import Ran, Run, make_run
from helpers.tiny_models import SPEC, write_version
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from flawstream.registry.registry import Registry
from flawstream_cli import terminal
from flawstream_cli.main import COMMANDS, load_command
from schemas.errors import ConfigError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(monkeypatch, capsys)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(str(tmp_path / "models"))
    for version in ("v1", "v2"):
        write_version(registry, "bottle", version)
    write_version(registry, "cable", "v1", promote=False)
    return registry


def commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        inner = getattr(load_command(name), "commands", None)
        found += [(name,)] if inner is None else [(name, one) for one in inner]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_of_every_command_shows_an_example(run: Run, command: tuple[str, ...]) -> None:
    ran = run(*command, "--help")
    assert ran.code == 0
    assert f"Example: flawstream {' '.join(command)}" in " ".join(ran.out.replace("`", "").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_in_the_list_is_how_the_command_describes_itself(name: str) -> None:
    described: str = load_command(name).help
    assert COMMANDS[name].rstrip(".").split(" ")[:3] == described.split(" ")[:3] or name == "demo"


def test_no_command_shows_the_help(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert all(name in ran.out + ran.err for name in COMMANDS)


def test_unknown_command_is_a_usage_error(run: Run) -> None:
    ran = run("serv")
    assert ran.code == 2
    assert "No such command 'serv'" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["push", "--help"],
        ["watch", "--help"],
        ["dead", "list", "--help"],
        ["profile"],
        ["capture", "usb", "--help"],
    ],
)
def test_commands_without_a_model_load_neither_torch_nor_ray(arguments: list[str]) -> None:
    program = (
        "import sys, contextlib\n"
        "from flawstream_cli.main import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True)  # noqa: S603 - our own interpreter
    assert ran.returncode == 0


def test_version_is_printed(run: Run) -> None:
    assert run("--version") == Ran(0, "0.1.0\n", "")


def test_unknown_settings_section_is_refused_with_a_hint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_REDS__URL", "redis://plant:6379/0")
    ran = run("models", "list")
    assert ran.code == 3
    assert "did you mean FLAWSTREAM_REDIS?" in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "{folder}", "--input-size", "50"), "model.input_size: Input should be a multiple of 32"),
        (
            ("serve", "--engine", "warp"),
            "detector.engine: Input should be 'auto', 'cuda', 'torch', 'openvino', 'ncnn' or 'triton'",
        ),
        (("watch", "--redis", "redis://:secret@plant/0"), "redis.url: Value error, a password must not be in"),
        (("watch", "--redis", "http://plant"), "redis.url has the scheme 'http'"),
        (("serve", "--redis", "redis://plant:6379/0", "--redis-port", "7000"), "leave one of them out"),
        (("push", "{folder}", "-c", "bottle"), "no images in {folder}"),
        (("capture", "folder", "{folder}/none"), "{folder}/none is not a folder"),
        (("capture", "folder", "{folder}", "--rule", "("), "is no regular expression"),
        (("capture", "folder", "{folder}", "--done", "{folder}/.."), "moved files would be pushed again"),
        (("capture", "usb", "0", "-c", "../x"), "'../x' cannot be a category"),
        (("capture", "rtsp", "rtsp://camera7/", "-c", "x", "--password-file", "x"), "needs a URL with a user"),
        (("train", "{folder}"), "has no category"),
        (("evaluate", "{folder}/none"), "does not exist"),
        (("models", "list", "--config", "{folder}/none.yaml"), "cannot read the settings file"),
        (("models", "show", "bottle", "--registry", "{folder}"), "category 'bottle' has no current version"),
        (("models", "promote", "../x", "v1", "--registry", "{folder}"), "cannot be a category"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_wrong_setting_or_argument_is_told_in_one_message(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    ran = run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("error (")
    assert told.format(folder=tmp_path) in ran.err
    assert "secret" not in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    "arguments", [("dead", "show", "foo"), ("dead", "list", "--before", "1-"), ("watch", "--since", "now")]
)
def test_what_is_no_entry_id_is_a_usage_error(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "is no" in ran.err


def test_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run("watch", "--maps", tmp_path / "file" / "maps")
    assert (ran.code, ran.out) == (1, "")
    assert f"{tmp_path / 'file' / 'maps'}: Not a directory" in ran.err


def test_models_list_marks_the_current_version(run: Run, registry: Registry, tmp_path: Path) -> None:
    del registry
    ran = run("models", "list", "--registry", tmp_path / "models")
    assert (ran.code, ran.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in ran.out.splitlines() if "│" in line]
    assert rows == [["bottle", "v1", ""], ["bottle", "v2", "*"], ["cable", "v1", ""]]


def test_models_list_as_json_is_one_document(run: Run, registry: Registry, tmp_path: Path) -> None:
    del registry
    ran = run("models", "list", "bottle", "--json", "--registry", tmp_path / "models")
    listed = json.loads(ran.out)
    assert [(one["version"], one["current"]) for one in listed] == [("v1", False), ("v2", True)]
    assert ran.err == ""


def test_models_list_shows_the_others_where_one_is_damaged(run: Run, registry: Registry, tmp_path: Path) -> None:
    del registry
    (tmp_path / "models" / "bottle" / "v1" / "manifest.json").write_text("{", encoding="utf-8")
    ran = run("models", "list", "--json", "--registry", tmp_path / "models")
    assert ran.code == 1
    assert [(one["category"], one["version"]) for one in json.loads(ran.out)] == [("bottle", "v2"), ("cable", "v1")]
    assert "damaged" in ran.err


def test_models_list_of_an_empty_registry_says_how_to_fill_it(run: Run, tmp_path: Path) -> None:
    ran = run("models", "list", "--registry", tmp_path)
    assert (ran.code, ran.out) == (0, "")
    assert "flawstream train" in ran.err


def test_models_show_prints_the_current_manifest(run: Run, registry: Registry, tmp_path: Path) -> None:
    ran = run("models", "show", "bottle", "--registry", tmp_path / "models")
    assert json.loads(ran.out) == registry.manifest("bottle", "v2").model_dump(mode="json")


def test_models_report_of_a_version_without_one_says_what_to_do(run: Run, registry: Registry, tmp_path: Path) -> None:
    del registry
    ran = run("models", "report", "bottle", "--to", tmp_path / "page.html", "--registry", tmp_path / "models")
    assert (ran.code, ran.out) == (3, "")
    assert "bottle@v2 has no report" in ran.err
    assert "flawstream evaluate --report" in ran.err
    assert not (tmp_path / "page.html").exists()


def test_models_show_of_a_version_that_is_not_there_lists_those_that_are(
    run: Run, registry: Registry, tmp_path: Path
) -> None:
    del registry
    ran = run("models", "show", "bottle", "v9", "--registry", tmp_path / "models")
    assert (ran.code, ran.out) == (3, "")
    assert "it has: v1, v2" in ran.err


def test_models_promote_rolls_back(run: Run, registry: Registry, tmp_path: Path) -> None:
    ran = run("models", "promote", "bottle", "v1", "--registry", tmp_path / "models")
    assert (ran.code, ran.out) == (0, "")
    assert "bottle@v1 is current" in ran.err
    assert registry.current("bottle") == "v1"


def test_models_promote_refuses_what_is_not_there(run: Run, registry: Registry, tmp_path: Path) -> None:
    assert run("models", "promote", "bottle", "v9", "--registry", tmp_path / "models").code == 3
    assert registry.current("bottle") == "v2"


def test_models_promote_takes_another_backbone(run: Run, registry: Registry, tmp_path: Path) -> None:
    write_version(registry, "tile", spec=SPEC.model_copy(update={"name": "other"}), promote=False)
    assert run("models", "promote", "tile", "v1", "--registry", tmp_path / "models").code == 0
    assert registry.currents() == {"bottle": "v2", "tile": "v1"}


def test_evaluate_names_all_categories_without_a_version(run: Run, tmp_path: Path) -> None:
    for category in ("bottle", "cable"):
        for folder in ("train/good", "test/good"):
            (tmp_path / category / folder).mkdir(parents=True)
            for number in range(10):
                (tmp_path / category / folder / f"{number}.png").touch()
    ran = run("evaluate", tmp_path, "--registry", tmp_path / "models")
    assert ran.code == 3
    assert "bottle, cable" in ran.err


def test_doctor_lists_settings_and_no_password(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_REDIS__PASSWORD", "swordfish")
    as_json = run("doctor", "--settings", "--json")
    assert json.loads(as_json.out)["detector"]["timeout_s"] == 60.0
    listed = run("doctor", "--settings")
    assert "FLAWSTREAM_DETECTOR__TIMEOUT_S" in listed.out
    assert "swordfish" not in as_json.out + listed.out
    assert (as_json.err, listed.err) == ("", "")


def test_setting_that_nobody_named_stays_unset() -> None:
    """`serve` starts its own stream server only where nobody named one."""
    settings = terminal.read_settings(None, redis={"url": None}, worker={"replicas": 2})
    assert "url" not in settings.redis.model_fields_set
    assert settings.worker.replicas == 2


def shown(print_to: Callable[[Console], Any]) -> str:
    console = Console(file=io.StringIO(), width=10_000, emoji=False, force_terminal=True, color_system="truecolor")
    print_to(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return str(text)


HOSTILE = st.text(st.one_of(st.sampled_from("[]/\\red\x1b\x07\x9b\u202e:boom"), st.characters(codec="utf-8")))


@given(HOSTILE)
@example("\\")  # rich's own escape() doubles a backslash at the end
@example("[red]\\")
def test_text_from_outside_reaches_the_terminal_without_control_characters_and_markup(text: str) -> None:
    printed = shown(lambda console: console.print(terminal.printable(text), highlight=False, soft_wrap=True))
    assert (
        printed
        == "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text) + "\n"
    )


@pytest.mark.parametrize("hostile", ["\x1b[2J", "[red]x[/]", "[/]", "a\x07b", "[link=http://evil]", "\u202e"])
def test_table_shows_hostile_cells_and_titles_as_text(hostile: str) -> None:
    printed = shown(lambda console: console.print(terminal.table(hostile, ["id"], [[hostile]]), style=None))
    body = "".join(line for line in printed.splitlines() if "│" in line)
    assert "\x1b[2J" not in printed
    assert "evil\x1b" not in body
    assert not {"\x07", "\u202e"} & set(printed)
    assert hostile.translate(dict.fromkeys((0x1B, 0x07, 0x202E), "\N{REPLACEMENT CHARACTER}")) in body


def test_json_has_null_for_a_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\x1b[2J"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": [None, 1.5], "c": "\x1b[2J"}
    assert "\x1b" not in printed


def test_names_of_any_bytes_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"gut_\xfc.png")
    terminal.print_json({name: [Path(name), name]})
    assert json.loads(capsys.readouterr().out) == {r"gut_\udcfc.png": [r"gut_\udcfc.png"] * 2}
    assert shown(lambda console: console.print(terminal.printable(name))) == "gut_\\udcfc.png\n"
    assert str(ConfigError(name)) == r"gut_\udcfc.png"


@pytest.mark.parametrize("text", ["1763900000000-0", "0", "17-3"])
def test_entry_ids_pass(text: str) -> None:
    assert terminal.entry_id(text) == text


@pytest.mark.parametrize("text", ["", "-1", "1-", "$", "1-2-3", "1\n"])
def test_what_is_no_entry_id_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        terminal.entry_id(text)
