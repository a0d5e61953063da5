"""The commits of hub models that a run is trained from: those that it began with, though a branch
has moved by the time that it goes on. Adapters, and drafts, would do otherwise for another model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import FINAL, committed_checkpoints
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import COMMITS, is_committed, load_manifest
from tokendiff.artifacts.model_folders import hub_commits
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.pretrained import commits_of
from tokendiff.training.building import starting_point

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig


def models_of(config: "TrainConfig") -> dict[str, str]:
    """The models that a run opens, by the field that names them."""
    if config.target_model_id is None:
        return dict([starting_point(config)])
    draft = {} if config.draft_model_id is None else {"draft_model_id": config.draft_model_id}
    return {"target_model_id": config.target_model_id, **draft}


def commits_opened(config: "TrainConfig") -> dict[str, str]:
    """By field, of the hub models among them that were opened on this machine."""
    return commits_of(models_of(config))


@contextmanager
def commits_of_run(config: "TrainConfig", output_dir: Location) -> Iterator[None]:
    """In this block the models of a run are opened at the commits that its checkpoints in
    `output_dir` record, and a target whose states were computed before at that of the states; all
    others as they are on the hub now.

    Raises:
        InputError: the states are of another commit than the run began with.
    """
    final = output_dir / FINAL
    folders = [*committed_checkpoints(output_dir), *([final] if is_committed(final) else [])]
    found = (_recorded(config, folder) for folder in reversed(folders))
    of_run, of_states = next(filter(None, found), {}), _of_states(config)
    for name in of_run.keys() & of_states.keys():
        if of_run[name] != of_states[name]:
            raise InputError(
                f"target_states_path {config.target_states_path} holds hidden states of {name} at "
                f"commit {of_states[name]}, and the run in {output_dir} began with "
                f"{of_run[name]}; leave it out, or choose another output_dir"
            )
    with hub_commits({**of_states, **of_run}):
        yield


@contextmanager
def commits_as_opened(config: "TrainConfig") -> Iterator[None]:
    """In this block its models stay those that were opened last on this machine."""
    models = models_of(config)
    with hub_commits({models[field]: sha for field, sha in commits_opened(config).items()}):
        yield


def _of_states(config: "TrainConfig") -> dict[str, str]:
    """By name, of the target, if its states are of that name."""
    if config.target_states_path is None:
        return {}
    metadata, target = _metadata_of(location(config.target_states_path)), config.target_model_id
    is_same = metadata.get("of", {}).get("target") == target
    commit = metadata.get(COMMITS, {}).get("target_model_id") if is_same else None
    return {} if target is None or commit is None else {target: commit}


def _recorded(config: "TrainConfig", checkpoint: Location) -> dict[str, str]:
    """By name, of the models that are named as they were when the checkpoint was made."""
    metadata = _metadata_of(checkpoint)
    there, commits = metadata.get("run", {}), metadata.get(COMMITS, {})
    return {
        name: commits[field]
        for field, name in models_of(config).items()
        if field in commits and there.get(field) == name
    }


def _metadata_of(folder: Location) -> dict[str, Any]:
    """Of a manifest; empty where there is none that can be read, which is said where it is used."""
    try:
        return load_manifest(folder).metadata
    except (CorruptFileError, FileNotFoundError):
        return {}
