"""Faults that a test of the suite tries already, most of them on Ray: each such test is a case.

The moment is the test's own, so the seed changes nothing.
"""

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.faults.subject import Subject
from benchmarks.faults.table import Broken, Case

ROOT = Path(__file__).parents[2]
_LONGEST_SECONDS = 600.0
# Name of the case -> promise, what is done, the test.
_TESTS = {
    "ray-worker-killed": (
        "Losses and samples are as without the fault.",
        "SIGKILL to a training worker in mid-run",
        "tests/cluster/test_cluster.py::test_a_worker_killed_in_mid_run_costs_nothing_but_time",
    ),
    "ray-actor-killed": (
        "Each row is sampled once, and is the same.",
        "SIGKILL to a sampling actor",
        "tests/cluster/test_cluster.py::"
        "test_samples_survive_a_killed_actor_and_do_not_depend_on_their_number",
    ),
    "ray-worker-killed-for-memory": (
        "The message names the worker that died, its step and its rows.",
        "one of two workers is killed by Ray's memory monitor, as Ray reports it",
        "tests/cluster/test_cluster.py::"
        "test_the_worker_that_died_is_named_with_its_step_and_rows",
    ),
    "ray-actor-killed-for-memory": (
        "A warning names the rows; each row is sampled once.",
        "SIGKILL to a sampling actor in the middle of a batch",
        "tests/cluster/test_poison_rows.py::test_the_rows_that_an_actor_died_at_are_named",
    ),
    "ray-driver-killed-twice": (
        "The files are those of the run that was not killed.",
        "SIGKILL to the driver of a generation job, two times",
        "tests/cluster/test_batch_generation.py::"
        "test_killed_twice_it_ends_with_the_files_of_the_run_that_was_not",
    ),
    "ray-job-stop": (
        "The last step is saved; submitted again, losses are as if left alone.",
        "ray job stop in training",
        "tests/jobs/test_submitted_jobs.py::"
        "test_a_stopped_pipeline_has_saved_its_step_and_goes_on",
    ),
    "node-lost": (
        "An elastic run goes on with fewer workers, and takes more again; losses are the same.",
        "nodes are lost, added and taken away in training",
        "tests/cluster/test_elastic.py::test_nodes_are_lost_added_and_taken_away",
    ),
    "no-capacity": (
        "The run waits, says for what, and gives up after its time.",
        "a cluster without room for the least number of workers",
        "tests/cluster/test_elastic.py::test_a_cluster_without_room_for_the_least_is_waited_for",
    ),
    "loss-not-finite": (
        "Exit code 1, one message, no retry.",
        "a learning rate at which the loss diverges",
        "tests/cluster/test_cluster.py::test_divergence_is_not_retried",
    ),
    "sharded-save-killed": (
        "The checkpoint before is whole and is gone on from.",
        "SIGKILL at moments of a checkpoint that several workers write",
        "tests/training/test_sharding.py::"
        "test_a_kill_at_any_moment_leaves_the_checkpoint_before",
    ),
    "lease-holder-killed": (
        "Another run takes the lease over: at once on its machine, after a wait elsewhere.",
        "SIGKILL to the holder of a folder behind s3://",
        "tests/pipelines/test_lease.py::test_the_lease_of_a_killed_run_is_taken_over",
    ),
    "lease-lost": (
        "The old holder is interrupted and can write nothing more.",
        "another run takes the lease while the holder looks away",
        "tests/pipelines/test_lease.py::test_who_lost_the_lease_can_write_nothing_more",
    ),
    "lease-clock-wrong": (
        "A wait, and never the lease.",
        "clocks of two machines an hour apart",
        "tests/pipelines/test_lease.py::test_a_wrong_clock_costs_a_wait_and_not_the_lease",
    ),
    "lease-two-at-once": (
        "One of them runs.",
        "two runs write a lease in the same instant",
        "tests/pipelines/test_lease.py::test_of_two_that_start_at_once_the_later_writer_stays",
    ),
    "poison-row": (
        "The row is set aside with its reason after `max_row_failures`; all others are sampled "
        "once.",
        "an actor that dies at the same row each time",
        "tests/cluster/test_poison_rows.py::test_a_row_that_kills_its_actor_is_set_aside",
    ),
    "mlflow-absent": (
        "Exit code 2 and a message that says how to go on without.",
        "no server at the address",
        "tests/tracking/test_tracking.py::"
        "test_a_server_that_is_down_is_an_error_that_says_how_to_go_on",
    ),
    "mlflow-silent-at-start": (
        "It is given up after its time, with a message.",
        "a server that accepts and never answers",
        "tests/tracking/test_tracking.py::test_a_server_that_never_answers_is_given_up",
    ),
    "mlflow-experiment-deleted": (
        "Exit code 2 and the command that restores it.",
        "the experiment is deleted between two runs",
        "tests/tracking/test_tracking.py::test_a_deleted_experiment_is_an_input_error",
    ),
    "mlflow-run-deleted": (
        "The run is made anew with all of its log.",
        "the stage's run is deleted from MLflow before the stage goes on",
        "tests/tracking/test_tracking.py::"
        "test_a_run_deleted_from_mlflow_is_made_anew_when_its_stage_goes_on",
    ),
    "promotion-cut-off": (
        "One version is registered, the alias moves once, and rollback leads back step by step.",
        "the process ends between the registration and the alias; then rollbacks",
        "tests/pipelines/test_promotion.py::test_a_promotion_that_was_cut_off_registers_once",
    ),
    "version-deleted": (
        "One message that names the version and the way out; a rollback never leads to a version "
        "that is gone or damaged: the alias stays.",
        "a registered version, its files, or one of their bytes is deleted or changed",
        "tests/pipelines/test_registry_faults.py::"
        "test_what_is_deleted_is_named_and_the_alias_never_leads_to_it",
    ),
}  # fmt: skip
TESTS = {name: test for name, (_, _, test) in _TESTS.items()}


def run_test(subject: Subject, chance: random.Random, folder: Path, *, test: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Broken(f"{test} took longer than {_LONGEST_SECONDS:.0f} s") from None
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or "passed" not in last:
        raise Broken(f"{test}: {last}")
    return f"`{test.rpartition('::')[2]}` passed"


CASES = tuple(
    Case(name=name, promise=promise, done=done, trial=partial(run_test, test=test), moments=1)
    for name, (promise, done, test) in _TESTS.items()
)
