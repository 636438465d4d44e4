"""The KubeRay manifests, against KubeRay's schema, Ray Serve's and the configuration they run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.config import load_config
from deploy.config_schema import BatonConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own, while it is imported
    import ray
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[2]
MANIFEST_PATH = ROOT / "deploy/kuberay/rayservice-8xh100-8b.yaml"
CONFIG_PATH = ROOT / "deploy/configs/8xh100-8b.yaml"
SUBSET_SCHEMA_PATH = Path(__file__).with_name("rayservice.schema.yaml")
CRD_VARIABLE = "BATON_KUBERAY_CRD"


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(MANIFEST_PATH.read_text())
    return loaded


@pytest.fixture
def serve_config(manifest: dict[str, Any]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


@pytest.fixture
def config() -> BatonConfig:
    return load_config(CONFIG_PATH)


def pod_specs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Head first, then the worker groups."""
    cluster = manifest["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["containers"]
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def test_it_has_only_fields_that_kuberay_knows(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, yaml.safe_load(SUBSET_SCHEMA_PATH.read_text()))


def test_a_misspelt_field_would_be_found(manifest: dict[str, Any]) -> None:
    pod_specs(manifest)[1]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readinesProbe"):
        jsonschema.validate(manifest, yaml.safe_load(SUBSET_SCHEMA_PATH.read_text()))


@pytest.mark.skipif(CRD_VARIABLE not in os.environ, reason=f"{CRD_VARIABLE} does not name KubeRay's CRD file")
def test_it_fits_the_schema_that_kuberay_publishes(manifest: dict[str, Any]) -> None:
    crd = yaml.safe_load(Path(os.environ[CRD_VARIABLE]).read_text())
    (schema,) = [
        version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1"
    ]
    jsonschema.validate(manifest, closed(schema))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON schema, refusing the unknown fields that Kubernetes drops in silence."""
    result = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        result["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        result["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        result["items"] = closed(schema["items"])
    return result


def test_every_container_runs_the_ray_that_baton_is_pinned_to(manifest: dict[str, Any]) -> None:
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    assert len({container["image"] for pod in pod_specs(manifest) for container in pod["containers"]}) == 1


def test_haproxy_is_on_in_every_ray_container_and_spares_long_streams(
    manifest: dict[str, Any], config: BatonConfig
) -> None:
    for pod in pod_specs(manifest):
        assert environment(pod)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        hard_stop_s = int(environment(pod)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
        assert hard_stop_s == config.router.stream_hard_stop_s


def test_serve_runs_batons_application_with_the_mounted_configuration(
    manifest: dict[str, Any], serve_config: ServeDeploySchema
) -> None:
    (application,) = serve_config.applications
    assert application.import_path == "deploy.app:build"
    config_file = Path(application.args["config"])
    for pod in pod_specs(manifest):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts[str(config_file.parent)]]["configMap"]["name"] == "baton-config"
        assert set(mounts.values()) == set(volumes)


def test_serve_listens_where_the_configuration_and_the_probes_expect_it(
    manifest: dict[str, Any], serve_config: ServeDeploySchema, config: BatonConfig
) -> None:
    assert serve_config.http_options.host == config.router.host
    assert serve_config.http_options.port == config.router.port
    for pod in pod_specs(manifest):
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == config.router.port
    (worker,) = pod_specs(manifest)[1]["containers"]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": config.router.port}


def test_the_gpu_group_holds_all_workers_and_lets_them_drain(
    manifest: dict[str, Any], config: BatonConfig
) -> None:
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (shape,) = config.models[0].shapes
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * group["replicas"] == shape.count * shape.gpus_per_worker
    assert (
        int(limits["cpu"]) * group["replicas"] >= shape.count * shape.cpus_per_worker + config.router.replicas
    )
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.drain_timeout_s


def test_gpu_pods_have_shared_memory_of_their_own(manifest: dict[str, Any]) -> None:
    pod = pod_specs(manifest)[1]
    (shm,) = [
        mount["name"] for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm"
    ]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == shm]
    assert volume["emptyDir"]["medium"] == "Memory"
