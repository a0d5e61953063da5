"""Rows at which workers die: which are set aside, after how many deaths, and nobody else."""

from pathlib import Path

import pytest

from tokendiff.data.row_failures import RowFailures, groups_to_sample

BATCH = 4


def sample_all(
    path: Path, ids: list[int], poison: set[int], *, most: int, job: str = "job"
) -> tuple[list[int], list[int], int]:
    """Rows sampled, rows set aside, and how often the worker died on the way."""
    deaths = 0
    while True:
        failures = RowFailures(path=path, job=job)
        failures.read()
        groups, set_aside = groups_to_sample(ids, failures.failures, batch_size=BATCH, most=most)
        sampled: list[int] = []
        for group in groups:
            failures.note(group)
            if poison & set(group):
                break
            sampled += group
        else:
            failures.forget()
            return sampled, set_aside, deaths
        deaths += 1
        assert deaths < 100


@pytest.mark.parametrize("most", [3, 4, 6])
@pytest.mark.parametrize("poison", [[0], [6], [17], [5, 6], [3, 4, 17], list(range(18))])
def test_just_the_rows_that_kill_are_set_aside(
    tmp_path: Path, poison: list[int], most: int
) -> None:
    ids = [row for row in range(18) if row != 9]  # one is of no use for another reason
    poison = [row for row in poison if row in ids]
    sampled, set_aside, deaths = sample_all(tmp_path / "note", ids, set(poison), most=most)
    assert sampled == [row for row in ids if row not in poison]
    assert set_aside == poison
    assert not list(tmp_path.iterdir())
    # Once for all rows, once for a batch, once alone; what is known of a batch serves its others.
    assert deaths >= most
    assert deaths == most or len(poison) > 1


def test_one_death_changes_nothing_but_by_default_the_next_ones_are_looked_into() -> None:
    ids = list(range(10))
    whole: tuple[list[list[int]], list[int]] = ([ids], [])
    assert groups_to_sample(ids, {}, batch_size=BATCH, most=4) == whole
    assert groups_to_sample(ids, dict.fromkeys(ids, 1), batch_size=BATCH, most=4) == whole
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert groups_to_sample(ids, dict.fromkeys(ids, 2), batch_size=BATCH, most=4) == (batches, [])
    assert groups_to_sample([], {}, batch_size=BATCH, most=4) == ([], [])
    with pytest.raises(ValueError, match="at least 3"):
        groups_to_sample(ids, {}, batch_size=BATCH, most=2)


def test_whatever_ends_the_job_is_not_blamed_on_rows(tmp_path: Path) -> None:
    path = tmp_path / "run" / "note"
    for start in range(20):
        failures = RowFailures(path=path, job=f"start {start}")
        failures.read()
        failures.note([1, 2])
    assert failures.failures == {}
    same = RowFailures(path=path, job="start 19")
    same.read()
    assert same.failures == {1: 1, 2: 1}
    same.note([1])
    later = RowFailures(path=path, job="another")
    later.read()
    assert later.failures == {1: 1, 2: 1}  # what was known stays known


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "job"}', '{"job": 1, "failures": 3}'])
def test_a_note_that_was_cut_off_tells_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "note"
    path.write_text(text)
    failures = RowFailures(path=path, job="job")
    failures.read()
    assert failures.failures == {}
