"""The values that a user may choose between, and which of their combinations are rendered."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from helpers.chart.rendered import merged

Values = dict[str, Any]
_EXTERNAL = {"mode": "external", "external": {"url": "redis://plant-redis:6379/0"}}
_GPU = {"workers": {"gpus": 1}, "training": {"gpus": 2}}


def container(name: str) -> Values:
    """Make a container as a careful user would add it."""
    probe = {"exec": {"command": ["true"]}}
    return {
        "name": name,
        "image": "registry.plant/busybox:1.37",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "16Mi"}},
        "livenessProbe": probe,
        "readinessProbe": probe,
    }


MAIN: dict[str, dict[str, Values]] = {
    "runs": {
        "serve": {},
        "workers": {"serve": {"enabled": False}, "workers": {"enabled": True}},
        "both": {"workers": {"enabled": True, "replicas": 3}},
    },
    "redis": {
        "bundled": {},
        "bundled, trial": {"redis": {"bundled": {"persistence": {"enabled": False}, "appendfsync": "everysec"}}},
        "bundled, own password": {"redis": {"bundled": {"auth": {"existingSecret": "stream", "passwordKey": "pw"}}}},
        "external": {"redis": _EXTERNAL},
        "external, TLS": {
            "redis": {
                "mode": "external",
                "external": {
                    "url": "rediss://plant-redis:6380/2",
                    "username": "service",
                    "existingSecret": "stream",
                    "tls": {"caSecret": "authority", "caKey": "root.crt", "clientSecret": "client"},
                },
            }
        },
        "Sentinel": {
            "redis": merged(
                _EXTERNAL, {"external": {"sentinels": ["s1:26379", "s2:26379"], "existingSecret": "stream"}}
            )
        },
        "cluster": {
            "redis": merged(_EXTERNAL, {"external": {"cluster": True, "existingSecret": "stream"}}),
            "settings": {"redis": {"shards": 6}},
        },
    },
    "registry": {
        "volume": {},
        "own claim": {"registry": {"volume": {"existingClaim": "trained"}}},
        "bucket by role": {"registry": {"type": "s3", "s3": {"url": "s3://plant/models"}}},
        "own bucket": {
            "registry": {
                "type": "s3",
                "s3": {
                    "url": "s3://plant/models",
                    "endpointUrl": "https://minio.plant:9000",
                    "existingSecret": "bucket",
                    "caSecret": "bucket-authority",
                },
            }
        },
    },
    "training": {
        "none": {},
        **{
            kind: {
                "training": {
                    "enabled": True,
                    "kind": kind,
                    "data": {"existingClaim": "photographs", "subPath": "line7"},
                    "categories": ["bottle", "cable"],
                    "arguments": ["--no-promote"],
                    "queue": "" if kind == "RayCronJob" else "nights",
                }
            }
            for kind in ("RayJob", "RayCronJob", "CronJob")
        },
    },
    "hardware": {
        "CPU": {},
        "GPU": merged(_GPU, {"serve": {"gpuWorkers": {"enabled": True}}, "settings": {"detector": {"num_gpus": 1}}}),
    },
}
"""Rendered in every combination."""

MORE: dict[str, dict[str, Values]] = {
    "network": {
        "policies": {},
        "no policies": {"networkPolicy": {"enabled": False}},
        "closed": {
            "networkPolicy": {
                "restrictEgress": True,
                "apiFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
                "redisFrom": [{"podSelector": {"matchLabels": {"app": "camera"}}}],
                "dashboardFrom": [{"namespaceSelector": {}}],
                "extraEgress": [{"ports": [{"protocol": "TCP", "port": 443}]}],
            }
        },
        "no Prometheus": {"networkPolicy": {"prometheusNamespace": ""}},
    },
    "way in": {
        "none": {},
        "Ingress": {
            "ingress": {"enabled": True, "host": "flaws.plant", "tlsSecret": "certificate", "className": "nginx"},
            "dashboardIngress": {"enabled": True, "host": "ray.plant", "annotations": {"auth": "on"}},
        },
        "HTTPRoute": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "gateway", "namespace": "edge"}],
                "hostnames": ["flaws.plant"],
            }
        },
    },
    "monitoring": {
        "none": {},
        "PodMonitor": {
            "monitoring": {
                "monitor": "PodMonitor",
                "rules": True,
                "dashboards": True,
                "labels": {"release": "prometheus"},
                "prometheusUrl": "http://prometheus:9090",
                "grafanaUrl": "http://grafana:3000",
                "grafanaBrowserUrl": "https://grafana.plant",
            }
        },
        "ServiceMonitor": {"monitoring": {"monitor": "ServiceMonitor", "interval": "1m", "rules": True}},
    },
    "Ray's state": {
        "in the head": {},
        "bundled": {"ray": {"gcsFaultTolerance": {"enabled": True}}},
        "external": {
            "ray": {
                "gcsFaultTolerance": {
                    "enabled": True,
                    "mode": "external",
                    "address": "rediss://ray-redis:6379",
                    "username": "ray",
                    "caSecret": "ray-state-authority",
                    "existingSecret": "ray-state",
                }
            }
        },
    },
    "scaling": {
        "none": {},
        "KEDA": {"workers": {"keda": {"enabled": True}}},
        "Ray": {
            "ray": {"autoscaling": {"enabled": True}},
            "settings": {"worker": {"max_replicas": 4}, "detector": {"max_replicas": 4}},
        },
        "Ray, step by step": {
            "ray": {
                "autoscaling": {"enabled": True},
                "upgradeStrategy": "NewClusterWithIncrementalUpgrade",
                "incrementalUpgrade": {"gatewayClassName": "istio"},
            }
        },
        "both": {"workers": {"keda": {"enabled": True}}, "ray": {"autoscaling": {"enabled": True}}},
    },
    "access": {
        "tokens": {},
        "own tokens": {"api": {"auth": {"existingSecret": "api-tokens", "tokensKey": "list"}}},
        "open": {"api": {"auth": {"enabled": False}}, "ray": {"auth": "disabled"}},
    },
    "toolbox": {"none": {}, "toolbox": {"toolbox": {"enabled": True}}},
    "account": {
        "made": {},
        "named": {"serviceAccount": {"name": "flaws", "annotations": {"role": "reader"}}},
        "given": {"serviceAccount": {"create": False, "name": "theirs"}},
    },
    "budgets": {
        "some": {},
        "all": {"podDisruptionBudget": {"protectSingletons": True}},
        "none": {"podDisruptionBudget": {"enabled": False}},
    },
    "placing": {
        "anywhere": {},
        "placed": {
            "nameOverride": "flaws",
            "commonLabels": {"team": "quality"},
            "pod": {"annotations": {"sidecar": "no"}, "labels": {"plant": "north"}, "runtimeClassName": "gvisor"},
            "priorityClassName": "plant",
            "training": {"priorityClassName": "batch", "suspend": True, "timeZone": "Europe/Zurich"},
            "image": {"repository": "registry.plant/flawstream", "pullSecrets": ["plant"], "tag": "1.2.3"},
            "redis": {"bundled": {"nodeSelector": {"disk": "fast"}}},
            "workers": {"tolerations": [{"key": "line", "operator": "Exists"}]},
            "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        },
        "OpenShift": {
            "podSecurity": {"runAsUser": None, "fsGroup": None},
            "pod": {
                "volumes": [{"name": "scratch", "emptyDir": {}}],
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                "initContainers": [container("wait") | {"restartPolicy": "Always"}],
            },
            "workers": {"pod": {"sidecars": [container("logs")]}},
        },
        "pinned": {
            "fullnameOverride": "flaws",
            "image": {"digest": f"sha256:{'0' * 64}", "cudaDigest": f"sha256:{'1' * 64}", "pullPolicy": "Always"},
            "tests": {"enabled": False},
        },
    },
}
"""Rendered in every pair, with one another and with the former."""

AXES = MAIN | MORE
_ROUNDS = 2


def combinations() -> Iterator[dict[str, str]]:
    """Give every combination of `MAIN` twice, with choices of `MORE` by a fixed order of chance."""
    order = random.Random(2111_07677)  # noqa: S311 - an order, and no secret
    for _ in range(_ROUNDS):
        for chosen in itertools.product(*MAIN.values()):
            yield dict(zip(MAIN, chosen, strict=True)) | {name: order.choice(list(ways)) for name, ways in MORE.items()}


def values_of(combination: dict[str, str]) -> Values:
    """Put the values of a combination together."""
    return merged(*(AXES[axis][choice] for axis, choice in combination.items()))


def pairs() -> set[frozenset[tuple[str, str]]]:
    """Give every pair of choices of two axes."""
    choices = [[(axis, choice) for choice in ways] for axis, ways in AXES.items()]
    return {
        frozenset(pair) for one, other in itertools.combinations(choices, 2) for pair in itertools.product(one, other)
    }
