"""Batch generation over files of prompts: killed and restarted, with rows of no use, to a URI: it
always makes the files of the run that was left alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.locations import Location, RemotePath, files_under
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import read_samples
from tokendiff.errors import InputError
from tokendiff.tracking.run_log import RunLog, read_events
from tokendiff.training.run import train_in_process

pytestmark = pytest.mark.ray

LENGTH = 12
NUM_SAMPLES = 2
BATCH_SIZE = 2
NUM_STEPS = 10
ONE = ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1)
TWO = ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1, num_actors=2, min_actors=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    data = token_folder(
        folder / "data", files=[random_rows(8, LENGTH)], max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )  # fmt: skip
    config = TrainConfig(model_name_or_path="builtin:bert-tiny", max_train_steps=1)
    return train_in_process(config, TokenData.open(data, split="train"), folder / "out")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """90 prompts in two files, 4 of them of no use: too long, cut off, not text, no prompt."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = ["abc"[: 1 + number % 3] for number in range(45)]
    texts[7] = "abcdefghijkla"
    lines = [json.dumps({"prompt": text}).encode() for text in texts]
    lines[30] = b'{"prompt": "ab'
    lines[40] = b'{"prompt": null}'
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    words = [b"de"] * 45
    words[44] = b"d\xff"
    (folder / "b.txt").write_bytes(b"\n".join(words))
    return [str(folder / "*")]


BAD_IDS = [7, 30, 40, 89]  # of the prompts


def config_of(prompts: list[str], **changes: Any) -> GenerateConfig:
    return GenerateConfig.model_validate(
        {
            "prompts": prompts,
            "num_samples": NUM_SAMPLES,
            "batch_size": BATCH_SIZE,
            "sampler": {"num_inference_steps": NUM_STEPS},
            **changes,
        }
    )


def contents(folder: Location) -> dict[str, bytes]:
    """What the job has made: part files and errors/. Notes in run/ go while an actor still ends."""
    kept = [n for n in files_under(folder) if "part-" in n and not n.startswith("run/")]
    return {name: (folder / name).read_bytes() for name in kept}


@pytest.fixture(scope="module")
def uninterrupted(
    ray_session: None,
    checkpoint: Path,
    prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    from tokendiff.cluster.generate import generate

    folder = tmp_path_factory.mktemp("uninterrupted")
    with RunLog(folder / "run" / "log.jsonl") as log:
        generate(
            config_of(prompts), ONE, checkpoint_path=str(checkpoint), output_dir=folder,
            on_event=log.write,
        )  # fmt: skip
    return folder


def test_every_row_is_in_the_samples_or_among_the_errors(
    ray_session: None, uninterrupted: Path
) -> None:
    records = read_samples(uninterrupted)
    good = [number for number in range(90) if number not in BAD_IDS]
    assert [r["id"] for r in records] == [2 * n + sample for n in good for sample in range(2)]
    assert all("seconds" not in record for record in records)
    errors = [
        json.loads(line)
        for path in sorted((uninterrupted / "errors").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [(e["id"], e["num_samples"]) for e in errors] == [(2 * n, 2) for n in BAD_IDS]
    places = [Path(e["place"]).name for e in errors]
    assert places == ["a.jsonl:8", "a.jsonl:31", "a.jsonl:41", "b.txt:45"]
    wanted = ["has 13 tokens; it must fit seq_len 12", "not a JSON line", "needs a field", "UTF-8"]
    assert all(text in e["reason"] for text, e in zip(wanted, errors, strict=True))
    assert errors[0]["prompt"] == "abcdefghijkla"
    metadata = load_manifest(uninterrupted).metadata
    assert (metadata["rows"], metadata["errors"]) == (172, 4)
    progress = [
        e for e in read_events(uninterrupted / "run" / "log.jsonl") if e["event"] == "progress"
    ]
    assert (progress[-1]["done"], progress[-1]["total"], progress[-1]["errors"]) == (180, 180, 4)


@pytest.mark.deep
def test_killed_twice_it_ends_with_the_files_of_the_run_that_was_not(
    ray_session: None, checkpoint: Path, prompts: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """The driver of a job, a process of its own, gets SIGKILL in the middle, two times."""
    import ray

    out = tmp_path / "samples"
    command = [
        *[sys.executable, "-m", "jobs.generate", f"--checkpoint_path={checkpoint}"],
        *[f"--prompts={prompts[0]}", f"--num_samples={NUM_SAMPLES}", f"--batch_size={BATCH_SIZE}"],
        *[f"--num_inference_steps={NUM_STEPS}", f"--output_dir={out}", "--cpus_per_worker=0.5"],
        *["--threads_per_worker=1", "--enabled=false", "--json"],
    ]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def parts() -> set[str]:
        return {path.name for path in out.glob("part-*")}

    expected = contents(uninterrupted)
    num_parts = sum(not name.startswith("errors/") for name in expected)
    for kill_after in (num_parts // 6, num_parts // 2):
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while len(parts()) < kill_after:
            assert job.poll() is None, "the job ended before it was killed"
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not (out / "MANIFEST.json").exists()
        assert len(parts()) < num_parts
    before = {name: (out / name).stat().st_mtime_ns for name in parts()}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stderr == ""  # nothing of Ray's that means nothing to a user
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 172
    assert contents(out) == expected
    assert read_samples(out) == read_samples(uninterrupted)
    # An actor of the killed job may have ended its part after `before` was taken, never again.
    again = [name for name, changed in before.items() if (out / name).stat().st_mtime_ns != changed]
    assert len(again) <= 1


def test_too_many_errors_stop_it_and_to_a_uri_it_writes_the_same(
    ray_session: None,
    s3: str,
    checkpoint: Path,
    prompts: list[str],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    """Two actors where one made the others; prompts, checkpoint and output all behind URIs."""
    from tokendiff.artifacts.manifest import publish
    from tokendiff.cluster.generate import generate

    root = RemotePath(s3) / "generation"
    publish(checkpoint, root / "final")
    for path in Path(prompts[0]).parent.iterdir():
        (root / "prompts" / path.name).write_bytes(path.read_bytes())
    out = root / "samples"

    def run(max_errors: int, cluster: ClusterConfig = TWO) -> list[tuple[str, dict[str, Any]]]:
        events: list[tuple[str, dict[str, Any]]] = []
        generate(
            config_of([f"{root}/prompts/*"], max_errors=max_errors),
            cluster,
            checkpoint_path=f"{root}/final",
            output_dir=out,
            on_event=lambda event, **fields: events.append((event, fields)),
        )
        return events

    with pytest.raises(InputError, match=r"prompts cannot be used, more than max_errors 1; the "):
        run(1, ONE)
    made = contents(out)
    assert made
    assert "MANIFEST.json" not in files_under(out)
    events = run(4)
    assert dict(events)["progress"]["done"] == 180
    local = contents(uninterrupted)
    remote = contents(out)
    assert remote.keys() == local.keys()
    # Errors name the file that the prompt stands in, which is another one here.
    parts = [name for name in local if not name.startswith("errors/")]
    assert {name: remote[name] for name in parts} == {name: local[name] for name in parts}
    assert read_samples(out) == read_samples(uninterrupted)
    assert run(4) == []  # it is finished


def test_no_prompt_of_use_is_a_failure(
    in_this_process: None, checkpoint: Path, tmp_path: Path
) -> None:
    from tokendiff.cluster.generate import generate

    (tmp_path / "prompts.jsonl").write_text("[]\n{}\n")
    with pytest.raises(InputError, match=r"none of the prompts can be used; the first: .*:1: "):
        generate(
            config_of([str(tmp_path / "prompts.jsonl")]),
            ONE,
            checkpoint_path=str(checkpoint),
            output_dir=tmp_path / "out",
            on_event=lambda event, **fields: None,
        )


def test_passes_are_counted_of_parts_that_an_earlier_run_made_too(
    in_this_process: None, checkpoint: Path, tmp_path: Path
) -> None:
    from tokendiff.cluster.generate import generate

    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    config = config_of([str(tmp_path / "prompts.txt")], sampler={"num_inference_steps": 2})
    out, seen = tmp_path / "out", list[str]()

    def run(stop_after: int | None = None) -> dict[str, Any]:
        def on_event(event: str, **fields: Any) -> None:
            seen.append(event)
            if seen.count("part") == stop_after:
                raise KeyboardInterrupt

        generate(config, ONE, checkpoint_path=str(checkpoint), output_dir=out, on_event=on_event)
        return load_manifest(out).metadata

    with pytest.raises(KeyboardInterrupt):
        run(stop_after=2)
    assert not (out / "MANIFEST.json").exists()
    metadata = run()
    records = read_samples(out)
    passes = sum(record["num_model_calls"] for record in records)
    new_tokens = sum(len(record["tokens"]) - record["num_prompt_tokens"] for record in records)
    assert metadata["num_model_calls"] == passes == 2 * len(records)
    assert metadata["tokens_per_forward"] == new_tokens / passes
    assert metadata["tokens_per_second"] > 0


def test_parts_cover_all_rows_and_their_files_sort_as_they_do() -> None:
    from tokendiff.cluster.generate import _Parts

    for num_rows in (1, BATCH_SIZE, 513, 64 * 256 * BATCH_SIZE + 1, 13_000_000):
        parts = _Parts(num_rows, config_of(["prompts.txt"]))
        edges = [parts.rows(part) for part in (0, len(parts) // 2, len(parts) - 1)]
        assert edges[0][0] == 0
        assert edges[-1][1] == num_rows
        assert all(first % BATCH_SIZE == 0 and stop > first for first, stop in edges)
        assert parts.rows(len(parts) - 1)[0] == (len(parts) - 1) * parts.num_rows(0)
        ends = [files(len(parts) - 1) for files in (parts.file, parts.errors_file)]
        starts = [files(number) for files in (parts.file, parts.errors_file) for number in (0, 9)]
        assert len({len(name) for name in (ends[0], *starts[:2])}) == 1
        assert len({len(name) for name in (ends[1], *starts[2:])}) == 1
