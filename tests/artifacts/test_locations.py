"""Results behind URIs: the same as local ones, committed by their manifest, sound or not."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.paths import model_path, output_path
from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts import locations
from tokendiff.artifacts.checkpoint import (
    committed_checkpoints,
    newest_sound_checkpoint,
    open_checkpoint,
    remove_old_checkpoints,
)
from tokendiff.artifacts.locations import RemotePath, files_under, is_uri, location
from tokendiff.artifacts.manifest import (
    built_for,
    claim_folder,
    commit,
    fetch,
    is_committed,
    publish,
    verify,
)
from tokendiff.artifacts.model_folders import local_model
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.files import find_files
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import read_samples, write_part
from tokendiff.data.sources import plan_partitions, read_documents
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.opening import load_denoiser
from tokendiff.training.identity import finished_run
from tokendiff.training.run import TrainingRun, step_plan
from tokendiff.training.saving import CheckpointSaver, Contents
from tokendiff.training.world import World


@pytest.fixture(params=["s3", "memory"])
def remote(request: pytest.FixtureRequest) -> RemotePath:
    """An empty folder in an S3 server's bucket, and in a file system of fsspec's."""
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://bucket"
    return RemotePath(f"{root}/{request.node.name.partition('[')[0]}")


def folder_of(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    commit(path, kind="toy")
    return path


def test_a_result_counts_once_its_manifest_is_there_and_is_replaced_as_a_whole(
    remote: RemotePath, tmp_path: Path
) -> None:
    result = remote / "result"
    first = folder_of(tmp_path / "first", {"a.txt": "one", "deep/er/b.txt": "two"})
    assert not result.exists()
    assert not is_committed(result)
    (result / "run" / "log.jsonl").write_bytes(b"kept")
    (result / "left-over.txt").write_bytes(b"by an attempt that was cut off")
    publish(first, result)
    assert verify(result, kind="toy").files == verify(first).files
    copy = fetch(result)
    assert copy.name == "result"
    assert files_under(copy) == files_under(first)
    publish(folder_of(tmp_path / "second", {"a.txt": "six"}), result)
    assert sorted(files_under(result)) == ["MANIFEST.json", "a.txt", "run/log.jsonl"]
    assert (fetch(result) / "a.txt").read_text() == "six"
    assert (copy / "a.txt").read_text() == "one"


def test_while_a_result_is_replaced_no_manifest_vouches_for_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, copy = RemotePath(f"memory://{tmp_path.name}/result"), locations.upload_file
    publish(folder_of(tmp_path / "first", {"a.txt": "one", "b.txt": "two"}), result)
    seen = []

    def look(source: Path, target: RemotePath) -> None:
        seen.append((target.name, sorted(files_under(result))))
        copy(source, target)

    monkeypatch.setattr(locations, "upload_file", look)
    publish(folder_of(tmp_path / "second", {"a.txt": "six"}), result)
    assert seen == [("a.txt", ["a.txt", "b.txt"]), ("MANIFEST.json", ["a.txt"])]


def test_what_was_not_built_to_its_end_is_not_published(tmp_path: Path) -> None:
    result = RemotePath(f"memory://{tmp_path.name}/result")

    def build() -> None:
        with built_for(result) as folder:
            folder_of(folder, {"a.txt": "one"})
            raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        build()
    assert not result.exists()


def test_a_part_of_a_result_does_not_count_as_all_of_it(tmp_path: Path) -> None:
    result = RemotePath(f"memory://{tmp_path.name}/result")
    publish(folder_of(tmp_path / "toy", {"a.txt": "one", "deep/b.txt": "two"}), result)
    part = fetch(result, under="deep/")
    assert sorted(files_under(part)) == ["deep/b.txt"]
    assert verify(fetch(result)) == verify(result)
    assert not is_committed(part)


def test_whether_a_folder_is_there_is_asked_of_its_first_files(
    remote: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = RemotePath._below
    listed: list[Any] = []

    def count(path: RemotePath, *, recursive: bool) -> Any:
        listed.extend(found := list(below(path, recursive=recursive)))
        return iter(found)

    (remote / "MANIFEST.json").write_bytes(b"{}")
    for number in range(8):
        (remote / "deep" / "er" / f"part-{number}").write_bytes(b"")
    monkeypatch.setattr(RemotePath, "_below", count)
    assert (remote / "deep").is_dir()
    assert remote.exists()
    assert not (remote / "MANIFEST.json").is_dir()
    assert not (remote / "dee").exists()
    assert len(listed) == 11  # er, its parts; MANIFEST.json, deep
    for name in files_under(remote):
        (remote / name).unlink()
    assert not remote.is_dir()  # whatever folders the store has been left with


def test_a_damaged_file_is_found_when_it_is_fetched(remote: RemotePath, tmp_path: Path) -> None:
    publish(folder_of(tmp_path / "toy", {"a.txt": "one", "b.txt": "two"}), remote)
    (remote / "b.txt").write_bytes(b"tow")
    verify(remote, hashes=False)
    with pytest.raises(CorruptFileError, match=r"b\.txt does not match its MANIFEST \(sha256"):
        verify(remote)
    with pytest.raises(CorruptFileError, match=r"b\.txt does not match its MANIFEST \(sha256"):
        fetch(remote)
    (remote / "b.txt").unlink()
    with pytest.raises(CorruptFileError, match=r"b\.txt is missing"):
        verify(remote, hashes=False)


def test_a_model_is_a_folder_that_was_committed_or_a_part_of_one(
    remote: RemotePath, tmp_path: Path
) -> None:
    publish(folder_of(tmp_path / "shards", {"a.txt": "one", "tokenizer/b.txt": "two"}), remote)
    assert (Path(local_model(f"{remote}/tokenizer")) / "b.txt").read_text() == "two"
    assert (Path(local_model(str(remote))) / "a.txt").read_text() == "one"
    bucket = remote.uri.removesuffix(f"/{remote.name}")
    for name in (f"{remote}/tokeniser", f"{remote}/token", f"{remote}/tokenizer/deep", bucket):
        with pytest.raises(InputError, match=f"^{name}: holds no checkpoint or tokenizer"):
            local_model(name)


def test_a_folder_with_other_files_is_refused(remote: RemotePath) -> None:
    (remote / "notes.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\)"):
        claim_folder(remote, kind="samples")
    mark = claim_folder(remote / "empty", kind="samples")
    (remote / "empty" / "part").write_bytes(b"")
    assert claim_folder(remote / "empty", kind="samples") == mark


def test_checkpoints_are_passed_over_and_removed_as_local_ones_are(remote: RemotePath) -> None:
    def save(step: int) -> None:
        contents = Contents(
            tensors={}, files={"weights": f"weights of step {step}"}, metadata={"step": step}
        )
        saver = CheckpointSaver(remote, World.current())
        saver.save(f"checkpoint-{step}", lambda: contents)
        saver.wait()

    for step in (5, 10, 15, 20):
        save(step)
    assert [path.name for path in committed_checkpoints(remote)] == [
        f"checkpoint-{step}" for step in (5, 10, 15, 20)
    ]
    (remote / "checkpoint-20" / "MANIFEST.json").unlink()
    (remote / "checkpoint-15" / "weights").write_bytes(b"weights of step 51")
    warnings: list[str] = []
    newest = newest_sound_checkpoint(remote, warn=warnings.append)
    assert newest == remote / "checkpoint-10"
    assert "using the previous checkpoint" in warnings[0]
    remove_old_checkpoints(remote, newest=10, keep=1)
    assert [path.name for path in committed_checkpoints(remote)] == ["checkpoint-10"]
    assert (open_checkpoint(str(remote)) / "weights").read_text() == "weights of step 10"
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(f"{remote}/nothing-here")


def test_shards_that_would_fill_the_disk_are_read_in_place(
    remote: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = token_folder(
        tmp_path / "data",
        files=[random_rows(20, 12)],
        max_length=12,
        tokenizer=letter_tokenizer(),
        row_group_rows=8,
    )
    publish(local, remote)
    monkeypatch.setenv("TOKENDIFF_CACHE", str(tmp_path / "cache"))
    expected = TokenData.open(local, split="train").read_group(2).tokens
    for fits, num_copies in ((False, 0), (True, 1)):
        monkeypatch.setattr("tokendiff.artifacts.locations._CACHED_PART_OF_DISK", float(fits))
        data = TokenData.open(str(remote), split="train")
        assert np.array_equal(data.read_group(2).tokens, expected)
        assert len(list((tmp_path / "cache").rglob("*.parquet"))) == num_copies


def test_files_are_found_at_any_depth_and_behind_links(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("123")
    (tmp_path / "d").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a/b/c")
    (tmp_path / "folder").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not-there")
    assert files_under(tmp_path) == {"a/b/c": 3, "d": 0, "link": 3}
    assert files_under(tmp_path / "not-there") == {}


def train(
    data: TokenData, output_dir: Path | RemotePath, *, stop_at: int | None = None
) -> tuple[dict[int, float], bool]:
    """Losses of a run from its newest checkpoint on, and whether it reached its end."""
    from tokendiff.data.rows import step_batches

    config = TrainConfig.model_validate(
        {
            "model_name_or_path": "builtin:bert-tiny",
            "max_train_steps": 8,
            "checkpointing_steps": 3,
            "logging_steps": 1,
            "ema_decay": 0.9,
        }
    )
    losses: dict[int, float] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses[fields["step"]] = fields["loss"]

    world = World.current("cpu")
    run = TrainingRun.build(config, data, output_dir, world=world, on_event=keep)
    checkpoint = newest_sound_checkpoint(output_dir, warn=pytest.fail)
    if checkpoint is not None:
        run.resume(checkpoint)
    plan = step_plan(config, data, rank=0, world_size=1)
    batches = step_batches(data, plan, run.trainer.step, config.max_train_steps)
    is_finished = run.fit(batches, should_stop=lambda: run.trainer.step + 1 == stop_at)
    assert (finished_run(output_dir, config, data) is not None) == is_finished
    return losses, is_finished


@pytest.mark.slow
def test_training_from_and_to_a_uri_is_training_on_this_machine(
    remote: RemotePath, tmp_path: Path
) -> None:
    """Stopped at a step between two checkpoints, and resumed where no local file is left."""
    local = token_folder(
        tmp_path / "data",
        files=[random_rows(20, 12), random_rows(20, 12, seed=1)],
        max_length=12,
        tokenizer=letter_tokenizer(),
    )
    expected, _ = train(TokenData.open(local, split="train"), tmp_path / "local")
    publish(local, remote / "data")
    data = TokenData.open(f"{remote}/data", split="train")
    assert data.fingerprint == TokenData.open(local, split="train").fingerprint
    first, is_finished = train(data, remote / "out", stop_at=5)
    assert sorted(first) == [1, 2, 3, 4, 5]
    assert not is_finished
    shutil.rmtree(tmp_path / "data")
    second, is_finished = train(TokenData.open(f"{remote}/data", split="train"), remote / "out")
    assert is_finished
    assert sorted(second) == [6, 7, 8]
    assert {**first, **second} == expected
    tokenizer, _ = build_tokenizer(f"{remote}/data/tokenizer", documents=(), vocab_size=0)
    assert tokenizer.get_vocab() == letter_tokenizer().get_vocab()
    from_uri, from_folder = (
        load_denoiser(f"{out}/final", tokenizer=tokenizer, max_length=12, dropout=0.0).state_dict()
        for out in (remote / "out", tmp_path / "local")
    )
    assert all(value.equal(from_uri[name]) for name, value in from_folder.items())
    there, here = open_checkpoint(f"{remote}/out/final"), tmp_path / "local" / "final"
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()


def test_text_is_read_in_place(remote: RemotePath, tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [f"line {number} of a text" for number in range(200)]
    (remote / "in" / "b" / "one.txt").write_bytes("\n".join(lines[:100]).encode())
    (remote / "in" / "b" / "two.txt.gz").write_bytes(gzip.compress("\n".join(lines[100:]).encode()))
    (remote / "in" / "other.jsonl").write_bytes(b'{"text": "json"}\n')
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": lines}), sink, row_group_size=30)
    (remote / "in" / "rows.parquet").write_bytes(sink.getvalue().to_pybytes())

    def documents(name: str, pattern: str) -> list[Any]:
        config = PreprocessConfig.model_validate(
            {"dataset_name": name, "data_files": [pattern], "partition_bytes": 500}
        )
        partitions = plan_partitions(config)
        assert len(partitions) > 1 or name == "jsonl"
        return [text for part in partitions for text in read_documents(part)]

    assert documents("text", f"{remote}/in/*/*.txt*") == lines
    assert documents("text", f"{remote}/in/**/*.txt*") == lines
    assert documents("parquet", f"{remote}/in/rows.parquet") == lines
    assert documents("jsonl", f"{remote}/in/*.jsonl") == ["json"]
    with pytest.raises(InputError, match="matches no file"):
        find_files([f"{remote}/in/*.csv"])
    with pytest.raises(InputError, match="matches no file; a folder needs"):
        find_files([f"{remote}/in"])


def test_samples_are_read_from_where_they_are(remote: RemotePath) -> None:
    records: list[dict[str, Any]] = [
        {
            "id": row, "prompt": "a\u2028b", "num_prompt_tokens": 1, "gaps": [], "tokens": [4, 5],
            "text": "ab", "completion": "b", "finish_reason": "length", "num_model_calls": 1,
            "tokens_per_forward": 1.0, "blocks_by_gain": [0, 1], "source": "prompts.txt",
        }
        for row in range(3)
    ]  # fmt: skip
    for suffix in ("jsonl", "parquet"):
        folder = remote / suffix
        write_part(folder / f"part-00000.{suffix}", records[:2])
        write_part(folder / f"part-00001.{suffix}", records[2:])
        commit(folder, kind="samples")
        assert read_samples(folder) == records


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("s3://bucket/a/", RemotePath("s3://bucket/a")),
        ("S3://bucket/A", RemotePath("s3://bucket/A")),
        ("gs://bucket", RemotePath("gs://bucket")),
        ("file:///tmp/a", Path("/tmp/a")),
        ("C:/a", Path("C:/a")),
        ("models:/name@alias", Path("models:/name@alias")),
        ("a/b", Path("a/b")),
    ],
)
def test_location_of(text: str, wanted: Path | RemotePath) -> None:
    assert location(text) == wanted
    assert is_uri(text) == (isinstance(wanted, RemotePath) or text.startswith("file://"))


def test_what_is_above_a_bucket_is_the_bucket() -> None:
    path = RemotePath("s3://bucket/a/b")
    assert path.parent == RemotePath("s3://bucket/a")
    assert path.parent.parent == path.parent.parent.parent == RemotePath("s3://bucket")


@pytest.mark.parametrize("of", [location, local_model, output_path, model_path])
def test_a_home_folder_that_nobody_has_is_bad_input(of: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match=r"~no-such-user/a@b: .* no home folder ~no-such-user;"):
        of("~no-such-user/a@b")


@pytest.mark.parametrize("uri", ["s3://", "S3:///a", "gs:///a/b"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"names no bucket; write (s3|S3|gs)://BUCKET/PATH"):
        location(uri)


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/a", "s3://bucket/a?access_key=secret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InputError, match="no options and no credentials") as raised:
        location(uri)
    assert "secret" not in str(raised.value)


def test_an_unknown_scheme_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"nonsense://a: cannot be opened"):
        RemotePath("nonsense://a/b").exists()


def test_a_remote_path_is_never_taken_for_a_local_one() -> None:
    with pytest.raises(TypeError):
        Path(RemotePath("s3://bucket/a"))  # type: ignore[arg-type]


def test_a_file_that_goes_while_a_folder_is_listed_is_not_there(tmp_path: Path) -> None:
    """As a temporary file of the log's mirror, which another thread renames."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stays").write_text("abc")
    over, found = threading.Event(), []

    def rename() -> None:
        while not over.is_set():
            (tmp_path / "run" / ".state.tmp").write_text("ab")
            (tmp_path / "run" / ".state.tmp").replace(tmp_path / "run" / "state")

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        for _ in range(2000):
            found.append(files_under(tmp_path))
    finally:
        over.set()
        thread.join()
    assert all(sizes["run/stays"] == 3 for sizes in found)
    commit(tmp_path, kind="any")
