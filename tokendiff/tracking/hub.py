"""A committed checkpoint on the Hugging Face hub.

Pushing comes after the run is safe in its folder: what fails here is said and loses nothing. What
was pushed is noted, so that the same weights are not sent to the same place again.
"""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import fetch, fingerprint, load_manifest, write_atomically
from tokendiff.errors import InputError
from tokendiff.secrets import without_credentials

NOTE_NAME = "hub.json"
TOKEN_VARIABLE = "HF_TOKEN"


def check_push(repo_id: str | None) -> None:
    """Raise InputError where a push could not work: by the name, or as the environment stands."""
    if repo_id is None:
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"push_to_hub {repo_id}: {error} Give ORG/NAME, no revision") from error
    if not os.environ.get(TOKEN_VARIABLE):
        raise InputError(
            f"push_to_hub {repo_id}: {TOKEN_VARIABLE} is not set in the environment; set it to a "
            "token that may write there, or leave push_to_hub out"
        )


def push(
    final: Location,
    repo_id: str,
    note: Location,
    *,
    on_event: Callable[..., None],
    api: Any = None,
) -> str | None:
    """Upload a committed checkpoint; returns the address of the commit, None where that failed.

    A repository that is made here is private; one that exists is left as it is.

    Args:
        note: where it is noted what was pushed; a second call with the same files does nothing.
        api: stands in for `huggingface_hub.HfApi`.
    """
    digest = fingerprint(load_manifest(final).files)
    if (before := read_note(note)) and (before["repo_id"], before["digest"]) == (repo_id, digest):
        return str(before["url"])
    on_event("doing", what=f"pushing {final} to {repo_id}")
    try:
        folder = fetch(final)
        url = _upload(folder, repo_id, api)
        text = json.dumps({"repo_id": repo_id, "digest": digest, "url": url}, indent=1)
        write_atomically(note, text.encode())
    except Exception as error:  # whatever a network, a server or its client may raise
        reason = without_credentials(str(error).split("\n")[0] or type(error).__name__)
        command = f"hf upload {repo_id} {shlex.quote(str(final))} . --private"
        on_event(
            "warning",
            message=f"not pushed to {repo_id} ({reason}); the run is safe in {final}; to push it "
            f"later: {command}",
        )
        return None
    return url


def read_note(note: Location) -> dict[str, Any] | None:
    """What was pushed last; None where nothing was."""
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"repo_id", "digest", "url"} <= set(found) else None


def _upload(folder: Path, repo_id: str, api: Any) -> str:
    if api is None:
        from huggingface_hub import HfApi

        check_push(repo_id)  # of a run that was finished before, nothing is asked first
        api = HfApi(token=os.environ[TOKEN_VARIABLE])
    api.create_repo(repo_id, private=True, exist_ok=True)
    step = load_manifest(folder).metadata["step"]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message=f"Weights of step {step}, written by tokendiff",
    )
    return str(commit.commit_url)
