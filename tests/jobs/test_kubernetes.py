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

FOLDER = ROOT / "jobs" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Schedule = Annotated[str, StringConstraints(pattern=r"^([0-9*/,-]+ ){4}[0-9*/,-]+$")]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


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
    volumeMounts: list[Mount] = []


class Claim(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    restartPolicy: Literal["Never", "OnFailure"] | None = None
    terminationGracePeriodSeconds: Count | None = None


class Pod(Strict):
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


SPECS: dict[tuple[str, str], type[Strict]] = {
    ("ray.io/v1", "RayCluster"): RayClusterSpec,
    ("ray.io/v1", "RayJob"): RayJobSpec,
    ("ray.io/v1", "RayCronJob"): RayCronJobSpec,
    ("batch/v1", "CronJob"): CronJobSpec,
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


def test_manifests_run_what_is_here() -> None:
    assert PROJECT["name"] == "tokendiff"
    for path in MANIFESTS:
        texts = strings_in(load(path.name))
        images = {text for text in texts if text.startswith("tokendiff:")}
        assert images == {f"tokendiff:{__version__}"}, path.name
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
