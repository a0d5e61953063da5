"""What can be told of a model by its name, without opening it: which folder that is, and what the
files in it say.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tokendiff.artifacts.locations import Location, is_uri, local_path, location
from tokendiff.artifacts.manifest import RECORD_FOLDER, fetch, is_committed, load_manifest
from tokendiff.errors import InputError

CONFIG_NAME = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
DRAFT_ARCHITECTURE, SECOND_DRAFT_ARCHITECTURE = "DFlashDraftModel", "DFlash2DraftModel"
DRAFT_ARCHITECTURES = frozenset({DRAFT_ARCHITECTURE, SECOND_DRAFT_ARCHITECTURE})
# Their positions start behind the padding id, which is 1 where the config does not say.
_OFFSET_TYPES = ("roberta", "xlm-roberta", "camembert")
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_held: ContextVar[Mapping[str, str]] = ContextVar("_held", default={})  # noqa: B039 (read only)


def local_model(name: str) -> str:
    """A model or tokenizer as transformers takes it: the absolute path of a folder, a copy of what
    a URI names, or else the name on the hub, which `revision_of` belongs to.

    Raises:
        InputError: nothing was committed there; or a folder is named with a revision.
    """
    if not is_uri(name):
        path = local_path(name)
        return str(path.absolute()) if path.is_dir() else hub_name(name)[0]
    folder = location(name)
    if isinstance(folder, Path):
        return str(folder)
    if is_committed(folder):
        return str(fetch(folder))
    if _is_listed(folder):  # the tokenizer/ of token shards
        return str(fetch(folder.parent, under=f"{folder.name}/") / folder.name)
    raise InputError(
        f"{name}: holds no checkpoint or tokenizer that tokendiff wrote (no MANIFEST.json); a "
        "model of another origin cannot be read from a URI: copy it to a folder that every node "
        "sees"
    )


def revision_of(name: str) -> dict[str, Any]:
    """`revision` for a function of transformers that gets `local_model(name)`: what stands behind
    the @ of a hub name, a commit, tag or branch as in `bert-base-uncased@v1`, or the commit that
    `hub_commits` holds it at. Empty where the name has neither, and for folders and URIs.
    """
    revision = _held.get().get(name) or split_revision(name)[1]
    is_on_hub = revision is not None and not is_uri(name) and not local_path(name).is_dir()
    return {"revision": revision} if revision is not None and is_on_hub else {}


def hub_name(name: str) -> tuple[str, str | None]:
    """`split_revision` of what is no folder.

    Raises:
        InputError: the repository's name is also that of a folder here. Libraries open such a
            folder, whatever the revision.
    """
    repository, revision = split_revision(name)
    if revision is not None and local_path(repository).exists():
        raise InputError(
            f"{name}: there is no such folder, and {repository}, which is here, has no revisions; "
            f"correct the name, leave @{revision} out, or start where no {repository} lies in the "
            "way of the hub's"
        )
    return repository, revision


@contextmanager
def hub_commits(commits: Mapping[str, str]) -> Iterator[None]:
    """In this block these hub names stand for these commits, wherever their branches and tags are
    by now: work that goes on later, or in several processes, is to be on the same weights.
    """
    token = _held.set({**_held.get(), **commits})
    try:
        yield
    finally:
        _held.reset(token)


def held_commits() -> Mapping[str, str]:
    """What `hub_commits` holds here, to be held in another process too."""
    return _held.get()


def split_revision(name: str) -> tuple[str, str | None]:
    """The parts of a hub name: the repository, and what stands behind the @, where it has one."""
    repository, at, revision = name.partition("@")
    return (repository, revision) if at and repository and revision else (name, None)


def _is_listed(folder: Location) -> bool:
    """Whether the result that a folder is in has files there."""
    if not is_committed(folder.parent):
        return False
    files = load_manifest(folder.parent).files
    return any(name.startswith(f"{folder.name}/") for name in files)


def check_there(name: str) -> None:
    """Raise FileNotFoundError where a name can only be that of a folder, and there is none: a name
    of the hub has one slash at most before its revision, and no dot or slash in front.
    """
    is_path = name.startswith(("/", "./", "../", "~")) or split_revision(name)[0].count("/") > 1
    if is_path and not is_uri(name) and not local_path(name).exists():
        raise FileNotFoundError(f"there is no folder {local_path(name).absolute()}")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give a folder that save_pretrained wrote"
        ) from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must hold a JSON object, got {fields!r:.80}")
    return fields


def longest_row(fields: Mapping[str, Any]) -> int | None:
    """The most tokens that a model takes, by the fields of its config; None where they do not say.

    The fields are those of the config.json, or of a transformers config's `to_dict()`.
    """
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    longest = next((fields[name] for name in names if name in fields), None)
    if not isinstance(longest, int):
        return None
    if fields.get("model_type") not in _OFFSET_TYPES:
        return longest
    padding = fields.get("pad_token_id")
    return longest - (1 if padding is None else padding) - 1


def is_draft_folder(folder: str | Path) -> bool:
    """Whether a local folder holds a DFlash draft of either layout, by its config.json."""
    if not (Path(folder) / CONFIG_NAME).is_file():
        return False
    return not DRAFT_ARCHITECTURES.isdisjoint(read_config(Path(folder)).get("architectures") or [])


def is_foreign(folder: Path) -> bool:
    """Whether others made this checkpoint, and there is no manifest to verify it by: the published
    scripts, a model beside a scheduler_config.json that names no objective; or it is a causal
    language model as transformers saves one.
    """
    path = folder / SCHEDULER_CONFIG
    if is_committed(folder) or not (folder / CONFIG_NAME).is_file():
        return False
    return '"objective"' not in path.read_text() if path.is_file() else is_plain_causal(folder)


def is_plain_causal(folder: Path) -> bool:
    """Whether a local folder holds a causal language model, by its config.json, that says nothing
    of a noise process, and was not committed by a training run.
    """
    if is_committed(folder) or (folder / SCHEDULER_CONFIG).is_file():
        return False
    if not (folder / CONFIG_NAME).is_file() or lacks_weights(folder):
        return False
    # One of ours that lost its manifest, or never had one: what its run wrote lies there too.
    if any(folder.glob("optimizer*.safetensors")) or (folder.parent / RECORD_FOLDER).is_dir():
        return False
    names = read_config(folder).get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def lacks_weights(folder: Path) -> bool:
    """Whether there is a folder, but none of the files in it that weights are kept in."""
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES)
