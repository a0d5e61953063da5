"""The harness of `make faults`: it finds what holds, and what does not."""

import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.faults import signals
from benchmarks.faults.moments import Moments
from benchmarks.faults.subject import Subject, prepared
from benchmarks.faults.table import Case, Row, read_rows, try_case, write_rows

KILLED = replace(signals.CASES[0], moments=1)


def test_a_promise_that_holds_and_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    with prepared(tmp_path, has_report=False) as subject:
        row = try_case(KILLED, subject, seed=5)
        assert (row.verdict, row.seen.startswith("killed before its write")) == ("held", True)
        row = try_case(replace(KILLED, trial=doubled), subject, seed=5)
        assert row.verdict == "broken"
        assert "does not match its MANIFEST" in row.seen


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
