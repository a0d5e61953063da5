"""What was checked against which oracle, how far apart they were, and how far apart they may be."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import write_atomically

CERTIFICATE = "certificate.json"
CHECKPOINT = "checkpoint"  # the subject that is not code
_COLUMNS = ("what is held to be true", "against", "off by at most")

Subject = TypeVar("Subject")


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[Subject]):
    """One thing to check of every subject of a kind; made by `rule`.

    Attributes:
        figure: how far a subject is from the oracle.
    """

    name: str
    claim: str
    oracle: str
    tolerance: float
    figure: Callable[[Subject], float]


def rule(
    *, claim: str, oracle: str, tolerance: float
) -> Callable[[Callable[[Subject], float]], Rule[Subject]]:
    """Make the decorated function, which says how far a subject is from an oracle, a rule.

    Args:
        claim, oracle: for readers of the certificate.
        tolerance: the most that the figure may be.
    """

    def make(figure: Callable[[Subject], float]) -> Rule[Subject]:
        return Rule(
            name=figure.__name__, claim=claim, oracle=oracle, tolerance=tolerance, figure=figure
        )

    return make


@dataclass(frozen=True, kw_only=True)
class Check:
    """One entry of a certificate.

    Attributes:
        figure: None where it is not finite, or the check could not be carried out.
        error: why it could not.
    """

    subject: str
    name: str
    claim: str
    oracle: str
    figure: float | None
    tolerance: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.figure is not None and self.figure <= self.tolerance


def apply(rules: Sequence[Rule[Subject]], name: str, subject: Subject) -> Iterator[Check]:
    """The checks of one subject, as they are made."""
    for rule in rules:
        error = None
        try:
            figure = float(rule.figure(subject))
        except Exception as exception:  # code that breaks has failed, and the others still count
            figure, error = math.nan, f"{type(exception).__name__}: {exception}"
        yield Check(
            subject=name,
            name=rule.name,
            claim=rule.claim,
            oracle=rule.oracle,
            figure=figure if math.isfinite(figure) else None,
            tolerance=rule.tolerance,
            error=error,
        )


def write_certificate(folder: Path, checks: Sequence[Check], *, about: Mapping[str, Any]) -> None:
    """Write `certificate.json`.

    Args:
        about: what else the certificate says: the version of the code, the checkpoint.
    """
    entries = [{**asdict(check), "passed": check.passed} for check in checks]
    text = json.dumps({**about, **counts(checks), "checks": entries}, indent=1, allow_nan=False)
    write_atomically(folder / CERTIFICATE, text.encode())


def read_certificate(folder: Location) -> list[Check]:
    """The checks of the certificate in `folder`; none where there is none."""
    path = folder / CERTIFICATE
    entries = json.loads(path.read_text())["checks"] if path.is_file() else []
    return [Check(**{k: v for k, v in entry.items() if k != "passed"}) for entry in entries]


def counts(checks: Sequence[Check]) -> dict[str, int]:
    passed = sum(check.passed for check in checks)
    return {"verify_passed": passed, "verify_failed": len(checks) - passed}


def figures(checks: Sequence[Check]) -> dict[str, float]:
    """For tracking: verify/SUBJECT/CHECK -> figure, NaN where there is none."""
    return {
        f"verify/{check.subject}/{check.name}": math.nan if check.figure is None else check.figure
        for check in checks
    }


def tables(checks: Sequence[Check]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """(title, header, rows) for people: a row per rule, a column per subject; empty where a rule is
    of other subjects.
    """
    by_rule: dict[str, dict[str, dict[str, Check]]] = {}
    for check in checks:
        kind = "checkpoint" if check.subject == CHECKPOINT else "installed code"
        by_rule.setdefault(kind, {}).setdefault(check.name, {})[check.subject] = check
    result = []
    for kind, rules in by_rule.items():
        of_kind = [check for alike in rules.values() for check in alike.values()]
        failed = counts(of_kind)["verify_failed"]
        subjects = list(dict.fromkeys(check.subject for check in of_kind))
        rows = []
        for alike in rules.values():
            one = next(iter(alike.values()))
            cells = [_cell(alike[name]) if name in alike else "" for name in subjects]
            rows.append([one.claim, one.oracle, one.tolerance, *cells])
        title = f"Certificate of the {kind}: " + (
            f"{failed} of {len(of_kind)} checks failed"
            if failed
            else f"all {len(of_kind)} checks passed"
        )
        header = [*_COLUMNS, *(name.replace("_", " ") for name in subjects)]
        result.append((title, header, rows))
    return result


def _cell(check: Check) -> float | str:
    shown = None if check.figure is None else float(f"{check.figure:.1e}")
    if check.passed:
        return shown or 0.0
    return f"FAILED: {check.error or 'not finite' if shown is None else shown}"


def failure(checks: Sequence[Check]) -> str | None:
    """What to say where a check failed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    lines = [
        f"{check.subject}/{check.name}: {check.claim}; "
        + (check.error or f"off by {check.figure}, at most {check.tolerance} is allowed")
        for check in failed
    ]
    return f"verification: {len(failed)} of {len(checks)} checks failed\n" + "\n".join(lines)
