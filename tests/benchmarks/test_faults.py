"""The harness of `make faults`: it finds what holds, and what does not."""

import multiprocessing
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import in_suite, inputs, object_store, signals
from benchmarks.faults.moments import Moments
from benchmarks.faults.subject import Subject, prepared
from benchmarks.faults.table import Case, Row, read_rows, try_case, write_rows
from tests import ROOT

KILLED = replace(signals.CASES[0], moments=1)
LISTS_LATE = next(case for case in object_store.CASES if case.name == "s3-lists-late")
Try = Callable[[Case, int], Row]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Try]:
    """Tries a case in a process that has run nothing else: once a test has trained on an emulated
    device, as some here do, what is forked from its process cannot train.
    """
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(tmp_path_factory.mktemp("subject"),),
    ) as process:
        yield lambda case, seed: process.submit(_try, case, seed).result()


_prepared = ExitStack()  # as long as its process
_subjects: list[Subject] = []


def _prepare(scratch: Path) -> None:
    _subjects.append(_prepared.enter_context(prepared(scratch, has_report=False)))


def _try(case: Case, seed: int) -> Row:
    return try_case(case, _subjects[0], seed)


def _killed_and_doubled(subject: Subject, chance: random.Random, folder: Path) -> str:
    at = len(subject.moments("pipeline"))
    moments = Moments(root=folder / "out", actions={at: signals.send(signal.SIGKILL)})
    subject.run("pipeline", folder, moments.install)
    (part,) = folder.glob("out/tiny/generate-*/part-00001.jsonl")
    part.write_text(part.read_text() * 2)
    subject.check_goes_on("pipeline", folder)
    return "not noticed"


@pytest.mark.slow
def test_a_promise_that_holds_and_one_that_does_not(tried: Try) -> None:
    """A run that is killed goes on; one that cannot, for a row of its samples is doubled, does
    not.
    """
    row = tried(KILLED, 5)
    assert row.verdict == "held", row.seen
    assert row.seen.startswith("killed before its write")
    row = tried(replace(KILLED, trial=_killed_and_doubled), 5)
    assert row.verdict == "broken", row.seen
    assert "does not match its MANIFEST" in row.seen


@pytest.mark.slow
def test_a_pipeline_behind_a_store_that_lists_late_is_as_on_a_disk(tried: Try) -> None:
    row = tried(replace(LISTS_LATE, moments=1), 1)
    assert row.verdict == "held", row.seen
    assert "gone on with the same result" in row.seen


@pytest.mark.parametrize(
    ("code", "out", "seen"),
    [
        (0, "a: 1,000 inputs, 3 refused, 1 s\nb: 50 inputs, 0 refused, 1 s\n", "1,050 inputs"),
        (1, "a: seed 5: KeyError: 'x'\na: 0 inputs, 0 refused, 1 s\n", "a: seed 5: KeyError"),
    ],
)
def test_what_the_fuzz_tests_find_is_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, out: str, seen: str
) -> None:
    def run(command: list[str], **kwargs: Any) -> Any:
        assert command[command.index("--inputs") + 1] == "77"
        return subprocess.CompletedProcess(command, code, stdout=out, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    row = try_case(inputs.case_of(77), Subject(scratch=tmp_path), seed=1)
    assert row.verdict == ("broken" if code else "held")
    assert seen in row.seen


@pytest.mark.parametrize("test", sorted(set(in_suite.TESTS.values())))
def test_the_tests_that_are_cases_are_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text()


def test_a_table_keeps_the_rows_of_cases_that_are_not_run_now(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    cases = [
        Case(name=name, promise="a | b", done="x", trial=partial(signals.kill)) for name in "ab"
    ]
    row = Row(case="a", promise="a | b", done="x", seen="1; 2 (seed 3)", verdict="held")
    write_rows(page, cases, {"a": row}, "# Title")
    assert read_rows(page)["a"] == row
    assert read_rows(page)["b"].verdict == "not run yet"
    write_rows(page, cases, read_rows(page), "# Title")
    assert read_rows(page)["a"] == row
    assert "2 cases: 1 held, 0 broken, 1 not run yet." in page.read_text()
