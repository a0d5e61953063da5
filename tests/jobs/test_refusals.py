"""Jobs and pipelines say what is wrong before Ray or MLflow starts, and leave nothing behind."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from transformers import BertConfig

from jobs import evaluate, generate, pipeline, preprocess, train
from pipelines import runner
from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tests.models.test_requests import checkpoint, saved, without_mask


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which neither Ray nor MLflow may start."""

    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was not refused before anything started")

    monkeypatch.setattr(runner, "ray_session", started)
    monkeypatch.setattr(runner.MlflowMirror, "open", started)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def places(folder: Path) -> dict[str, str]:
    """Models whose weights are damaged, and rows."""
    causal = tiny_causal(vocab_size=30, num_hidden_layers=6).config
    bert = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    saved(folder / "maskless", causal, without_mask())
    saved(folder / "bert", bert)
    checkpoint(folder / "mdlm", bert)
    rows: dict[str, Any] = {
        "files": [random_rows(4, 8)],
        "heldout": random_rows(4, 8),
        "max_length": 8,
    }
    token_folder(folder / "rows", tokenizer=letter_tokenizer(30), **rows)
    token_folder(folder / "other", tokenizer=letter_tokenizer(16), **rows)
    return {path.name: str(path) for path in folder.iterdir()}


Main = Callable[[Sequence[str]], int]


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (
            generate.main,
            "--model_id maskless --sampler sdar --prompt abc",
            "neither its config nor its tokenizer names a mask token",
        ),
        (generate.main, "--model_id bert --sampler ar --prompt abc", "not a causal language model"),
        (
            generate.main,
            "--checkpoint_path mdlm --seq_len 999",
            "the model has positions for 512 tokens",
        ),
        (
            generate.main,
            "--sampler dflash --target_model_id maskless --draft_model_id bert",
            "is no DFlash draft",
        ),
        (
            train.main,
            "--objective ar --model_name_or_path bert --data_path rows",
            "is of type 'bert', and no causal one",
        ),
        (
            train.main,
            "--model_name_or_path /nowhere --tokenizer_name_or_path bytes",
            "'/nowhere' cannot be opened",
        ),
        (
            train.main,
            "--objective dflash --target_model_id bert",
            "target_model_id",
        ),
        (preprocess.main, "--tokenizer_name_or_path /nowhere", "no tokenizer can be opened there"),
        (preprocess.main, "--output_dir bert", "holds other files (config.json, model.safetens"),
        (generate.main, "--checkpoint_path mdlm --output_dir rows", "rows holds tokens; choose"),
        (
            evaluate.main,
            "--checkpoint_path mdlm --data_path other",
            "was made with another tokenizer",
        ),
    ],
)
def test_a_job_is_refused_before_anything_starts(
    main: Main, flags: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = places(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    assert main([found.get(word, word) for word in flags.split()]) == 2
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_pipeline_is_refused_where_a_stage_cannot_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = places(folder)
    stages = {
        "corpus": {"kind": "preprocess"},
        "model": {
            "kind": "train",
            "inputs": {"data": "corpus"},
            "config": {"model_name_or_path": found["bert"], "objective": "block_refinement"},
        },
        "samples": {
            "kind": "generate",
            "config": {"model_id": found["maskless"], "sampler": "sdar", "prompt": ["abc"]},
        },
    }
    path = folder / "p.yaml"

    def run(**wanted: Any) -> str:
        section = {"name": "toy", "root": str(folder / "root"), "stages": wanted}
        path.write_text(yaml.safe_dump(section))
        assert pipeline.main(["run", str(path)]) == 2
        return capsys.readouterr().err

    assert "names a mask token" in run(samples=stages["samples"])
    assert "'bert', and no causal one" in run(corpus=stages["corpus"], model=stages["model"])
    assert pipeline.main(["status", str(path)]) == 0
    assert "bad input" in capsys.readouterr().out
    made = sorted(path.name for path in (folder / "root").rglob("*"))
    assert not [name for name in made if name.startswith(("corpus-", "model-", "samples-", "mlf"))]


@pytest.mark.parametrize(
    ("uri", "code", "says"),
    [
        ("hf://nobody/nothing", 1, "hf://nobody/nothing/MANIFEST.json: Cannot reach "),
        ("http://127.0.0.1:9/x", 2, "folders cannot be read or written at a web address; "),
        ("https://127.0.0.1:9/x", 2, "folders cannot be read or written at a web address; "),
        ("odd://x", 1, "odd://x/MANIFEST.json: away"),
    ],
)
def test_a_store_that_cannot_be_read_is_one_message(
    uri: str, code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(fsspec.AbstractFileSystem):
        """A store whose package raises what it likes."""

        def info(self, *args: Any, **kwargs: Any) -> Any:
            raise LookupError("away")

    fsspec.register_implementation("odd", Odd, clobber=True)
    flags = ["--prompt", "a", "--output_dir", str(tmp_path / "out"), "-o", f"root={tmp_path}"]
    assert generate.main(["--checkpoint_path", uri, *flags]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
