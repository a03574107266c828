"""Generates `values.schema.json` and `docs/reference/values.md` from `values.yaml` with its comments, and the settings.

Run `python -m k8s.reference` when either has changed; a test checks that the files are up to date.
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
"""Settings that the chart derives from other values, or that are secrets; not allowed below `settings`."""

_QUANTITY = {"type": ["string", "number"], "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_LIST = {"type": "array", "items": {"type": "object"}}
_NAME = {"type": "string", "pattern": r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"}
KINDS: dict[str, dict[str, Any]] = {
    "strings": _STRINGS,
    "list": _LIST,
    "open": {"type": "object", "additionalProperties": True},
    "name": _NAME,
    "host": {"type": "string", "pattern": r"^((\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"},
    "tag": {"type": "string", "pattern": r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "quantity": _QUANTITY,
    "pod": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **dict.fromkeys(("labels", "annotations"), _STRINGS),
            "runtimeClassName": _NAME,
            **dict.fromkeys(("volumes", "volumeMounts", "initContainers", "sidecars"), _LIST),
        },
    },
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
"""Schemas that an `@schema` line in `values.yaml` can name as `ref`."""

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _when(path: str, *, equals: object, then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {**_at(path, {"const": equals}, required=True)}, "then": then}


def _at(path: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    """Nest a schema at a dotted path."""
    for name in reversed(path.split(".")):
        schema = {"properties": {name: schema}} | ({"required": [name]} if required else {})
    return schema


_NOT_EMPTY: dict[str, Any] = {"minLength": 1}
RULES = [
    _when("redis.mode", equals="external", then=_at("redis.external.url", _NOT_EMPTY)),
    _when("registry.type", equals="s3", then=_at("registry.s3.url", _NOT_EMPTY)),
    _when("training.enabled", equals=True, then=_at("training.data.existingClaim", _NOT_EMPTY)),
    _when("ingress.enabled", equals=True, then=_at("ingress.host", _NOT_EMPTY)),
    _when("dashboardIngress.enabled", equals=True, then=_at("dashboardIngress.host", _NOT_EMPTY)),
    _when("httpRoute.enabled", equals=True, then=_at("httpRoute.parentRefs", {"minItems": 1})),
    _when("serviceAccount.create", equals=False, then=_at("serviceAccount.name", _NOT_EMPTY)),
    _when("redis.external.cluster", equals=True, then=_at("redis.external.sentinels", {"maxItems": 0})),
    {
        "if": {
            **_at("ray.gcsFaultTolerance.enabled", {"const": True}),
            "allOf": [_at("ray.gcsFaultTolerance.mode", {"const": "external"})],
        },
        "then": _at("ray.gcsFaultTolerance.address", _NOT_EMPTY),
    },
    {  # otherwise no image would be judged
        "anyOf": [_at("serve.enabled", {"const": True}), _at("workers.enabled", {"const": True})],
    },
]
"""Constraints between values."""


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of `settings`: that of `Settings` without the fields that the chart sets itself."""
    full_schema = Settings.model_json_schema()
    definitions = full_schema.pop("$defs")

    def inline(node: Any) -> Any:
        """Replace references by their definitions, and drop what Helm does not check."""
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        dropped = ("title", "default", "description", "writeOnly", "format")
        return {
            name: inline(value)
            for name, value in node.items()
            if name != "default" and not (name in dropped and not isinstance(value, dict))
        }

    schema: dict[str, Any] = inline(full_schema)
    for section, fields in OF_THE_CHART.items():
        for field in fields:
            schema["properties"][section]["properties"].pop(field)
        if not schema["properties"][section]["properties"]:
            del schema["properties"][section]
    return {**schema, "additionalProperties": False}


def _comment(lines: list[str], line: int) -> tuple[str, dict[str, Any]]:
    """Read the comment above a key; return its text and the JSON of its `@schema` line."""
    text: list[str] = []
    restrictions: dict[str, Any] = {}
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        comment = lines[line].lstrip().removeprefix("#").strip()
        if comment.startswith("@schema"):
            restrictions = json.loads(comment.removeprefix("@schema"))
        else:
            text.insert(0, comment)
    return " ".join(text), restrictions


def _keys(node: yaml.MappingNode, lines: list[str]) -> Iterator[tuple[str, yaml.Node, str, dict[str, Any]]]:
    for key, value in node.value:
        text, restrictions = _comment(lines, key.start_mark.line)
        yield key.value, value, text, restrictions


def _value(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _schema_of(node: yaml.Node, restrictions: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    kind = restrictions.get("ref")
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
        return {"type": "array", **restrictions}
    return {"type": _TYPES[type(default)], **restrictions}


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {**schema, "description": text} if text else schema


def _values() -> tuple[yaml.MappingNode, list[str]]:
    text = VALUES.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise TypeError(f"{VALUES} holds no mapping")
    return root, text.splitlines()


def make_schema() -> str:
    """Generate `values.schema.json`."""
    root, lines = _values()
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_schema_of(root, {}, lines),
        "allOf": RULES,
    }
    schema["properties"]["global"] = {"type": "object", "description": "Helm passes it to every chart; not used here."}
    return json.dumps(schema, indent=1) + "\n"


def _rows(path: str, node: yaml.MappingNode, lines: list[str]) -> Iterator[str]:
    for name, value, text, restrictions in _keys(node, lines):
        full_path = f"{path}{name}"
        if isinstance(value, yaml.MappingNode) and "ref" not in restrictions:
            yield from _rows(f"{full_path}.", value, lines)
            continue
        default = json.dumps(_value(value), ensure_ascii=False)
        allowed = ", ".join(f"`{item}`" for item in restrictions.get("enum", ()))
        description = f"{text} One of {allowed}." if allowed else text
        yield f"| `{full_path}` | `{default}` | {description.replace('|', '&#124;')} |"


def make_table() -> str:
    """Generate `docs/reference/values.md`."""
    root, lines = _values()
    return "\n".join(
        [
            "# Values of the Helm chart",
            "",
            "Generated by `k8s/reference.py` from the comments in [values.yaml](../../k8s/flawstream/values.yaml).",
            "Values that are not listed are refused. How to use them: [deploy](../deploy.md).",
            "",
            "| value | default | description |",
            "|---|---|---|",
            *_rows("", root, lines),
            "",
        ]
    )


if __name__ == "__main__":
    SCHEMA.write_text(make_schema(), encoding="utf-8")
    TABLE.write_text(make_table(), encoding="utf-8")
