"""Numbers that no job can work with are refused before any begins: libraries answer to them with a
traceback, a panic, or never.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from jobs.pipeline import main
from tokendiff.config.loader import is_tagged, load_config, models_in, tags
from tokendiff.config.pipeline import Config, StageConfig
from tokendiff.errors import InputError

_SEED = 2**63  # any number below is one


def integer_fields(
    model: type[BaseModel], at: str = "", chosen: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Path, name and overrides that choose its model, of each field that takes an integer."""
    for name, field in model.model_fields.items():
        path = f"{at}{name}"
        words = re.findall(r"\w+", str(field.annotation))
        if (field.annotation is int or "int" in words) and not models_in(field.annotation):
            yield path, name, chosen
        for inner in models_in(field.annotation):
            choice = (f"{path}={tags(inner)[0]}",) if is_tagged(field) else ()
            if inner is not StageConfig:
                yield from integer_fields(inner, f"{path}.", (*chosen, *choice))


_FIELDS = list(dict.fromkeys(integer_fields(Config)))


def test_the_fields_are_found() -> None:
    paths = {path for path, _, _ in _FIELDS}
    assert len(_FIELDS) > 80
    assert {
        "train.per_device_train_batch_size",
        "train.objective.block_length",
        "generate.sampler.gen_length",
        "cluster.num_workers",
        "runner.max_retries",
    } <= paths


@pytest.mark.parametrize("value", [10**18, 10**23])
def test_every_integer_has_a_bound(value: int) -> None:
    for path, name, chosen in _FIELDS:
        shown = f"[{value}]" if name == "stop_token_ids" else str(value)
        needed = ["frontier.samplers=[remdm]"] if path.startswith("frontier.") else []
        overrides = [*needed, *chosen, f"{path}={shown}"]
        if name == "seed" and value < _SEED:
            assert load_config(None, overrides)
            continue
        with pytest.raises(InputError, match=r"must be <=? [0-9]+") as error:
            load_config(None, overrides)
        assert f"-o {path}: " in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", ["1:10000000000000000000000", "10000000000000000000000"])
def test_workers_have_a_bound(ends: str) -> None:
    with pytest.raises(InputError, match=r"cluster.num_workers: must be <= 100000"):
        load_config(None, [f"cluster.num_workers='{ends}'"])


def test_a_job_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nroot: {tmp_path}\npreprocess:\n  vocab_size: {10**18}\n")
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}:4: preprocess.vocab_size: must be <= 10000000, got {10**18}\n"
    )
