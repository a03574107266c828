"""Whether all that a render names is there: Secrets, ConfigMaps, claims, accounts, ports, pods that selectors mean."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from helpers.chart.conformity import check_container_security, serve_settings, settings_of
from helpers.chart.rendered import Body, Pod, owner, pods

_SECRETS = {"existingSecret", "caSecret", "clientSecret", "tlsSecret"}
_MADE_BY_KUBERAY = {"serve-svc": 8000, "head-svc": 8265}
_OUR_PODS = {"app.kubernetes.io/part-of": "flawstream"}


def check(documents: list[Body], values: Mapping[str, Any]) -> None:
    """Check a whole render.

    Args:
        documents: All of it.
        values: What it was made with: what they name is there already.
    """
    names = [owner(document) for document in documents]
    assert len(set(names)) == len(names), f"twice: {sorted({name for name in names if names.count(name) > 1})}"
    there = {*names, *given(values)}
    secrets = {d["metadata"]["name"]: set(d["data"]) for d in documents if d["kind"] == "Secret"}
    found = [pod for document in documents for pod in pods(document)]
    for kind, name, key in _named(documents, found):
        assert f"{kind}/{name}" in there, f"{kind} {name} is named and not there"
        assert key is None or kind != "Secret" or name not in secrets or key in secrets[name], f"{name} has no {key}"
    for document in documents:
        _check_selectors(document, documents, found)
        _check_backends(document, documents, found)
    _check_settings(documents, found)


def given(values: Mapping[str, Any]) -> Iterator[str]:
    """Find what the values say is there."""
    for name, value in values.items():
        if name in _SECRETS:
            yield f"Secret/{value}"
        elif name == "existingClaim":
            yield f"PersistentVolumeClaim/{value}"
        elif name == "pullSecrets":
            yield from (f"Secret/{each}" for each in value)
        elif name == "serviceAccount" and not value.get("create", True):
            yield f"ServiceAccount/{value['name']}"
        elif isinstance(value, Mapping):
            yield from given(value)


def _named(documents: list[Body], found: list[Pod]) -> Iterator[tuple[str, str, str | None]]:  # noqa: C901, PLR0912 - a case for each kind
    """Find what is named by kind, name and key."""
    for pod in found:
        yield "ServiceAccount", pod.spec["serviceAccountName"], None
        for pull in pod.spec.get("imagePullSecrets", []):
            yield "Secret", pull["name"], None
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                items = volume["secret"].get("items", [{"key": None}])
                yield from (("Secret", volume["secret"]["secretName"], item["key"]) for item in items)
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"], None
            if "persistentVolumeClaim" in volume:
                yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
        for container in pod.containers:
            for item in container.get("env", []):
                reference = item.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    yield "Secret", reference["name"], reference["key"]
    for document in documents:
        match document["kind"]:
            case "RayService":
                state = document["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions", {})
                reference = state.get("redisPassword", {}).get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    yield "Secret", reference["name"], reference["key"]
                scaler = document["spec"]["rayClusterConfig"].get("autoscalerOptions")
                if scaler:
                    check_container_security(scaler["securityContext"])
            case "TriggerAuthentication":
                for reference in document["spec"]["secretTargetRef"]:
                    yield "Secret", reference["name"], reference["key"]
            case "ScaledObject":
                yield "Deployment", document["spec"]["scaleTargetRef"]["name"], None
                for trigger in document["spec"]["triggers"]:
                    if "authenticationRef" in trigger:
                        yield "TriggerAuthentication", trigger["authenticationRef"]["name"], None
            case "Ingress":
                yield from (("Secret", tls["secretName"], None) for tls in document["spec"].get("tls", []))


def _chosen(selector: Mapping[str, Any], labelled: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Choose by labels, as Kubernetes does."""

    def fits(labels: Mapping[str, str]) -> bool:
        if not selector.get("matchLabels", {}).items() <= labels.items():
            return False
        for rule in selector.get("matchExpressions", []):
            assert rule["operator"] == "In", rule
            if labels.get(rule["key"]) not in rule["values"]:
                return False
        return True

    return [labels for labels in labelled if fits(labels)]


def _check_selectors(document: Body, documents: list[Body], found: list[Pod]) -> None:  # noqa: C901, PLR0912 - a case for each kind
    spec = document.get("spec", {})
    labels = [pod.labels for pod in found]
    match document["kind"]:
        case "Deployment" | "StatefulSet":
            own = [pod.labels for pod in pods(document)]
            assert _chosen(spec["selector"], labels) == own, f"{owner(document)} chooses pods that are not its own"
        case "PodDisruptionBudget":
            assert _chosen(spec["selector"], labels), f"{owner(document)} chooses no pod"
        case "NetworkPolicy":
            assert _chosen(spec["podSelector"], labels), f"{owner(document)} chooses no pod"
            for rule in spec.get("ingress", []):
                for port in rule.get("ports", []):
                    _check_open(port["port"], _pods(found, spec["podSelector"]), owner(document))
                for peer in rule.get("from", []):
                    chooser = peer.get("podSelector", {})
                    if chooser.get("matchLabels", {}).items() >= _OUR_PODS.items():
                        parts = next(rule["values"] for rule in chooser["matchExpressions"])
                        assert parts, f"{owner(document)} lets in nobody"
        case "PodMonitor":
            for endpoint in spec["podMetricsEndpoints"]:
                chosen = _pods(found, spec["selector"])
                assert chosen, f"{owner(document)} chooses no pod"
                if endpoint["port"] == "metrics":  # the others are of the head, and of Ray's autoscaler there
                    assert all(_number(pod, "metrics") for pod in chosen), f"{owner(document)}: a pod has no such port"
        case "ServiceMonitor":
            services = [d for d in documents if d["kind"] == "Service"]
            chosen_labels = _chosen(spec["selector"], [s["metadata"]["labels"] for s in services])
            assert chosen_labels, f"{owner(document)} chooses no Service"
            for endpoint in spec["endpoints"]:
                for service in services:
                    if service["metadata"]["labels"] in chosen_labels:
                        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        case "Service":
            chosen = _pods(found, {"matchLabels": spec["selector"]})
            assert chosen, f"{owner(document)} chooses no pod"
            for port in spec["ports"]:
                assert all(_number(pod, port["targetPort"]) for pod in chosen), f"{owner(document)}: {port}"


def _pods(found: list[Pod], selector: Mapping[str, Any]) -> list[Pod]:
    return [pod for pod in found if _chosen(selector, [pod.labels])]


def _ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for container in pod.containers for port in container.get("ports", [])}


def _number(pod: Pod, port: str | int) -> int | None:
    return _ports(pod).get(port) if isinstance(port, str) else port


def _check_open(port: int, chosen: list[Pod], whose: str) -> None:
    assert any(port in _ports(pod).values() for pod in chosen), f"{whose}: nobody listens at {port}"


def _check_backends(document: Body, documents: list[Body], found: list[Pod]) -> None:
    """See that what is reached from outside is there, at the port that is named."""
    backends = []
    if document["kind"] == "Ingress":
        paths = [path for rule in document["spec"]["rules"] for path in rule["http"]["paths"]]
        backends = [(p["backend"]["service"]["name"], p["backend"]["service"]["port"]["number"]) for p in paths]
    if document["kind"] == "HTTPRoute":
        backends = [(b["name"], b["port"]) for rule in document["spec"]["rules"] for b in rule["backendRefs"]]
    for name, port in backends:
        made = {
            f"{service['metadata']['name']}-{suffix}": number
            for service in documents
            if service["kind"] == "RayService"
            for suffix, number in _MADE_BY_KUBERAY.items()
        }
        assert made.get(name) == port, f"{owner(document)}: no Service {name} with port {port}"
        _check_open(port, [pod for pod in found if pod.owner.startswith("RayService")], owner(document))


def _check_settings(documents: list[Body], found: list[Pod]) -> None:
    """See that all processes are told the same, that they take it, and that the server they are sent to is there."""
    config = next(d for d in documents if d["kind"] == "ConfigMap" and "settings.yaml" in d["data"])
    text = config["data"]["settings.yaml"]
    for pod in found:
        for container in pod.containers:
            environment = {item["name"]: item.get("value", "") for item in container.get("env", [])}
            if "FLAWSTREAM_CONFIG" not in environment:
                continue
            ours = tuple(
                sorted(i for i in environment.items() if i[0].startswith("FLAWSTREAM_") and i[0] != "FLAWSTREAM_CONFIG")
            )
            settings = settings_of(text, ours)
            assert settings.logging.format == "json"
            paths = {mount["mountPath"] for mount in container["volumeMounts"]}
            files = (
                settings.redis.password_file,
                settings.redis.tls_ca_file,
                settings.redis.tls_cert_file,
                settings.api.tokens_file,
            )
            for file in files:
                assert file is None or str(file).rpartition("/")[0] in paths, f"{pod.owner}: {file} is not mounted"
            if settings.registry.root == "/models":
                assert "/models" in paths
    settings = settings_of(text, ())
    for document in documents:
        if document["kind"] == "RayService":
            assert settings == type(settings).model_validate(serve_settings(document))
    url = urlsplit(settings.redis.url)
    bundled = [d for d in documents if owner(d) == f"Service/{url.hostname}"]
    if any(owner(d).startswith("StatefulSet") and "gcs" not in owner(d) for d in documents):
        assert bundled, f"no Service {url.hostname}"
        assert (url.port or 6379) in {port["port"] for port in bundled[0]["spec"]["ports"]}
