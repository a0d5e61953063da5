"""A few hundred inputs for each reader of `tests.fuzz`, and whether it would notice."""

from pathlib import Path
from typing import Any

import pytest

from tests import fuzz
from tokendiff.errors import InputError


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_input_gives_a_result_or_an_error_of_our_own(name: str) -> None:
    inputs = 20 if "pipeline" in name else 60
    num_refused = fuzz.run_target(name, inputs=inputs, start=1)
    # Were all refused, nothing behind the first check would be tried, and the other way round.
    # Readers of prompts and chats return their errors by row.
    is_by_rows = name in ("prompts", "chats")
    assert name in ("manifest", "signed manifest", "any YAML") or is_by_rows or num_refused > 0
    assert num_refused <= inputs


def test_what_is_not_our_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, value: Any) -> None:
        if "a" in str(value):
            raise KeyError(value)
        raise InputError("refused")

    monkeypatch.setitem(fuzz.TARGETS, "toy", (fuzz.TEXTS, read))
    with pytest.raises(KeyError):
        fuzz.run_target("toy", inputs=300, start=0)
    assert fuzz.main(["--only", "toy", "--inputs", "300"]) == 1
