"""The settings: who overrides whom, and that no typo passes in silence."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from flawstream_cli.terminal import read_settings
from schemas.errors import ConfigError
from schemas.presets import PRESETS, PresetName
from schemas.settings import ModelSettings, RedisSettings, Settings, load_settings

SECTIONS = [
    (name, field.annotation) for name, field in Settings.model_fields.items() if isinstance(field.annotation, type)
]
FIELDS = [
    (f"{section}.{name}", field)
    for section, model in SECTIONS
    if issubclass(model, BaseModel)
    for name, field in model.model_fields.items()
]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("FLAWSTREAM_"):
            monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_stand_alone() -> None:
    assert load_settings() == Settings()
    assert load_settings().redis.prefix == "flawstream"


def test_environment_overrides_file_overrides_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "worker: {batch_size: 4, in_flight: 5}\nredis: {prefix: plant}\n")
    monkeypatch.setenv("FLAWSTREAM_WORKER__BATCH_SIZE", "8")
    settings = load_settings(path)
    assert (settings.worker.batch_size, settings.worker.in_flight, settings.worker.max_deliveries) == (8, 5, 5)
    assert settings.redis.prefix == "plant"


def test_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_CONFIG", str(write(tmp_path, "redis: {prefix: plant}")))
    assert load_settings().redis.prefix == "plant"
    other = tmp_path / "other"
    other.mkdir()
    assert load_settings(write(other, "redis: {prefix: here}")).redis.prefix == "here"


def test_home_is_expanded_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/plant")
    path = write(tmp_path, "registry: {root: ~/models}\nredis: {password_file: ~/secret}\napi: {tokens_file: ~/tokens}")
    monkeypatch.setenv("FLAWSTREAM_MODEL__WEIGHTS", "~/own.safetensors")
    settings = load_settings(path)
    assert (settings.registry.root, settings.model.weights) == ("/home/plant/models", "/home/plant/own.safetensors")
    assert settings.redis.password_file == Path("/home/plant/secret")
    assert settings.api.tokens_file == Path("/home/plant/tokens")
    assert read_settings(None, registry={"root": "~/other"}).registry.root == "/home/plant/other"
    for root in ("s3://models/~a", "models/~", "auto"):
        assert read_settings(None, registry={"root": root}).registry.root == root
    with pytest.raises(ConfigError, match=r"registry\.root: .*that home is not known here; write the whole path"):
        read_settings(None, registry={"root": "~nobody-of-this-name/models"})


def test_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "# all defaults\n")) == Settings()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FLAWSTREAM_REDS__URL", "no section 'reds'; did you mean FLAWSTREAM_REDIS"),
        ("flawstream_reds__url", "no section 'reds'"),
        ("FLAWSTREAM_REDIS_URL", "no section 'redis_url'; did you mean FLAWSTREAM_REDIS"),
        ("FLAWSTREAM_WORKER__BATCHSIZE", r"worker\.batchsize"),
        ("FLAWSTREAM_API_PORT", "no section 'api_port'"),
    ],
)
def test_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.setenv(name, "8")
    with pytest.raises(ConfigError, match=words):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLAWSTREAM_SERVICE_HOST", "10.0.0.1"),
        ("FLAWSTREAM_SERVICE_PORT", "8000"),
        ("FLAWSTREAM_SERVICE_PORT_HTTP", "8000"),
        ("FLAWSTREAM_PORT", "tcp://10.0.0.1:8000"),
        ("FLAWSTREAM_HEAD_SVC_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("FLAWSTREAM_HEAD_SVC_PORT_8000_TCP_PROTO", "tcp"),
        ("FLAWSTREAM_HEAD_SVC_PORT_8000_TCP_PORT", "8000"),
        ("FLAWSTREAM_HEAD_SVC_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_typo(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reds: {url: x}", "reds"),
        ("redis: {urll: x}", r"redis\.urll"),
        ("redis: 5", "redis"),
        ("- redis", "must hold sections"),
        ("5: {}", "must hold sections"),
        ("redis: [", "cannot read the settings file"),
        ("worker: {batch_size: many}", r"worker\.batch_size"),
    ],
)
def test_file_that_is_wrong_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(write(tmp_path, text))


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("redis: {prefix: größe}".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        load_settings(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER__BATCH_SIZE", "0"),
        ("WORKER__BATCH_SIZE", "1025"),
        ("MODEL__INPUT_SIZE", "100"),
        ("MODEL__STRIDES", "[]"),
        ("MODEL__STRIDES", "8,16"),
        ("TRAINING__FALSE_ALARM_RATE", "0"),
        ("TRAINING__FALSE_ALARM_RATE", "1"),
        ("DETECTOR__ENGINE", "tensorrt"),
        ("WORKER__MAP_CODEC", "jpeg"),
        ("API__PORT", "65536"),
        ("REDIS__BLOCK_MS", "5000"),
        ("REDIS", "not json"),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_field(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FLAWSTREAM_{name}", value)
    with pytest.raises(ConfigError, match=name.split("__", maxsplit=1)[0].lower()):
        load_settings()


def test_tuple_is_read_from_the_environment_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_MODEL__STRIDES", "[4, 8]")
    assert load_settings().model.strides == (4, 8)


def test_password_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_REDIS__PASSWORD", "hunter2")
    settings = load_settings()
    assert settings.redis.password is not None
    assert settings.redis.password.get_secret_value() == "hunter2"
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in text


def test_password_in_the_url_is_refused_without_being_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSTREAM_REDIS__URL", "redis://user:hunter2@host:6379/0")
    with pytest.raises(ConfigError, match=r"redis\.password") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValidationError) as direct:
        RedisSettings(url="redis://:hunter2@host")
    assert "hunter2" not in str(direct.value)


@pytest.mark.parametrize("value", ['{"password": "hunter2"', '{"passwort": "hunter2"}', '["hunter2"]'])
def test_secret_in_a_malformed_variable_is_not_printed(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FLAWSTREAM_REDIS", value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=[name for name, _ in FIELDS])
def test_every_field_has_a_description_and_a_default(name: str, field: Any) -> None:
    assert field.description, f"{name} needs a description"
    assert field.description.endswith(".")
    assert not field.is_required()


def test_every_section_is_frozen_and_says_what_it_is() -> None:
    assert len(FIELDS) > 40
    for name, model in SECTIONS:
        assert issubclass(model, BaseModel), name
        assert model.__doc__, name
        assert model.model_config["frozen"], name


def test_preset_fills_what_nobody_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "model: {preset: deit, hidden_ratio: 0.5}\n")
    monkeypatch.setenv("FLAWSTREAM_MODEL__FLOW_STEPS", "3")
    model = load_settings(path).model
    assert (model.backbone, model.blocks, model.input_size) == ("deit_base_distilled_patch16_384", (7,), 384)
    assert (model.hidden_ratio, model.flow_steps) == (0.5, 3)


def test_preset_of_the_command_line_replaces_that_of_the_file_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: deit, clamp: 1.5}\n")
    model = read_settings(path, model={"preset": "resnet18", "backbone": None}).model
    assert model == ModelSettings(preset="resnet18", clamp=1.5)
    assert (model.backbone, model.blocks, model.strides) == ("resnet18", (), (4, 8, 16))


def test_preset_survives_a_round_trip(tmp_path: Path) -> None:
    model = load_settings(write(tmp_path, "model: {preset: cait, input_size: 224}\n")).model
    assert ModelSettings(**model.model_dump()) == model


def test_unknown_preset_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.preset.*resnet18.*cait"):
        load_settings(write(tmp_path, "model: {preset: vgg}\n"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: PresetName) -> None:
    model = ModelSettings(preset=name)
    assert all(getattr(model, field) == value for field, value in PRESETS[name].fields.items())
