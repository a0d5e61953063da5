"""Secrets of the environment of a job: in no process list, and in nothing that is written."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.ray

NAMES = (
    *("RAY_AUTH_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))  # unix sockets need a short path
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def arguments_of_all() -> bytes:
    """What every process was started with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:  # it has ended
            continue
    return b"\n".join(found)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
def test_secrets_are_in_no_process_list_and_no_file(tmp_path: Path, ray_folder: Path) -> None:
    secrets = {name: f"s3cr3t{number}{'x' * 40}" for number, name in enumerate(NAMES)}
    (tmp_path / "text.txt").write_text("some words of text\n" * 400)
    command = [
        *(sys.executable, "-m", "jobs.preprocess", "--dataset_name", "text"),
        *("--data_files", str(tmp_path / "text.txt"), "--tokenizer_name_or_path", "bytes"),
        *("--max_length", "32", "--output_dir", str(tmp_path / "tokens"), "--verbose"),
    ]
    environment = {**os.environ, **secrets, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(ray_folder)}
    environment |= {
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_USERNAME": "somebody",
    }
    with (tmp_path / "said.log").open("wb") as said:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        seen = b""
        while job.poll() is None:
            now = arguments_of_all()
            seen = max(seen, now, key=len)
            assert [name for name, secret in secrets.items() if secret.encode() in now] == []
            time.sleep(0.2)
    assert job.returncode == 0, (tmp_path / "said.log").read_text()
    assert b"raylet" in seen  # Ray ran, and was looked at
    files = [path for folder in (tmp_path, ray_folder) for path in folder.rglob("*")]
    texts = {path: path.read_bytes() for path in files if path.is_file()}
    assert any("raylet" in path.name for path in texts)
    assert any(path.name == "log.jsonl" for path in texts)
    for name, secret in secrets.items():
        holders = [str(path) for path, text in texts.items() if secret.encode() in text]
        assert holders == [], name
