"""The manifests of jobs/kubernetes against their schemas, and what they must agree on.

The schemas are written by hand from the types of kubernetes batch/v1 and ray.io/v1 (KubeRay 1.6):
of each object the fields that the manifests use, strictly. They catch a misspelt, misplaced or
wrongly typed field; what an operator makes of the values they cannot tell.
"""

import re
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tests import ROOT
from tests.test_project import LOCK, PROJECT
from tokendiff import __version__
from tokendiff.secrets import is_secret_name

FOLDER = ROOT / "jobs" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Schedule = Annotated[str, StringConstraints(pattern=r"^([0-9*/,-]+ ){4}[0-9*/,-]+$")]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Labels(Strict):
    labels: dict[str, str]


class Capabilities(Strict):
    drop: list[str]  # `add` is no field: nothing here needs one


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: Literal[False]
    readOnlyRootFilesystem: Literal[True]
    capabilities: Capabilities


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(ge=1)]
    runAsGroup: Annotated[int, Field(ge=1)]
    fsGroup: Annotated[int, Field(ge=1)] | None = None
    seccompProfile: Seccomp


class SecretName(Strict):
    name: Name
    optional: bool


class EnvFrom(Strict):
    secretRef: SecretName


class Metadata(Strict):
    name: Name | None = None
    generateName: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][-a-z0-9]*$")] | None = None


class SecretKey(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Resources(Strict):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, StringConstraints(pattern=r"^/")]


class Container(Strict):
    name: Name
    image: str
    resources: Resources
    workingDir: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[Variable] = []
    envFrom: list[EnvFrom] = []
    securityContext: ContainerSecurity
    volumeMounts: list[Mount] = []


class Claim(Strict):
    claimName: Name


class EmptyDir(Strict):
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    securityContext: PodSecurity
    automountServiceAccountToken: bool | None = None
    restartPolicy: Literal["Never", "OnFailure"] | None = None
    terminationGracePeriodSeconds: Count | None = None


class Pod(Strict):
    metadata: Labels
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(HeadGroup):
    groupName: Name
    minReplicas: Count
    maxReplicas: Count


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: Count
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: list[Mount]


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]


class RayClusterSpec(Strict):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    authOptions: AuthOptions


class RayJobSpec(Strict):
    entrypoint: str
    runtimeEnvYAML: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    submitterPodTemplate: Pod
    rayClusterSpec: RayClusterSpec


class RayCronJobSpec(Strict):
    schedule: Schedule
    jobTemplate: RayJobSpec


class JobSpec(Strict):
    backoffLimit: Count
    template: Pod


class JobTemplate(Strict):
    spec: JobSpec


class CronJobSpec(Strict):
    schedule: Schedule
    timeZone: str
    concurrencyPolicy: Literal["Allow", "Forbid", "Replace"]
    startingDeadlineSeconds: Count
    successfulJobsHistoryLimit: Count
    failedJobsHistoryLimit: Count
    jobTemplate: JobTemplate


class Selector(Strict):
    matchLabels: dict[str, str] = {}


class Peer(Strict):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class Port(Strict):
    protocol: Literal["TCP", "UDP"]
    port: Annotated[int, Field(ge=1, le=65535)]


class Rule(Strict):
    ports: list[Port] = []


class Ingress(Rule):
    from_: Annotated[list[Peer], Field(alias="from", min_length=1)]


class Egress(Rule):
    to: list[Peer] = []


class NetworkPolicySpec(Strict):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]
    egress: list[Egress]


SPECS: dict[tuple[str, str], type[Strict]] = {
    ("ray.io/v1", "RayCluster"): RayClusterSpec,
    ("ray.io/v1", "RayJob"): RayJobSpec,
    ("ray.io/v1", "RayCronJob"): RayCronJobSpec,
    ("batch/v1", "CronJob"): CronJobSpec,
    ("networking.k8s.io/v1", "NetworkPolicy"): NetworkPolicySpec,
}


def load(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return manifest


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_is_what_its_schema_allows(path: Path) -> None:
    manifest = load(path.name)
    spec = SPECS[manifest.pop("apiVersion"), manifest.pop("kind")]
    Metadata.model_validate(manifest.pop("metadata"))
    spec.model_validate(manifest.pop("spec"))
    assert not manifest


def test_all_clusters_are_the_same_one() -> None:
    cluster = load("raycluster.yaml")["spec"]
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster
    assert load("raycronjob.yaml")["spec"]["jobTemplate"]["rayClusterSpec"] == cluster


def test_cluster_has_the_locked_ray_a_token_and_a_head_without_tasks() -> None:
    cluster = load("raycluster.yaml")["spec"]
    assert cluster["rayVersion"] == LOCK["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    workers = cluster["workerGroupSpecs"]
    assert [worker["minReplicas"] for worker in workers] == [0, 0]
    for group in (cluster["headGroupSpec"], *workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        # A volume that is mounted is there.
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    gpus = [
        worker["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for worker in workers
    ]
    assert gpus == [None, "1"]


def pods_in(value: Any) -> list[dict[str, Any]]:
    """Every pod template of a manifest."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods_in(item)]
    if not isinstance(value, dict):
        return []
    if "containers" in value.get("spec", {}):
        return [value]
    return [pod for item in value.values() for pod in pods_in(item)]


def test_no_pod_has_rights_that_it_does_not_need() -> None:
    """That each has a security context, and what may stand in it, is in the schemas."""
    pods = [pod for path in MANIFESTS for pod in pods_in(load(path.name))]
    assert len(pods) == 3 * 3 + 2 + 1  # three clusters of three groups, and who submits
    for pod in pods:
        spec = pod["spec"]
        is_head = spec["containers"][0]["name"] == "ray-head"
        # The autoscaler beside the head asks Kubernetes for pods.
        assert spec.get("automountServiceAccountToken", True) == is_head
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            # What may be written to is a volume, and the home folder is in one.
            paths = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert paths <= {"/data", "/tmp"}
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert "/tmp" in paths
            # Secrets are named, never written out.
            for variable in container["env"]:
                assert not is_secret_name(variable["name"]) or "value" not in variable


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_the_network_policy_admits_the_cluster_its_submitters_and_the_operator() -> None:
    policy = load("networkpolicy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    pods = [pod for path in MANIFESTS for pod in pods_in(load(path.name))]
    nodes = [p for p in pods if p["spec"]["containers"][0]["name"].startswith("ray-")]
    submitters = [p for p in pods if p not in nodes]
    stranger = {"app.kubernetes.io/part-of": "shop"}

    def ports(labels: dict[str, str], namespace: str) -> list[Any]:
        """That a pod may reach on a node; "all" for all of them."""
        found: list[Any] = []
        for rule in policy["ingress"]:
            for peer in rule["from"]:
                is_here = "namespaceSelector" in peer or namespace == "here"
                if is_here and matches(peer["podSelector"], labels):
                    found += [port["port"] for port in rule.get("ports", [])] or ["all"]
        return found

    for pod in nodes:
        labels = pod["metadata"]["labels"]
        assert matches(policy["podSelector"], labels)
        assert ports(labels, "here") == ["all"]
        assert ports(labels, "elsewhere") == []
    for pod in submitters:
        labels = pod["metadata"]["labels"]
        assert not matches(policy["podSelector"], labels)
        assert ports(labels, "here") == [8265]
        assert ports(labels, "elsewhere") == []
    assert ports({"app.kubernetes.io/name": "kuberay-operator"}, "elsewhere") == [8265]
    assert ports(stranger, "here") == ports({}, "here") == []


def test_manifests_run_what_is_here() -> None:
    assert PROJECT["name"] == "tokendiff"
    for path in MANIFESTS:
        texts = strings_in(load(path.name))
        images = {text for text in texts if text.startswith("tokendiff:")}
        assert images <= {f"tokendiff:{__version__}"}, path.name
        assert bool(images) == (path.name != "networkpolicy.yaml")
        for pipeline in re.findall(r"pipelines/[\w-]+\.yaml", " ".join(texts)):
            assert (ROOT / pipeline).is_file(), f"{path.name}: {pipeline}"


# Stands in for `ray job`: remembers the ids that were submitted in the folder it runs in, and says
# of each what RESULT says.
FAKE_RAY = """#!/bin/sh
shift
case $1 in
submit)
    id=$(echo "$*" | sed 's/.*--submission-id \\([^ ]*\\).*/\\1/')
    test ! -e "$id" || { echo "Job with submission_id $id already exists" >&2; exit 1; }
    echo "$*" > "$id" ;;
logs) test -e "$3" ;;
status) test -e "$2" && echo "Status for job '$2': $RESULT" ;;
esac
"""


@pytest.mark.parametrize(("result", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_cronjob_submits_once_a_day_and_ends_as_the_job_does(
    tmp_path: Path, result: str, code: int
) -> None:
    spec = load("cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(FAKE_RAY)
    ray.chmod(0o755)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    environment = {"PATH": f"{ray.parent}:/usr/bin:/bin", "RESULT": result}
    for _ in range(2):  # the second pod of a day follows the first one's job
        done = subprocess.run(
            [*container["command"], *container["args"]], cwd=jobs, env=environment, check=False
        )
        assert done.returncode == code
    (submitted,) = jobs.iterdir()
    assert re.fullmatch(r"nightly-\d{4}-\d\d-\d\d", submitted.name)
    assert submitted.read_text().strip().endswith("-m jobs.pipeline run pipelines/retrain.yaml")


def test_cronjob_fails_where_nothing_can_be_submitted(tmp_path: Path) -> None:
    (container,) = load("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "containers"
    ]
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\nexit 1\n")
    ray.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 1
