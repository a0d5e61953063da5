"""Registered models: what is promoted, what an alias points at, and the way back.

A version holds a whole checkpoint and the code to sample from it, so that `mlflow models serve`
needs nothing else; its tags say where it came from and which version it replaced. A draft samples
beside its target, which is in the version too where it is a folder; one of the hub is named.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlparse

import tokendiff
from tokendiff.artifacts.checkpoint import DRAFT_ADAPTERS, find_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity, model_identity
from tokendiff.artifacts.locations import Location, files_under, folders_in, upload
from tokendiff.artifacts.manifest import fetch, fingerprint
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.secrets import without_credentials
from tokendiff.tracking.mlflow_store import check_store, describe, make_client, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

    from tokendiff.config.pipeline import TrackingConfig

SCHEME = "models:/"
TRAINED_ON = "trained_on.json"
_TARGET = "target-model"  # a folder beside the checkpoint, which has a name of its own
_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
# Tags of a version.
_DIGEST, _SERVED, _REPLACED = "checkpoint_digest", "served_with", "replaced_version"
STAGE_KEY = "stage_key"
_HISTORY = "history"
_MOST_NAMED = 10  # models or versions, in a message
_PAGE = 1000  # of them, that a store is asked for at once
_FAILURES = ("INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "TEMPORARILY_UNAVAILABLE")
_MAX_VERSION = 2**31 - 1  # what a store's column holds; it fails at more
_MODEL_FILE = "MLmodel"  # a copy counts once it is there
_MAX_HISTORY = 4500  # characters; a tag's limit is 5,000
# What sampling imports, besides what MLflow brings.
_SERVED_WITH = ("mlflow", "numpy", "pydantic", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A version of a registered model, its files at hand.

    Attributes:
        digest: of the checkpoint's content.
        checkpoint: its folder.
        trained_on: a file with the identities of the text files that it, and what it started from,
            was trained on.
    """

    name: str
    version: int
    digest: str
    checkpoint: Location
    trained_on: Location

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"


def is_model_uri(path: str | None) -> bool:
    return path is not None and path.startswith(SCHEME)


def _matched(uri: str) -> re.Match[str]:
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(f"{uri}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    return match


@dataclass(frozen=True, kw_only=True)
class Version:
    """What a version of a registered model was made from.

    Attributes:
        digest: of its checkpoint's content.
        stage_key: of the promote stage that registered it; empty where none did.
    """

    digest: str
    stage_key: str


class _Asked:
    """MLflow's client; where a store fails in a call it raises a ConnectionError that names it,
    while MLflow raises the same exception for that as for an answer.
    """

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from mlflow.exceptions import MlflowException

        call = getattr(self._client, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except MlflowException as error:
                if error.error_code not in _FAILURES:
                    raise
                raise ConnectionError(
                    f"the MLflow store {without_credentials(self._client.tracking_uri)} failed in "
                    f"{name} ({describe(error)})"
                ) from error

        return asked


class Registry:
    """The registered models of a tracking store.

    Args:
        root: what a relative store is under, and where models of a remote one are kept.

    Raises:
        ConnectionError: from any call, where the store fails in the middle of it: a database that
            is locked, a server that went away.
    """

    def __init__(self, config: "TrackingConfig", root: Location) -> None:
        if not config.enabled:
            raise InputError(
                "tracking.enabled false: registered models are kept by MLflow; leave it on"
            )
        self._uri, self._root = resolve_uri(config, root), root
        check_store(self._uri)
        self._client: MlflowClient = cast("MlflowClient", _Asked(make_client(self._uri)))

    def open(self, uri: str) -> RegisteredModel | None:
        """The model behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`; None if there is none.

        Raises:
            InputError: the URI is of another form.
            CorruptFileError: a file of the checkpoint is damaged, or all of them are gone.
        """
        match = _matched(uri)
        version = self._find(match["name"], alias=match["alias"], number=match["version"])
        return None if version is None else self._opened(version)

    def version_of(self, uri: str) -> int | None:
        """The version that a URI stands for now, without opening its files; None if there is none.

        Raises:
            InputError: the URI is of another form.
        """
        match = _matched(uri)
        version = self._find(match["name"], alias=match["alias"], number=match["version"])
        return None if version is None else int(version.version)

    def missing(self, uri: str) -> str:
        """A sentence that the URI is unknown, with the names, or aliases and versions, that exist.

        Where the store does not say those, it is the sentence alone.
        """
        from mlflow.exceptions import MlflowException

        told = f"there is no {uri} in the MLflow registry"
        with suppress(MlflowException, ConnectionError):
            return f"{told}; {self._what_there_is(_matched(uri)['name'])}"
        return told

    def _what_there_is(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = self._client.search_registered_models(max_results=_PAGE)
            names = [model.name for model in found]
            closest = get_close_matches(name, names, n=_MOST_NAMED, cutoff=0.0)
            more = f" and {len(names) - len(closest)} more" if len(names) > len(closest) else ""
            return f"its models: {', '.join(closest) or 'none'}{more}"
        named = ", ".join(f"@{alias} (v{number})" for alias, number in sorted(aliases.items()))
        there = _versions(self._numbers(name))
        return f"{name} has the versions {there} and the aliases {named or 'none'}"

    def holder(self, name: str, alias: str) -> int | None:
        """The version that an alias points at."""
        version = self._find(name, alias=alias)
        return None if version is None else int(version.version)

    def digest_of(self, name: str, version: int) -> str:
        return str(self._client.get_model_version(name, str(version)).tags.get(_DIGEST, ""))

    def versions(self) -> Iterator[Version]:
        """Every version of every registered model of the store."""
        token = None
        while token != "":
            found = self._client.search_model_versions(max_results=_PAGE, page_token=token)
            for version in found:
                tags = version.tags
                yield Version(digest=tags.get(_DIGEST, ""), stage_key=tags.get(STAGE_KEY, ""))
            token = found.token or ""

    def register(
        self,
        name: str,
        checkpoint: Location,
        *,
        run_id: str,
        sampling: Mapping[str, Any],
        trained_on: Sequence[Any],
        tags: Mapping[str, str],
        target: Path | None = None,
    ) -> int:
        """A version of the model that holds this checkpoint and is served so; the one that does
        already, if any.

        Args:
            run_id: of the MLflow run that the model's files are stored with.
            sampling: fields of a `GenerateConfig` to serve it with.
            target: the folder of what a draft drafts for; None where `sampling` names it.
        """
        digest = checkpoint_identity(checkpoint)
        served = fingerprint([dict(sampling), target and model_identity(target)])
        for version in self._client.search_model_versions(f"name = '{name}'"):
            # Earlier versions of this file did not write down what it is served with.
            is_served_so = version.tags.get(_SERVED, served) == served
            if version.tags.get(_DIGEST) == digest and is_served_so:
                return int(version.version)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            save_model(
                folder, fetch(checkpoint), sampling=sampling, trained_on=trained_on, target=target
            )
            self._client.log_artifacts(run_id, str(folder), "model")
        self._create(name)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/model"
        version = self._client.create_model_version(
            name, source, run_id=run_id, tags={**tags, _DIGEST: digest, _SERVED: served}
        )
        return int(version.version)

    def promote(self, name: str, alias: str, version: int, *, because: str) -> int | None:
        """Point the alias at a version; returns the one that it replaces, and the version itself
        where it has the alias already.

        An earlier call that was cut off may have moved the alias and noted nothing: that is noted
        now.
        """
        before = self.holder(name, alias)
        if before == version:
            if self._is_noted(name, alias, version):
                return before
            tags = self._client.get_model_version(name, str(version)).tags
            before = int(tags[_REPLACED]) if _REPLACED in tags else None
        else:
            if before is not None:
                self._tag(name, version, _REPLACED, str(before))
            self._client.set_registered_model_alias(name, alias, str(version))
        self._note(
            name,
            alias,
            f"v{before} -> v{version}: {because}" if before else f"v{version}: {because}",
        )
        return before

    def roll_back(self, name: str, alias: str) -> tuple[int, int]:
        """Point the alias at the version that its holder replaced; returns both, the new one last.

        Raises:
            InputError: there is no way back.
            CorruptFileError: the files of the version to go back to are damaged or gone.
        """
        (moved,) = self.roll_back_all([(name, alias)])
        return moved

    def roll_back_all(self, aliases: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """As `roll_back`, for each (name, alias); none is moved where one of them cannot be."""
        ways = [self._way_back(name, alias) for name, alias in aliases]
        for (name, alias), (current, before) in zip(aliases, ways, strict=True):
            self._client.set_registered_model_alias(name, alias, str(before))
            self._tag(name, current, "rolled_back", _now())
            self._note(name, alias, f"v{current} -> v{before}: rolled back")
        return ways

    def _way_back(self, name: str, alias: str) -> tuple[int, int]:
        by_hand = (
            "point the alias at another one with MlflowClient().set_registered_model_alias("
            f"{name!r}, {alias!r}, VERSION)"
        )
        current = self.holder(name, alias)
        if current is None:
            if numbers := self._numbers(name):
                raise InputError(
                    f"{SCHEME}{name}@{alias}: no version has this alias, as after its version was "
                    f"deleted; there are {_versions(numbers)}: {by_hand}"
                )
            raise InputError(
                f"{SCHEME}{name}@{alias}: there is no such model; nothing to roll back"
            )
        tags = self._client.get_model_version(name, str(current)).tags
        if _REPLACED not in tags:
            raise InputError(
                f"{SCHEME}{name}@{alias}: v{current} replaced no other version; "
                "there is nothing to go back to"
            )
        before = int(tags[_REPLACED])
        version = self._find(name, number=str(before))
        if version is None:
            raise InputError(
                f"{SCHEME}{name}@{alias}: v{before}, which v{current} replaced, was deleted from "
                f"the registry; there are {_versions(self._numbers(name))}: {by_hand}"
            )
        try:
            self._opened(version)
        except (CorruptFileError, InputError) as error:
            raise CorruptFileError(f"{error}; {SCHEME}{name}@{alias} stays v{current}") from error
        return current, before

    def history(self, name: str, alias: str) -> list[str]:
        """What happened to an alias, the newest first."""
        tags = self._client.get_registered_model(name).tags
        return str(tags.get(f"{alias}.{_HISTORY}", "")).splitlines()

    def _numbers(self, name: str) -> list[int]:
        """Of the versions that there are, oldest first."""
        found = self._client.search_model_versions(f"name = '{name}'")
        return sorted(int(version.version) for version in found)

    def _opened(self, version: "ModelVersion") -> RegisteredModel:
        name, number = version.name, int(version.version)
        # A new store under the same root counts from v1 again: the copy's name says which it is of.
        copy = f"{name}-v{number}-{version.tags.get(_DIGEST, '')[:16]}"
        folder = self._fetched(copy, str(version.source), title=f"{SCHEME}{name}/{number}")
        checkpoint = find_checkpoint(_checkpoint_in(folder))
        return RegisteredModel(
            name=name,
            version=number,
            digest=checkpoint_identity(checkpoint),
            checkpoint=checkpoint,
            trained_on=folder / "artifacts" / TRAINED_ON,
        )

    def _fetched(self, copy: str, source: str, *, title: str) -> Location:
        """The version's files: where they are, or a copy under the root, which workers see.

        Beside a root behind a URI, a folder of this machine is none that they see.

        Raises:
            CorruptFileError: they are not there.
        """
        parsed = urlparse(source)
        is_local = parsed.scheme in ("", "file") and Path(unquote(parsed.path)).is_dir()
        if is_local and isinstance(self._root, Path):
            return Path(unquote(parsed.path))
        remedy = "bring them back, or point the alias at another version and delete this one"
        target = self._root / "models" / copy
        if not (target / _MODEL_FILE).is_file():
            import mlflow
            from mlflow.exceptions import MlflowException

            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.parent if isinstance(target, Path) else None
            with tempfile.TemporaryDirectory(dir=beside) as scratch:
                try:
                    fetched = mlflow.artifacts.download_artifacts(
                        artifact_uri=source, dst_path=scratch, tracking_uri=self._uri
                    )
                except MlflowException as error:
                    raise CorruptFileError(
                        f"{title}: its files cannot be had from {without_credentials(source)} "
                        f"({describe(error)}); {remedy}"
                    ) from error
                if isinstance(target, Path):
                    try:
                        Path(fetched).rename(target)
                    except OSError:
                        if not (target / _MODEL_FILE).is_file():  # else another was first
                            raise
                else:
                    upload(Path(fetched), target, files_under(Path(fetched)).keys() - {_MODEL_FILE})
                    upload(Path(fetched), target, [_MODEL_FILE])
        return target

    def _find(
        self, name: str, *, alias: str | None = None, number: str | None = None
    ) -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        if number is not None and int(number) > _MAX_VERSION:
            return None
        try:
            if alias is not None:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, str(number))
        except MlflowException as error:
            # A missing alias is an invalid parameter to the SQL store.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _create(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _tag(self, name: str, version: int, key: str, value: str) -> None:
        self._client.set_model_version_tag(name, str(version), key, value)

    def _is_noted(self, name: str, alias: str, version: int) -> bool:
        """Whether the newest line tells of it: older ones may be of an earlier time as champion."""
        return any(f" v{version}: " in line for line in self.history(name, alias)[:1])

    def _note(self, name: str, alias: str, text: str) -> None:
        newest = f"{_now()} {without_credentials(text)}"[: _MAX_HISTORY // 3]
        lines = [newest, *self.history(name, alias)]
        while len("\n".join(lines)) > _MAX_HISTORY:
            lines.pop()
        self._client.set_registered_model_tag(name, f"{alias}.{_HISTORY}", "\n".join(lines))


def save_model(
    folder: Path,
    checkpoint: Path,
    *,
    sampling: Mapping[str, Any],
    trained_on: Sequence[Any],
    target: Path | None = None,
) -> None:
    """Write a pyfunc that samples from the checkpoint into a new folder.

    Args:
        target: of a draft, a folder that goes with it.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / TRAINED_ON
        files.write_text(json.dumps(list(trained_on)))
        artifacts = {"checkpoint": str(checkpoint), "trained_on": str(files)}
        if target is not None:  # renamed, for it is often called final as its draft is
            artifacts["target"] = str(shutil.copytree(target, Path(scratch) / _TARGET))
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts=artifacts,
            model_config=dict(sampling),
            signature=model_signature(),
            input_example={"prompt": ["Once upon a time"]},
            pip_requirements=_requirements(
                *(["peft"] if (checkpoint / DRAFT_ADAPTERS).is_file() else [])
            ),
            code_paths=[str(Path(tokendiff.__file__).parent)],
        )


def model_signature() -> "ModelSignature":
    """The inputs and outputs of a registered model."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    return ModelSignature(
        # Of what comes in a column of strings MLflow makes strings, also of numbers and null: they
        # would be sampled from as their digits and "None". `served_model` sees what was sent.
        # Messages come in this column too: beside an optional one MLflow drops {"inputs": ["a"]}.
        inputs=Schema([ColSpec(AnyType(), "prompt")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "text"),
                ColSpec(DataType.string, "completion"),
                ColSpec(DataType.long, "num_model_calls"),
            ]
        ),
        params=ParamSchema([ParamSpec("seed", DataType.long, 0)]),
    )


def _checkpoint_in(folder: Location) -> Location:
    """The checkpoint among a model's files: the one folder there, by whatever name it was saved,
    but for a draft's target.
    """
    found = [path for path in folders_in(folder / "artifacts") if path.name != _TARGET]
    if len(found) != 1:
        raise InputError(f"{folder} holds no checkpoint; it was not registered by a pipeline")
    return found[0]


def _requirements(*others: str) -> list[str]:
    """The versions that are installed here of what serving needs, and of `others`, without a local
    build's mark (torch's +cpu).
    """
    names = (*_SERVED_WITH, *others)
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]


def _versions(numbers: Sequence[int]) -> str:
    """The newest of them."""
    shown = ", ".join(f"v{number}" for number in numbers[-_MOST_NAMED:]) or "none"
    older = len(numbers) - _MOST_NAMED
    return f"{shown} and {older} older" if older > 0 else shown


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M:%S")
