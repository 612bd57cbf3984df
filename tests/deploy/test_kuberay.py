"""The KubeRay manifest: what the operator would refuse, and what only this project can know."""

from __future__ import annotations

import copy
import gzip
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_ray.cli.main import parser
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.loading import load_config
from rlhf_ray.planning.capacity import needed

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
SCHEMA = ROOT.parent / "shared" / "data" / "kuberay" / "ray.io_rayjobs.yaml.gz"
MANIFEST: dict[str, Any] = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())
SPEC = MANIFEST["spec"]
CLUSTER = SPEC["rayClusterSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS = {
    "submitter": SPEC["submitterPodTemplate"]["spec"],
    "head": CLUSTER["headGroupSpec"]["template"]["spec"],
    "workers": WORKERS["template"]["spec"],
}
CONTAINERS = {pod: spec["containers"][0] for pod, spec in PODS.items()}


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as a JSON schema that refuses unknown fields, as ``kubectl apply`` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps_unknown:
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """Checks against the schema that the operator installs."""
    if not SCHEMA.is_file():
        pytest.skip("the schemas of KubeRay are not here")
    definition = yaml.load(gzip.decompress(SCHEMA.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = MANIFEST["apiVersion"].removeprefix(f"{definition['spec']['group']}/")
    (served,) = (one for one in definition["spec"]["versions"] if one["name"] == version and one["served"])
    assert definition["spec"]["names"]["kind"] == MANIFEST["kind"]
    return jsonschema.Draft202012Validator(strict(served["schema"]["openAPIV3Schema"]))


def test_the_operator_accepts_it(validator: jsonschema.Draft202012Validator) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(MANIFEST)]
    assert errors == []


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "entryPoint", "python"),
        (("rayClusterSpec",), "authoptions", {"mode": "token"}),
        (("rayClusterSpec", "authOptions"), "mode", "tokens"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec"), "container", []),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "securityContext"), "runAsNonRoot", "yes"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "replicas", "1"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "volumeMount", []),
        (("rayClusterSpec", "workerGroupSpecs", 0, "rayStartParams"), "num-cpus", 8),
    ],
)
def test_a_mistake_is_found(
    validator: jsonschema.Draft202012Validator, place: tuple[str | int, ...], key: str, value: Any
) -> None:
    manifest = copy.deepcopy(MANIFEST)
    section = manifest["spec"]
    for part in place:
        section = section[part]
    section[key] = value
    assert not validator.is_valid(manifest)


# ------------------------------------------------------------------------------------------- what needs no shared data


def job() -> PpoConfig:
    """The job that the entrypoint runs."""
    command = shlex.split(SPEC["entrypoint"])
    assert command[:3] == ["python", "-m", "rlhf_ray"]
    options = parser().parse_args(command[3:])
    config = load_config(options.config, options.overrides, kind=options.kind)
    assert isinstance(config, PpoConfig)
    return config


def test_the_workers_hold_the_job_and_its_driver() -> None:
    limits = CONTAINERS["workers"]["resources"]["limits"]
    bundles = needed(job())
    replicas = WORKERS["replicas"]
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert sum(bundle.cpus for bundle in bundles) + SPEC["entrypointNumCpus"] <= int(limits["cpu"]) * replicas
    gpus = int(limits["nvidia.com/gpu"]) * replicas
    assert gpus - 1 < sum(bundle.gpus for bundle in bundles) <= gpus + 1e-9


def test_runs_data_and_downloads_outlive_the_pods() -> None:
    config = job()
    claim = yaml.safe_load((KUBERAY / "runs.yaml").read_text())
    environment = {entry["name"]: entry["value"] for entry in CONTAINERS["workers"]["env"]}
    for pod in ("head", "workers"):
        (volume,) = (one["name"] for one in PODS[pod]["volumes"] if "persistentVolumeClaim" in one)
        (mount,) = (one["mountPath"] for one in CONTAINERS[pod]["volumeMounts"] if one["name"] == volume)
        for path in (config.run.root, config.data.path, environment["HF_HOME"]):
            assert path is not None and Path(path).is_relative_to(mount)
        claims = [one["persistentVolumeClaim"]["claimName"] for one in PODS[pod]["volumes"] if one["name"] == volume]
        assert claims == [claim["metadata"]["name"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_images_are_targets_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for container in CONTAINERS.values():
        name, _, tag = container["image"].partition(":")
        assert name == "rlhf-ray" and tag == "gpu" and tag in targets


def test_the_cluster_runs_the_ray_of_the_image() -> None:
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)
    assert CLUSTER["rayVersion"] == pinned


def test_it_is_closed_and_without_privileges() -> None:
    assert CLUSTER["authOptions"]["mode"] == "token"
    (user,) = set(re.findall(r"--uid (\d+)", (ROOT / "Dockerfile").read_text()))
    for pod, spec in PODS.items():
        security = CONTAINERS[pod]["securityContext"]
        assert spec["automountServiceAccountToken"] is False, pod
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["runAsUser"] == int(user), pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, pod


def test_a_stopped_job_has_time_to_commit() -> None:
    environment = {entry["name"]: entry["value"] for entry in CONTAINERS["workers"]["env"]}
    wait = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert 60 <= wait <= PODS["workers"]["terminationGracePeriodSeconds"]
