"""Makes `values.schema.json` and `docs/reference/values.md` from the comments of `values.yaml` and the settings' model.

Run it when either has changed: `python -m k8s.reference`. Knows no template; a test compares what it makes with what is
there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from schemas.settings import Settings

HERE = Path(__file__).parent
VALUES = HERE / "flawstream" / "values.yaml"
SCHEMA = HERE / "flawstream" / "values.schema.json"
TABLE = HERE.parent / "docs" / "reference" / "values.md"

OF_THE_CHART = {
    "redis": {
        "url", "username", "password", "password_file", "tls_ca_file", "tls_cert_file", "tls_key_file", "sentinels",
        "sentinel_primary", "cluster",
    },
    "api": {"host", "port", "tokens", "tokens_file"},
    "registry": {"root"},
    "metrics": {"host", "port"},
    "worker": {"name"},
}  # fmt: skip
"""Settings that the chart writes from values of its own, or that are secrets: refused below `settings`."""

_QUANTITY = {"type": ["string", "number"], "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
KINDS: dict[str, dict[str, Any]] = {
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "list": {"type": "array", "items": {"type": "object"}},
    "open": {"type": "object", "additionalProperties": True},
    "name": {"type": "string", "pattern": r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"},
    "host": {"type": "string", "pattern": r"^((\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"},
    "tag": {"type": "string", "pattern": r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "quantity": _QUANTITY,
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "required": ["requests", "limits"],
        "properties": {
            "requests": {**_QUANTITIES, "required": ["cpu", "memory"]},
            "limits": {**_QUANTITIES, "required": ["memory"]},
        },
    },
}
"""What a `ref` in an `@schema` line stands for."""

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _when(path: str, *, equals: object, then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {**_at(path, {"const": equals}, required=True)}, "then": then}


def _at(path: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    """Put a schema at a dotted path."""
    for name in reversed(path.split(".")):
        schema = {"properties": {name: schema}} | ({"required": [name]} if required else {})
    return schema


_GIVEN: dict[str, Any] = {"minLength": 1}
RULES = [
    _when("redis.mode", equals="external", then=_at("redis.external.url", _GIVEN)),
    _when("registry.type", equals="s3", then=_at("registry.s3.url", _GIVEN)),
    _when("training.enabled", equals=True, then=_at("training.data.existingClaim", _GIVEN)),
    _when("ingress.enabled", equals=True, then=_at("ingress.host", _GIVEN)),
    _when("dashboardIngress.enabled", equals=True, then=_at("dashboardIngress.host", _GIVEN)),
    _when("httpRoute.enabled", equals=True, then=_at("httpRoute.parentRefs", {"minItems": 1})),
    _when("serviceAccount.create", equals=False, then=_at("serviceAccount.name", _GIVEN)),
    _when("redis.external.cluster", equals=True, then=_at("redis.external.sentinels", {"maxItems": 0})),
    {
        "if": {
            **_at("ray.gcsFaultTolerance.enabled", {"const": True}),
            "allOf": [_at("ray.gcsFaultTolerance.mode", {"const": "external"})],
        },
        "then": _at("ray.gcsFaultTolerance.address", _GIVEN),
    },
    {  # else nothing would judge an image
        "anyOf": [_at("serve.enabled", {"const": True}), _at("workers.enabled", {"const": True})],
    },
]
"""What one value asks of another."""


def settings_schema() -> dict[str, Any]:
    """Give the JSON schema of `settings`: our model's, without what the chart writes itself."""
    whole = Settings.model_json_schema()
    definitions = whole.pop("$defs")

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return plain(definitions[node["$ref"].rpartition("/")[2]])
        dropped = ("title", "default", "description", "writeOnly", "format")
        return {
            name: plain(value)
            for name, value in node.items()
            if name != "default" and not (name in dropped and not isinstance(value, dict))
        }

    schema: dict[str, Any] = plain(whole)
    for section, fields in OF_THE_CHART.items():
        for field in fields:
            schema["properties"][section]["properties"].pop(field)
        if not schema["properties"][section]["properties"]:
            del schema["properties"][section]
    return {**schema, "additionalProperties": False}


def _comment(lines: list[str], line: int) -> tuple[str, dict[str, Any]]:
    """Read the comment right above a key: its text, and what its `@schema` line says."""
    text: list[str] = []
    narrowed: dict[str, Any] = {}
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        said = lines[line].lstrip().removeprefix("#").strip()
        if said.startswith("@schema"):
            narrowed = json.loads(said.removeprefix("@schema"))
        else:
            text.insert(0, said)
    return " ".join(text), narrowed


def _keys(node: yaml.MappingNode, lines: list[str]) -> Iterator[tuple[str, yaml.Node, str, dict[str, Any]]]:
    for key, value in node.value:
        text, narrowed = _comment(lines, key.start_mark.line)
        yield key.value, value, text, narrowed


def _value(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _schema_of(node: yaml.Node, narrowed: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    kind = narrowed.get("ref")
    if kind == "settings":
        return settings_schema()
    if kind is not None:
        return KINDS[kind]
    if isinstance(node, yaml.MappingNode):
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: _described(_schema_of(value, more, lines), text) for name, value, text, more in _keys(node, lines)
            },
        }
    default = _value(node)
    if isinstance(default, list):
        return {"type": "array", **narrowed}
    return {"type": _TYPES[type(default)], **narrowed}


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {**schema, "description": text} if text else schema


def _values() -> tuple[yaml.MappingNode, list[str]]:
    text = VALUES.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise TypeError(f"{VALUES} holds no mapping")
    return root, text.splitlines()


def make_schema() -> str:
    """Give `values.schema.json`."""
    root, lines = _values()
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_schema_of(root, {}, lines),
        "allOf": RULES,
    }
    schema["properties"]["global"] = {"type": "object", "description": "Helm hands it to every chart; not used here."}
    return json.dumps(schema, indent=1) + "\n"


def _rows(path: str, node: yaml.MappingNode, lines: list[str]) -> Iterator[str]:
    for name, value, text, narrowed in _keys(node, lines):
        full = f"{path}{name}"
        if isinstance(value, yaml.MappingNode) and "ref" not in narrowed:
            yield from _rows(f"{full}.", value, lines)
            continue
        default = json.dumps(_value(value), ensure_ascii=False)
        allowed = ", ".join(f"`{each}`" for each in narrowed.get("enum", ()))
        said = f"{text} One of {allowed}." if allowed else text
        yield f"| `{full}` | `{default}` | {said.replace('|', '&#124;')} |"


def make_table() -> str:
    """Give `docs/reference/values.md`."""
    root, lines = _values()
    return "\n".join(
        [
            "# Values of the Helm chart",
            "",
            "Made by `k8s/reference.py` from the comments in [values.yaml](../../k8s/flawstream/values.yaml). What is",
            "not listed is refused. How to use them: [deploy](../deploy.md).",
            "",
            "| value | default | what it is |",
            "|---|---|---|",
            *_rows("", root, lines),
            "",
        ]
    )


if __name__ == "__main__":
    SCHEMA.write_text(make_schema(), encoding="utf-8")
    TABLE.write_text(make_table(), encoding="utf-8")
