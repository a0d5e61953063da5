"""Pushing to a hub, against a stand-in for its client."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokendiff.artifacts.checkpoint import KIND
from tokendiff.artifacts.manifest import commit
from tokendiff.config.train import TrainConfig
from tokendiff.errors import InputError
from tokendiff.tracking import hub
from tokendiff.tracking.hub import check_push, push, read_note


class FakeApi:
    """Keeps repositories as the hub does: files by name, and whether they are private."""

    def __init__(self, *, fails: bool = False) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.num_commits = 0
        self.fails = fails

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.is_private.setdefault(repo_id, private)
        self.repositories.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        if self.fails:
            raise OSError("https://user:hunter2@hub.example is not there\nTraceback ...")
        folder = Path(folder_path)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")}
        self.repositories[repo_id] |= files
        self.num_commits += 1
        assert "Weights of step" in commit_message
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/{self.num_commits}")


@pytest.fixture
def final(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# A model\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    commit(folder, kind=KIND, metadata={"step": 7})
    return folder


def test_final_is_pushed_once_and_privately(final: Path) -> None:
    api, note, events = FakeApi(), final.parent / "run" / "hub.json", []
    note.parent.mkdir()

    def on_event(event: str, **fields: Any) -> None:
        events.append((event, fields))

    url = push(final, "me/model", note, on_event=on_event, api=api)
    assert url == "https://hub.example/me/model/1"
    assert api.is_private == {"me/model": True}
    assert set(api.repositories["me/model"]) == {"README.md", "model.safetensors", "MANIFEST.json"}
    assert [event for event, _ in events] == ["doing"]

    assert push(final, "me/model", note, on_event=on_event, api=api) == url  # resumed
    assert api.num_commits == 1
    assert push(final, "me/other", note, on_event=on_event, api=api) != url
    (final / "model.safetensors").write_bytes(b"trained for longer")
    commit(final, kind=KIND, metadata={"step": 7})
    push(final, "me/other", note, on_event=on_event, api=api)
    assert api.num_commits == 3
    assert api.repositories["me/other"]["model.safetensors"] == b"trained for longer"


def test_a_push_that_fails_is_said_and_tried_again(final: Path) -> None:
    api, note, warnings = FakeApi(fails=True), final.parent / "hub.json", []

    def on_event(event: str, **fields: Any) -> None:
        warnings.extend([fields["message"]] if event == "warning" else [])

    assert push(final, "me/model", note, on_event=on_event, api=api) is None
    assert read_note(note) is None
    (message,) = warnings
    assert "hunter2" not in message
    assert "Traceback" not in message
    assert f"hf upload me/model {final} . --private" in message
    api.fails = False
    assert push(final, "me/model", note, on_event=on_event, api=api) is not None


def test_the_token_comes_from_the_environment_alone(
    final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(hub.TOKEN_VARIABLE, raising=False)
    check_push(None)
    for name in ("me/model@v1", "a/b/c"):
        with pytest.raises(InputError, match=f"push_to_hub {name}: Repo id must .* Give ORG/NAME"):
            check_push(name)
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        check_push("me/model")
    monkeypatch.setenv(hub.TOKEN_VARIABLE, "hunter2")
    check_push("me/model")
    seen: list[str] = []

    def api(*, token: str) -> FakeApi:
        seen.append(token)
        return FakeApi()

    monkeypatch.setattr("huggingface_hub.HfApi", api)
    note = final.parent / "hub.json"
    push(final, "me/model", note, on_event=lambda *args, **kwargs: None)
    assert seen == ["hunter2"]
    assert "hunter2" not in json.dumps(read_note(note))


def test_a_finished_run_that_is_pushed_without_a_token_says_so(
    final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(hub.TOKEN_VARIABLE, raising=False)
    warnings: list[str] = []

    def on_event(event: str, **fields: Any) -> None:
        warnings.extend([fields["message"]] if event == "warning" else [])

    assert push(final, "me/model", final.parent / "hub.json", on_event=on_event) is None
    (message,) = warnings
    assert "HF_TOKEN is not set in the environment" in message


def test_where_to_push_decides_no_result() -> None:
    pushed = TrainConfig(push_to_hub="me/model")
    assert pushed.result_fields() == TrainConfig().result_fields()
