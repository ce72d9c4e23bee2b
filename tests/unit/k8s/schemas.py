"""Objects against the schemas of Kubernetes and of KubeRay's CRDs, with unknown fields as errors."""

from __future__ import annotations

import functools
import json
import os
import typing
from pathlib import Path

import jsonschema
import pytest
import referencing
import yaml

from tests.unit.k8s.rendering import CLUSTER_SPEC, ROOT, Object, cluster_spec

# The CRDs are KubeRay's (4 MB) and not part of this project: helm-chart/kuberay-operator/crds of its tag v1.7.0.
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
KUBERNETES = ("1.31", "1.37")  # the oldest and the newest that is meant

# Of Prometheus' operator (0.91), what is used here; the whole is larger than all else.
_SELECTOR = {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}}
_SECRET_KEY = {"name": {"type": "string"}, "key": {"type": "string"}}
_ENDPOINT = {
    **{name: {"type": "string"} for name in ("port", "path", "interval")},
    "authorization": {"properties": {"credentials": {"properties": _SECRET_KEY}}},
}
POD_MONITOR = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        **{name: {} for name in ("apiVersion", "kind", "metadata")},
        "spec": {
            "required": ["podMetricsEndpoints", "selector"],
            "properties": {
                "selector": {"properties": _SELECTOR},
                "podTargetLabels": {"type": "array", "items": {"type": "string"}},
                "podMetricsEndpoints": {"type": "array", "items": {"properties": _ENDPOINT}},
            },
        },
    },
}


def problems(obj: Object) -> list[str]:
    """What is wrong with an object, each with its path."""
    if obj["apiVersion"].startswith("ray.io/"):
        return _against(kuberay_validator(obj["apiVersion"], obj["kind"]), obj) + pod_problems(obj)
    if obj["kind"] == "PodMonitor":
        return _against(_validator(POD_MONITOR), obj)
    return core_problems(obj)


def core_problems(obj: Object) -> list[str]:
    """Against every Kubernetes version of KUBERNETES."""
    group, _, version = obj["apiVersion"].rpartition("/")
    kind = "-".join(filter(None, [obj["kind"].lower(), group.split(".")[0], version]))
    return [f"{of}: {problem}" for of in KUBERNETES for problem in _against(kubernetes_validator(of, kind), obj)]


@functools.cache
def kubernetes_validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    """Of one of Kubernetes' own kinds. The package would read its megabytes of definitions again for every object."""
    read, registry = _kubernetes(version)
    return jsonschema.Draft202012Validator(read(f"{kind}.json"), registry=registry)


@functools.cache
def _kubernetes(version: str) -> tuple[typing.Callable[[str], Object], referencing.Registry]:
    package = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    folder = Path(package.__file__).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"

    def read(name: str) -> Object:
        return json.loads((folder / name).read_text())

    return read, referencing.Resource.from_contents(read("_definitions.json")) @ referencing.Registry()


def pod_problems(obj: Object) -> list[str]:
    """Of the pod templates within one of KubeRay's kinds, whose CRDs check less than Kubernetes does."""
    if obj["kind"] not in CLUSTER_SPEC:
        return []
    spec = cluster_spec(obj)
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    templates = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups if "template" in group]
    return [problem for template in templates for problem in core_problems(template)]


@functools.cache
def kuberay_validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """Of one of KubeRay's kinds; skips the test where the CRDs are not there."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"{path} is not there; KUBERAY_CRDS=DIR names the CRDs of KubeRay v1.7.0")
    # libyaml reads the megabyte in a second, plain Python in twenty.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if f"ray.io/{each['name']}" == api_version]
    schema["properties"]["metadata"] = {"type": "object"}  # the CRD leaves it to Kubernetes
    return _validator(schema)


def _validator(schema: Object) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(schema))


def _closed(schema: typing.Any) -> typing.Any:
    """The schema with unknown fields as errors, as a strict API server has it, and Kubernetes' own words as JSON's.

    A field that has a default is not required: the API server fills it in before it looks.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = dict(schema)
    if "properties" in out:
        out["properties"] = {name: _closed(each) for name, each in out["properties"].items()}
        filled = {name for name, each in out["properties"].items() if "default" in each}
        out["required"] = [name for name in out.get("required", []) if name not in filled]
        if not out.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(out.get(name), dict):
            out[name] = _closed(out[name])
    return out


def _against(validator: jsonschema.Draft202012Validator, obj: Object) -> list[str]:
    return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(obj)]
