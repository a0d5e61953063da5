"""The harness of `make faults`: it finds what holds, and what does not."""

import random
import signal
import subprocess
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with prepared(tmp_path_factory.mktemp("subject"), has_report=False) as subject:
        yield subject


def test_a_promise_that_holds_and_one_that_does_not(subject: Subject) -> None:
    """A run that is killed goes on; one that cannot, for a row of its samples is doubled, does
    not.
    """

    def doubled(subject: Subject, chance: random.Random, folder: Path) -> str:
        at = len(subject.moments("pipeline"))
        moments = Moments(root=folder / "out", actions={at: signals.send(signal.SIGKILL)})
        subject.run("pipeline", folder, moments.install)
        (part,) = folder.glob("out/tiny/generate-*/part-00001.jsonl")
        part.write_text(part.read_text() * 2)
        subject.check_goes_on("pipeline", folder)
        return "not noticed"

    row = try_case(KILLED, subject, seed=5)
    assert (row.verdict, row.seen.startswith("killed before its write")) == ("held", True)
    row = try_case(replace(KILLED, trial=doubled), subject, seed=5)
    assert row.verdict == "broken"
    assert "does not match its MANIFEST" in row.seen


def test_a_pipeline_behind_a_store_that_lists_late_is_as_on_a_disk(subject: Subject) -> None:
    late = next(case for case in object_store.CASES if case.name == "s3-lists-late")
    row = try_case(replace(late, moments=1), subject, seed=1)
    assert (row.verdict, "gone on with the same result" in row.seen) == ("held", True)


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
