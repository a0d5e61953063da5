"""Jobs whose input and output are behind URIs, with nothing left on this machine in between."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.in_this_process import jobs_here
from tokendiff.artifacts.locations import RemotePath, cache_folder, files_under
from tokendiff.artifacts.manifest import verify
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.evaluation.paired import read_rows
from tokendiff.tracking.run_log import metrics_by_step
from tokendiff.training.run import train_in_process

pytestmark = pytest.mark.ray


def job(main: Any, capsys: pytest.CaptureFixture[str], **flags: Any) -> dict[str, Any]:
    """The result of a job, which must succeed; afterwards the machine's copies are deleted."""
    words = [f"--{name}={value}" for name, value in {**flags, "enabled": "false"}.items()]
    assert main([*words, "--json"]) == 0
    shutil.rmtree(cache_folder(), ignore_errors=True)
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_from_text_to_a_report(
    ray_session: None, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import evaluate, preprocess, train

    root = RemotePath(s3) / "jobs"
    text = "\n".join(f"line {number} of what there is to read" for number in range(300))
    (root / "in" / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt").write_text(text)
    data = {"dataset_name": "text", "tokenizer_name_or_path": "bytes", "max_length": 32}
    training = {"model_name_or_path": "builtin:bert-tiny", "max_train_steps": 4, "logging_steps": 1}
    cluster = {"cpus_per_worker": 0.5, "threads_per_worker": 1}
    there = {"data_files": f"{root}/in/*.txt", "output_dir": f"{root}/out"}
    flags = {**data, **training, **cluster, **there}
    result = job(train.main, capsys, **flags)
    assert result["checkpoint"] == f"{root}/out/final"
    # What one process makes of the same text on this machine.
    here = {"data_files": f"{tmp_path}/*.txt", "output_dir": tmp_path / "data"}
    with jobs_here():
        job(preprocess.main, capsys, **data, **here)
    local = TokenData.open(tmp_path / "data", split="train")
    assert TokenData.open(f"{root}/out/data", split="train").fingerprint == local.fingerprint
    losses: list[float] = []

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses.append(fields["loss"])

    config = TrainConfig.model_validate(training)
    train_in_process(config, local, tmp_path / "out", on_event=keep)
    assert result["loss"] == losses[-1]
    # The log was written by a worker, kept by the driver, and put beside the result.
    log = tmp_path / "log.jsonl"
    log.write_bytes((root / "out" / "run" / "log.jsonl").read_bytes())
    assert [event["step"] for event in metrics_by_step(log)] == [1, 2, 3, 4]
    assert not any(".ray-train" in name for name in files_under(root / "out"))
    again = job(train.main, capsys, **flags)
    assert again == result

    evaluation = {"checkpoint_path": f"{root}/out", "output_dir": f"{root}/evaluation"}
    with jobs_here():
        judged = job(evaluate.main, capsys, **cluster, **evaluation, max_eval_rows=4)
    assert judged["report"] == f"{root}/evaluation/report/index.html"
    verify(root / "evaluation")
    by_row = read_rows(root / "evaluation", "nats_per_token")
    assert by_row is not None
    assert len(by_row["row_id"]) == 4
    nats_per_token = by_row["nats"].sum() / by_row["num_tokens"].sum()
    assert judged["nats_per_token"] == pytest.approx(nats_per_token)
    assert b"<html" in (root / "evaluation" / "report" / "index.html").read_bytes()
    assert b"svg" in (root / "evaluation" / "report" / "index.html").read_bytes()
