"""The section `cluster`: how the work is spread over a Ray cluster."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from tokendiff.config.base import MAX_COUNT, MAX_WORKERS, Section


def _number_or_range(value: Any) -> Any:
    """`4:16` is left a text, whose ends the properties of ClusterConfig give. A flag gives a number
    as a text too.
    """
    if isinstance(value, str) and re.fullmatch("[1-9][0-9]{0,30}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        if value > MAX_WORKERS:
            raise ValueError(f"must be <= {MAX_WORKERS}")
        return value
    ends = (
        re.fullmatch(r"([1-9][0-9]{0,30}):([1-9][0-9]{0,30})", value)
        if isinstance(value, str)
        else None
    )
    if ends is None:
        raise ValueError("should be a whole number from 1, or two of them as MIN:MAX")
    if int(ends[1]) > int(ends[2]):
        raise ValueError(f"{ends[1]} exceeds {ends[2]}; write the smaller one first")
    if int(ends[2]) > MAX_WORKERS:
        raise ValueError(f"must be <= {MAX_WORKERS}")
    return value


class ClusterConfig(Section):
    """How the work is spread. Nothing here changes a result, or is part of a stage's key."""

    address: str | None = Field(
        None,
        description="Ray: address of a running cluster; by default RAY_ADDRESS. If neither is "
        "set, one worker runs without Ray, and for more it is started on this machine; local "
        "starts it at once",
    )
    num_workers: Annotated[int | str, BeforeValidator(_number_or_range)] = Field(
        1,
        description="training workers. MIN:MAX starts as many as the cluster has room for, "
        "continues with fewer when a node is lost, and adds workers at a checkpoint",
    )
    cpus_per_worker: float = Field(1.0, gt=0.0, description="CPUs reserved by one worker or actor")
    use_gpu: bool | None = Field(
        None, description="use GPUs; by default if the cluster has one when the job starts"
    )
    threads_per_worker: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="torch threads of a worker on the CPU; by default the machine's cores divided "
        "by its workers",
    )
    num_actors: int = Field(
        1, ge=1, le=MAX_WORKERS, description="most actors that sample or evaluate"
    )
    min_actors: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="number of actors that sampling starts with; more are added, up to "
        "num_actors, while the cluster has room; by default num_actors",
    )
    gpus_per_actor: float = Field(
        1.0, gt=0.0, description="GPUs of an actor that samples; 0.5 lets two share one"
    )
    max_failures: int = Field(
        3,
        ge=0,
        le=MAX_COUNT,
        description="most workers that may be lost before the job fails; with num_workers "
        "MIN:MAX, since the last checkpoint",
    )
    worker_start_timeout_s: float = Field(
        600.0, gt=0.0, description="seconds to wait until the cluster has room for the workers"
    )

    @property
    def min_workers(self) -> int:
        return int(str(self.num_workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        return int(str(self.num_workers).rpartition(":")[2])

    @model_validator(mode="after")
    def _actors_agree(self) -> "ClusterConfig":
        if self.min_actors is not None and self.min_actors > self.num_actors:
            raise ValueError(
                f"min_actors {self.min_actors} exceeds num_actors {self.num_actors}; lower it, "
                "or raise num_actors"
            )
        if self.gpus_per_actor > 1.0 and self.gpus_per_actor % 1.0:
            raise ValueError(
                f"gpus_per_actor {self.gpus_per_actor:g}: above 1 it must be a whole number"
            )
        if self.use_gpu is False:
            self.refuse_ignored(("gpus_per_actor",), "use_gpu false")
        return self
