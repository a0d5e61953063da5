"""Rows whose worker dies whenever they are sampled: found, and set aside so that the rest goes on.

Nobody survives to say which row it was. So a worker notes in a file which rows it is about to
sample. A worker that finds such a note of its own job knows that those rows were in flight
when another died. Rows that were in flight too often are sampled in smaller groups, at last alone:
a row is set aside only after a death in which no other row was in flight.

A note of an earlier job is not counted: whatever ends a driver ends its workers too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import RECORD_FOLDER, write_atomically

SET_ASIDE = "set_aside"  # folder of the files that name rows
ATTEMPTS = f"{RECORD_FOLDER}/attempts"  # no part of a result


def groups_to_sample(
    ids: Sequence[int], failures: Mapping[int, int], *, batch_size: int, most: int
) -> tuple[list[list[int]], list[int]]:
    """Groups of rows to sample one after the other, and rows to set aside.

    All rows are one group until one of them was in flight at `most - 2` deaths. Then each batch is
    a group, and where one of its rows was in flight at `most - 1`, each row is. Batches are those
    that the rows would be in if none were set aside, so that the samples of other batches stay as
    they are.

    Args:
        ids: rows of one part, in order.
        failures: by id, deaths that a row was in flight at.
        most: of which a row is set aside; at least 3.
    """
    if most < 3:
        raise ValueError(f"most must be at least 3: all rows, a batch, one row; got {most}")
    set_aside = [row for row in ids if failures.get(row, 0) >= most]
    if max((failures.get(row, 0) for row in ids), default=0) < most - 2:
        return [list(ids)] if ids else [], []
    groups: list[list[int]] = []
    for at in range(0, len(ids), batch_size):
        batch = list(ids[at : at + batch_size])
        if max(failures.get(row, 0) for row in batch) < most - 1:
            groups.append(batch)
        else:
            groups += [[row] for row in batch if row not in set_aside]
    return groups, set_aside


@dataclass(kw_only=True)
class RowFailures:
    """What is known of the deaths at one part's rows, in a file that outlives its workers.

    Args:
        path: of the file.
        job: of which deaths are counted; another for each start of a driver.
    """

    path: Location
    job: str
    failures: dict[int, int] = field(default_factory=dict)

    def read(self) -> None:
        """Count the death of whoever was at this part before, if the file tells of one."""
        try:
            state = json.loads(self.path.read_bytes())
            in_flight = state["in_flight"] if state["job"] == self.job else []
            self.failures = {int(row): count for row, count in state["failures"].items()}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # cut off as it was written: what it knew is found out again
        for row in in_flight:
            self.failures[row] = self.failures.get(row, 0) + 1

    def note(self, in_flight: Sequence[int]) -> None:
        """Say which rows are about to be sampled."""
        state = {"job": self.job, "in_flight": list(in_flight), "failures": self.failures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(state).encode())

    def forget(self) -> None:
        """The part is done."""
        self.path.unlink(missing_ok=True)

    def record(self, row: int, *, place: str, prompt: str | None) -> dict[str, Any]:
        """What a line of `set_aside/` says."""
        count = self.failures[row]
        reason = (
            f"the worker died {count} times while this row was sampled, the last time with no "
            "other row; its memory may not suffice, or a library fails on this row"
        )
        return {"id": row, "place": place, "reason": reason, "prompt": prompt}
