"""What is known to be wrong with an evaluation before a cluster is asked for anything."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tokendiff.artifacts.manifest import commit
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.errors import InputError
from tokendiff.evaluation.inputs import EvaluationInputs
from tokendiff.models.dflash.planning import new_draft_config

V, LENGTH = 16, 12


def rows_in(folder: Path, *, count: int = 4, tokenizer: Any = None, token: int = 5) -> Path:
    return token_folder(
        folder,
        files=[random_rows(4, LENGTH)],
        heldout=[*random_rows(count - 1, LENGTH), [token] * LENGTH] if count else [],
        max_length=LENGTH,
        tokenizer=tokenizer or letter_tokenizer(V),
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints whose weights are damaged, rows, samples and a reference model."""
    folder = tmp_path_factory.mktemp("places")
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=V,
        max_position_embeddings=32,
    )
    causal = tiny_causal(vocab_size=V, num_hidden_layers=6).config
    larger = letter_tokenizer(V)
    larger.add_tokens(["<repo>"], special_tokens=True)
    for name, config, tokenizer in (
        ("model", bert, letter_tokenizer(V)),
        ("mixed", bert, letter_tokenizer(V + 1)),
        ("target", causal, letter_tokenizer(V)),
        ("ar", causal, letter_tokenizer(V)),
        ("larger", causal, larger),
        ("draft", _draft_of(causal), larger),
        ("headless", causal, letter_tokenizer(V)),
    ):
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name != "headless":
            (folder / name / "model.safetensors").write_bytes(b"")
    process = NoiseProcess(
        forward_process="absorbing",
        vocab_size=V,
        mask_token_id=1,
        max_length=LENGTH,
        objective="mdlm",
    )
    rows = rows_in(folder / "rows")
    for name, run in (
        ("model", {"objective": {"name": "mdlm"}}),
        ("mixed", {"objective": {"name": "mdlm"}}),
        ("ar", {"objective": {"name": "ar"}}),
        ("larger", {"objective": {"name": "ar"}}),
        (
            "draft",
            {"objective": {"name": "dflash"}, "target_model_id": str(folder / "target")},
        ),
    ):
        if name in ("model", "mixed"):
            process.save(folder / name)
        metadata = {"run": run, "data_path": str(rows)}
        commit(folder / name, kind="checkpoint", metadata=metadata)
    rows_in(folder / "one-row", count=1)
    rows_in(folder / "other-rows", tokenizer=letter_tokenizer(V + 4))
    rows_in(folder / "beyond", tokenizer=larger, token=V)
    (folder / "samples").mkdir()
    facts = {"checkpoint": "another", "checkpoint_files": "another"}
    commit(folder / "samples", kind="samples", metadata=facts)
    return {path.name: str(path) for path in folder.iterdir()}


def _draft_of(target: Any) -> Any:
    return new_draft_config(
        target, target_model_id="t", num_layers=2, block_size=4, mask_token_id=1
    )


@pytest.mark.parametrize(
    ("paths", "fields", "says"),
    [
        ({"checkpoint": "model"}, {}, None),
        ({"checkpoint": "ar"}, {}, None),
        ({"checkpoint": "draft"}, {}, None),
        ({"checkpoint": "mixed"}, {}, "one of the two belongs to another model"),
        ({"checkpoint": "model"}, {"target_model_id": "target"}, "goes with a DFlash draft, which"),
        ({"checkpoint": "ar"}, {"verify": True}, "verify checks a noise process"),
        ({"checkpoint": "draft"}, {"target_model_id": "model"}, "^target_model_id .* 'bert', not"),
        ({"checkpoint": "draft"}, {"target_model_id": "headless"}, "a config but no weights"),
        ({"checkpoint": "model", "data": "other-rows"}, {}, "made with another tokenizer"),
        ({"checkpoint": "model", "data": "one-row"}, {}, "has 1 row, and an evaluation takes"),
        ({"checkpoint": "draft", "data": "beyond"}, {}, "up to id 16 .<repo>., but .* has 16 emb"),
        ({"checkpoint": "larger", "data": "beyond"}, {}, "up to id 16, and .* has 16 embeddings"),
        ({"checkpoint": "model", "samples": "rows"}, {}, "holds 'tokens', expected 'samples'"),
        ({"checkpoint": "model", "samples": "/no"}, {}, "/no: no committed samples there"),
        ({"checkpoint": "model", "samples": "samples"}, {}, "samples of another, not of"),
    ],
)
def test_what_does_not_go_together_is_said_before_a_weight_is_read(
    paths: dict[str, str], fields: dict[str, Any], says: str | None, places: dict[str, str]
) -> None:
    found = {name: places.get(value, value) for name, value in paths.items()}
    config = EvaluateConfig.model_validate(
        {name: places.get(str(value), value) for name, value in fields.items()}
    )

    def opened() -> EvaluationInputs:
        return EvaluationInputs.open(
            config,
            checkpoint_path=found["checkpoint"],
            data_path=found.get("data"),
            samples_path=found.get("samples"),
        )

    if says is None:
        inputs = opened()
        assert inputs.data.num_rows == 4
        assert (inputs.process is not None) == (paths["checkpoint"] == "model")
        assert inputs.is_draft == (paths["checkpoint"] == "draft")
        return
    kinds: tuple[type[Exception], ...] = (InputError, OSError)  # a folder of another kind
    with pytest.raises(kinds, match=says):
        opened()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere", "^reference_model_name_or_path '/nowhere' cannot be opened"),
        ("model", "^reference_model_name_or_path .* 'bert', not a causal language model"),
        ("headless", "^reference_model_name_or_path .*: a config but no weights"),
    ],
)
def test_a_reference_is_looked_at_where_there_are_samples(
    name: str, says: str, places: dict[str, str], tmp_path: Path
) -> None:
    from tokendiff.artifacts.identity import checkpoint_identity

    facts = {
        "checkpoint": places["model"],
        "checkpoint_files": checkpoint_identity(Path(places["model"])),
    }
    tmp_path.joinpath("samples").mkdir()
    commit(tmp_path / "samples", kind="samples", metadata=facts)
    config = EvaluateConfig(reference_model_name_or_path=places.get(name, name))
    options: dict[str, Any] = {"checkpoint_path": places["model"], "data_path": None}
    EvaluationInputs.open(config, samples_path=None, **options)
    with pytest.raises(InputError, match=says):
        EvaluationInputs.open(config, samples_path=tmp_path / "samples", **options)
