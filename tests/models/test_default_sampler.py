"""The sampler that a family brings along, from its config.json to what a job would run."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.generate import _default_sampler
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.loader import load_config
from tokendiff.errors import InputError
from tokendiff.models.families import FAMILIES

NEW: dict[str, Any] = {"generate.sampler.max_new_tokens": "8"}


def folder_of(path: Path, **fields: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def section_of(
    flags: dict[str, Any], overrides: tuple[str, ...] = (), path: Path | None = None
) -> GenerateConfig:
    config = load_config(path, overrides, flags, default_sampler=_default_sampler)
    assert config.generate is not None
    return config.generate


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "llada"}, "blockwise"),
        ({"model_type": "llada", "num_experts": 64}, "blockwise"),
        ({"model_type": "Dream"}, "blockwise"),
        ({"model_type": "sdar"}, "sdar"),
        ({"model_type": "qwen3"}, "ar"),
        ({"model_type": "of_nobody"}, "ar"),
    ],
)
def test_a_model_brings_its_sampler_along(
    fields: dict[str, Any], name: str, tmp_path: Path
) -> None:
    flags = {"generate.model_id": folder_of(tmp_path / "m", **fields), **NEW}
    section = section_of(flags)
    assert section.sampler.name == name
    assert getattr(section.sampler, "max_new_tokens") == 8  # noqa: B009
    # As if it had been named, so that an earlier run of the same sampler is found again.
    named = section_of({**flags, "generate.sampler": name})
    assert named.result_fields() == section.result_fields()


def test_every_family_has_a_sampler_that_there_is() -> None:
    for family in FAMILIES.values():
        GenerateConfig.model_validate({"sampler": family.sampler})


def test_a_name_that_is_given_is_kept_and_fields_alone_are_no_name(tmp_path: Path) -> None:
    llada = folder_of(tmp_path / "m", model_type="llada")
    flags = {"generate.model_id": llada, "generate.seq_len": "40"}
    assert section_of({**flags, "generate.sampler": "ancestral"}).sampler.name == "ancestral"
    by_override = section_of(flags, ("generate.sampler.block_size=8", "generate.seed=3"))
    assert (by_override.sampler.name, by_override.seed) == ("blockwise", 3)
    assert getattr(by_override.sampler, "block_size") == 8  # noqa: B009
    file = tmp_path / "run.yaml"
    file.write_text(f"generate: {{model_id: {llada}, seq_len: 40, sampler: first_hitting}}\n")
    assert section_of({}, path=file).sampler.name == "first_hitting"
    file.write_text(f"generate: {{model_id: {llada}, seq_len: 40, sampler: {{top_p: 0.5}}}}\n")
    assert section_of({}, path=file).sampler.name == "blockwise"


def test_checkpoints_and_other_jobs_keep_the_sections_default(tmp_path: Path) -> None:
    assert section_of({"generate.checkpoint_path": "x"}).sampler.name == "ancestral"
    llada = folder_of(tmp_path / "m", model_type="llada")
    flags = {"generate.model_id": llada, "generate.seq_len": "40"}
    other_job = load_config(None, (), flags).generate
    assert other_job is not None
    assert other_job.sampler.name == "ancestral"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_id '.*nothing' cannot be opened .*config\.json"):
        section_of({"generate.model_id": str(tmp_path / "nothing"), **NEW})
    flags = {"generate.model_id": folder_of(tmp_path / "m", model_type="llada")}
    with pytest.raises(InputError, match="sampler 'blockwise' with a model_id needs the length"):
        section_of(flags)
    with pytest.raises(InputError, match="denoising_steps"):
        section_of({**flags, **NEW, "generate.sampler.denoising_steps": "4"})
