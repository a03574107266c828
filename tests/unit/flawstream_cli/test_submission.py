"""What of a command travels with a job."""

from pathlib import Path

import pytest

from flawstream_cli.submission import _environment, _passed_on
from flawstream_cli.terminal import read_settings


@pytest.mark.parametrize(
    ("arguments", "passed_on"),
    [
        (["train", "s3://b/d", "--submit", "http://h:1"], ["train", "s3://b/d"]),
        (["train", "--submit=http://h:1", "s3://b/d", "--follow"], ["train", "s3://b/d"]),
        (["train", "d", "--config", "a.yaml", "--no-follow", "-c", "x", "--json"], ["train", "d", "-c", "x", "--json"]),
        (["train", "d", "--ray", "auto", "--epochs=3"], ["train", "d", "--epochs=3"]),
    ],
)
def test_options_of_this_machine_are_not_passed_on(arguments: list[str], passed_on: list[str]) -> None:
    assert list(_passed_on(arguments)) == passed_on


def test_settings_of_training_travel_and_passwords_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: {strides: [16, 32], preset: null}\ntraining: {epochs: 7, int8: false}\nredis: {password: x}\n"
    )
    monkeypatch.setenv("FLAWSTREAM_TRAINING__EPOCHS", "9")
    environment = _environment(read_settings(file, registry={"root": "s3://models"}))
    assert environment == {
        "FLAWSTREAM_MODEL__STRIDES": "[16, 32]",
        "FLAWSTREAM_TRAINING__EPOCHS": "9",
        "FLAWSTREAM_TRAINING__INT8": "false",
        "FLAWSTREAM_REGISTRY__ROOT": "s3://models",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _environment(read_settings(None)) == environment
