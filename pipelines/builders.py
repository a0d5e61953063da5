"""The stages of each kind, made from a config: which fields decide the result, what does the work,
and what the finished stage reports.

`keyed`, where a builder takes it, is the config without the paths of inputs, whose keys are in the
stage's key already.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.paths import model_path, output_path
from pipelines.stage import Stage
from tokendiff.artifacts.checkpoint import BEST_STEP, FINAL, STOPPED_EARLY, find_checkpoint
from tokendiff.artifacts.identity import identity_of
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import (
    MANIFEST_NAME,
    RECORD_FOLDER,
    check_claim,
    is_committed,
    load_manifest,
)
from tokendiff.config.pipeline import Config
from tokendiff.config.preprocess import FILE_FORMATS, SAMPLES
from tokendiff.data.bad_rows import ERRORS
from tokendiff.data.prompt_index import prompt_paths
from tokendiff.data.sources import holds_chats
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.tracking.run_log import LOG_NAME, RunLog, metrics_by_step
from tokendiff.verification.certificate import CERTIFICATE

_NEW_DRAFT_VERSION = 2  # 1: drafts that began as Qwen3 does


def preprocess_stage(
    config: Config, folder: str | Location, *, keyed: Config | None = None, **kwargs: Any
) -> Stage:
    keyed = keyed or config
    tokenizer = config.tokenizer_name_or_path

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.preprocess import preprocess

        preprocess(
            config.preprocess,
            tokenizer_name_or_path=tokenizer,
            output_dir=stage.output,
            fill_answers=config.fill_answers,
            on_event=log.write,
        )

    def check(stage: Stage) -> None:
        from tokendiff.data.preprocess import check_chats
        from tokendiff.data.rows import KIND
        from tokendiff.data.tokenizers import check_tokenizer

        if not stage.is_keyed:  # a pipeline empties the folders of its stages
            check_claim(stage.output, kind=KIND)
        if stage.has_inputs and not stage.is_done:  # a tokenizer may be one of them
            check_tokenizer(tokenizer)
            check_chats(config.preprocess, tokenizer)

    def result(stage: Stage) -> dict[str, Any]:
        metadata = load_manifest(stage.output).metadata
        counts = {
            f"{split}_{name}": figures[name]
            for split, figures in metadata["splits"].items()
            for name in ("documents", "rows", "tokens")
        }
        dropped = {f"dropped_{name}": count for name, count in metadata["dropped"].items()}
        result = {**counts, **dropped, "padded_fraction": metadata["padded_fraction"]}
        if num_errors := metadata.get("errors", 0):  # a folder of an earlier version has no count
            result["errors_dir"] = str(stage.output / ERRORS)
        if chats := metadata.get("chats"):
            names = ("dataset_format", "num_too_long", "num_cut", "example", "left_out")
            result |= {name: chats[name] for name in names if name in chats}
        elif "dataset_format" in metadata:  # of rows that fit a chat format too
            result["dataset_format"] = metadata["dataset_format"]
        return {**result, "errors": num_errors}

    def preview(stage: Stage) -> dict[str, str]:
        from tokendiff.data.preprocess import first_conversation

        if stage.is_done:
            chats = load_manifest(stage.output).metadata.get("chats") or {}
            return {name: chats[name] for name in ("dataset_format", "example") if name in chats}
        try:
            return first_conversation(config.preprocess, tokenizer) if stage.has_inputs else {}
        except InputError as error:
            return {"example": f"none can be shown: {error}"}

    settings = {
        **keyed.preprocess.result_fields(),
        "tokenizer_name_or_path": keyed.tokenizer_name_or_path,
        "inputs": identity_of(*_data_files(keyed), *_folder_names(keyed)),
        **_of_chats(keyed),
    }
    return _stage(
        "preprocess", settings, folder, action, result, check=check, preview=preview, **kwargs
    )


def _of_chats(config: Config) -> dict[str, Any]:
    """What else decides the shards of conversations: nothing where rows are text, so that the keys
    of text are what they always were.
    """
    if not holds_chats(config.preprocess):
        return {}
    template = config.preprocess.chat_template
    return {"fill_answers": config.fill_answers, "chat_template": identity_of(template)}


def target_states_stage(
    config: Config,
    folder: str | Location,
    *,
    data_path: str | Location,
    planned_length: int | None = None,
    keyed: Config | None = None,
    **kwargs: Any,
) -> Stage:
    """A stage that reads all training rows with the target of a draft.

    Args:
        planned_length: tokens of a row, where an earlier stage is to make the rows.
    """
    section, keyed_section = config.train, (keyed or config).train

    def check(stage: Stage) -> None:
        from tokendiff.training.inputs import check_training

        if all(source.is_done for role, source in stage.inputs.items() if role != "data"):
            check_training(
                section,
                data_path=data_path,
                output_dir=None,
                num_workers=1,
                planned_length=planned_length,
            )

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.target_states import cache_target_states

        cache_target_states(
            section,
            config.cluster,
            data_path=data_path,
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        manifest = load_manifest(stage.output)
        return {
            "rows": manifest.metadata["rows"],
            "tokens": manifest.metadata["tokens"],
            "layers": manifest.metadata["of"]["layers"],
            "bytes": sum(file["size"] for file in manifest.files.values()),
            "output_dir": str(stage.output),
        }

    def preview(stage: Stage) -> dict[str, str]:
        if stage.is_done:
            return {"on disk": _in_bytes(result(stage)["bytes"])}
        try:
            return {"on disk": _planned_bytes(config, stage, location(data_path))}
        except (InputError, CorruptFileError):
            return {}  # which the stage's check says, or a model is still to be made

    objective = keyed_section.objective
    assert objective.name == "dflash", "agreement_problems says so"
    settings = {
        **{
            name: getattr(keyed_section, name)
            for name in ("target_model_id", "draft_model_id", "mixed_precision")
        },
        **{
            name: getattr(objective, name)
            for name in ("draft_num_layers", "use_target_hidden_states")
        },
        "inputs": identity_of(keyed_section.target_model_id, keyed_section.draft_model_id),
    }
    kwargs = {"reads": {"training": location(data_path)}, **kwargs}
    kind = "cache_target_states"
    return _stage(kind, settings, folder, action, result, check=check, preview=preview, **kwargs)


def _planned_bytes(config: Config, stage: Stage, data_path: Location) -> str:
    """What hidden states will take, of as many tokens as are known."""
    from tokendiff.cluster.session import wants_gpu
    from tokendiff.models.dflash.target_states import width_of_states

    target = config.train.target_model_id
    if (source := stage.inputs.get("target")) is not None and not source.is_done:
        target = source.settings["model_name_or_path"]
    if target is None:
        return "not known without a target"
    number = 2 if wants_gpu(config.cluster) else 4  # bytes, as the target is held there
    width = width_of_states(config.train, target=target)
    of_a_token = f"{width:,} numbers of {number} bytes for each training token"
    if not is_committed(data_path):
        size = _in_bytes(10**6 * width * number)
        return f"{size} for each million training tokens ({of_a_token})"
    tokens = load_manifest(data_path).metadata["splits"]["train"]["tokens"]
    return f"{_in_bytes(tokens * width * number)} ({of_a_token})"


def _in_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def train_stage(
    config: Config,
    folder: str | Location,
    *,
    data_path: str | Location,
    planned_length: int | None = None,
    keyed: Config | None = None,
    **kwargs: Any,
) -> Stage:
    """A stage that trains.

    Args:
        planned_length: tokens of a row, where an earlier stage is to make the rows.
    """
    keyed = keyed or config

    def check(stage: Stage) -> None:
        from tokendiff.tracking.hub import check_push
        from tokendiff.training.inputs import check_training

        if _is_left_to_train(stage, config):
            check_push(config.train.push_to_hub)
        if all(source.is_done for role, source in stage.inputs.items() if role != "data"):
            check_training(
                config.train,
                data_path=data_path,
                # What a pipeline is about to make again is not held against the result before.
                output_dir=None if stage.is_keyed else stage.output,
                num_workers=config.cluster.max_workers,
                planned_length=planned_length,
            )

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.train import train
        from tokendiff.tracking.hub import NOTE_NAME, push

        final = train(
            config.train,
            config.cluster,
            data_path=data_path,
            output_dir=stage.output,
            on_event=log.write,
        )
        if (repo_id := config.train.push_to_hub) is not None:
            push(final, repo_id, stage.kept_record / NOTE_NAME, on_event=log.write)

    def result(stage: Stage) -> dict[str, Any]:
        from tokendiff.tracking.hub import NOTE_NAME, read_note

        log = _metrics_in(stage.kept_record / LOG_NAME)
        metadata = load_manifest(stage.result_folder).metadata
        note = read_note(stage.kept_record / NOTE_NAME) if config.train.push_to_hub else None
        return {
            "step": metadata["step"],
            # Of a run that watches itself: the step that the weights are of, and why there is no
            # later one.
            **{name: metadata[name] for name in (BEST_STEP, STOPPED_EARLY) if name in metadata},
            "loss": log[-1]["loss"] if log else None,
            "tokens_per_second": _median([event["tokens_per_second"] for event in log]),
            "checkpoint": str(stage.result_folder),
            **({"pushed_to": note["url"]} if note else {}),
        }

    def preview(stage: Stage) -> dict[str, str]:
        if stage.is_done:
            return {}
        try:
            return _memory_of_a_worker(config, location(data_path), planned_length)
        except (InputError, CorruptFileError):
            return {}  # which the stage's check says

    settings = {
        **keyed.train.result_fields(),
        "inputs": identity_of(
            keyed.train.model_name_or_path,
            keyed.train.target_model_id,
            keyed.train.draft_model_id,
        ),
    }
    kwargs = {"reads": {"training": location(data_path)}, "result_subfolder": FINAL, **kwargs}
    if config.train.objective.name == "dflash" and config.train.draft_model_id is None:
        kwargs["version"] = _NEW_DRAFT_VERSION
    return _stage("train", settings, folder, action, result, check=check, preview=preview, **kwargs)


def _is_left_to_train(stage: Stage, config: Config) -> bool:
    """Whether a training stage takes steps: a finished run may be made longer."""
    from tokendiff.training.identity import has_all_steps

    try:
        return not (stage.is_done and has_all_steps(stage.result_folder, config.train))
    except CorruptFileError:
        return True


def _memory_of_a_worker(
    config: Config, data_path: Location, planned_length: int | None
) -> dict[str, str]:
    """Nothing where it cannot be told yet: of a tokenizer that is still to be trained, and of nodes
    whose workers are not known.
    """
    import torch

    from tokendiff.cluster.session import wants_gpu
    from tokendiff.data.rows import TokenData
    from tokendiff.data.tokenizers import build_tokenizer, open_tokenizer
    from tokendiff.training.memory import plan_memory

    num_workers, sharding = config.cluster.min_workers, config.train.sharding
    if is_committed(data_path):
        data = TokenData.open(data_path, split="train")
        tokenizer, max_length = (
            open_tokenizer(data.tokenizer_path, field="data_path"),
            data.max_length,
        )
    elif planned_length is not None and config.tokenizer_name_or_path != "bpe":
        tokenizer, _ = build_tokenizer(config.tokenizer_name_or_path, documents=(), vocab_size=0)
        max_length = planned_length
    else:
        return {}
    if sharding == "hybrid":
        return {}
    plan = plan_memory(
        config.train,
        tokenizer,
        max_length=max_length,
        num_workers=num_workers,
        replica_size=None if sharding == "none" or num_workers == 1 else num_workers,
        device=torch.device("cuda" if wants_gpu(config.cluster) else "cpu"),
    )
    return {"memory of a worker": plan.describe()}


def generate_stage(
    config: Config,
    folder: str | Location,
    *,
    checkpoint_path: str | None,
    keyed: Config | None = None,
    kind: str = "generate",
    **kwargs: Any,
) -> Stage:
    section, keyed_section = config.generate, (keyed or config).generate
    assert section is not None
    assert keyed_section is not None
    models = ("model_id", "target_model_id", "draft_model_id")
    found = {name: model_path(value) for name in models if (value := getattr(section, name))}
    section = section.model_copy(update=found)

    def check(stage: Stage) -> None:
        from tokendiff.data.samples import KIND
        from tokendiff.models.requests import check_generation

        if not stage.is_keyed:  # a pipeline empties the folders of its stages
            check_claim(stage.output, kind=KIND)
        if stage.has_inputs:
            check_generation(section, checkpoint_path=checkpoint_path)

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.generate import generate

        generate(
            section,
            config.cluster,
            checkpoint_path=checkpoint_path,
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        metadata = load_manifest(stage.output).metadata
        names = (
            "rows",
            "errors",
            "seq_len",
            "num_model_calls",
            "tokens_per_forward",
            "tokens_per_second",
        )
        figures = {name: metadata.get(name) for name in names}
        if metadata.get("set_aside"):
            figures["set_aside"] = metadata["set_aside"]
        speculation = metadata.get("speculation", {})
        return {**figures, **speculation, "output_dir": str(stage.output)}

    paths = prompt_paths(keyed_section.prompts)
    inputs = identity_of(*paths, *(getattr(keyed_section, name) for name in models))
    settings = {**keyed_section.result_fields(), "inputs": inputs}
    return _stage(kind, settings, folder, action, result, check=check, **kwargs)


def evaluate_stage(
    config: Config,
    folder: str | Location,
    *,
    checkpoint_path: str,
    data_path: str | Location | None,
    samples_path: str | Location | None,
    keyed: Config | None = None,
    trained_on: Location | None = None,
    **kwargs: Any,
) -> Stage:
    """
    Args:
        trained_on: the checkpoint's own data, where that is known: what is evaluated on without a
            data_path.
    """
    section, keyed_section = config.evaluate, (keyed or config).evaluate
    assert section is not None
    assert keyed_section is not None

    def check(stage: Stage) -> None:
        from tokendiff.evaluation.inputs import KIND, EvaluationInputs
        from tokendiff.evaluation.reference import check_reference

        if not stage.is_keyed:  # a pipeline empties the folders of its stages
            check_claim(stage.output, kind=KIND)
        if section.tasks:
            from tokendiff.evaluation.tasks.suite import check_tasks

            check_tasks(section)
        if stage.has_inputs:
            EvaluationInputs.open(
                section,
                checkpoint_path=checkpoint_path,
                data_path=data_path,
                samples_path=samples_path,
                hashes=False,
            )
        elif section.reference_model_name_or_path is not None:
            check_reference(section.reference_model_name_or_path)

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.evaluate import evaluate
        from tokendiff.config.loader import to_yaml
        from tokendiff.secrets import without_credentials

        evaluate(
            section,
            config.cluster,
            title=config.name,
            checkpoint_path=checkpoint_path,
            data_path=data_path,
            samples_path=samples_path,
            training_log=_training_log(checkpoint_path),
            config_yaml=without_credentials(to_yaml(config)),
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        metrics = load_manifest(stage.output).metadata["metrics"]
        files = {"report": stage.output / "report" / "index.html"}
        if (certificate := stage.output / CERTIFICATE).is_file():
            files["certificate"] = certificate
        return {**metrics, **{name: str(path) for name, path in files.items()}}

    settings = {
        **keyed_section.result_fields(),
        "inputs": identity_of(keyed_section.reference_model_name_or_path, keyed_section.tasks_path),
        # What the harness's own tasks ask comes with it.
        **({"lm_eval": _version_of("lm_eval")} if keyed_section.tasks else {}),
    }
    given = {"evaluation": data_path, "samples": samples_path}
    reads = {context: location(path) for context, path in given.items() if path is not None}
    judged = reads.get("evaluation", trained_on)
    kwargs = {
        "reads": reads,
        "check": check,
        "judges": None if judged is None else (judged, section.split),
        **kwargs,
    }
    return _stage("evaluate", settings, folder, action, result, **kwargs)


def frontier_stage(
    config: Config,
    folder: str | Location,
    *,
    checkpoint_path: str,
    keyed: Config | None = None,
    **kwargs: Any,
) -> Stage:
    section, keyed_section = config.frontier, (keyed or config).frontier
    assert section is not None
    assert keyed_section is not None

    def check(stage: Stage) -> None:
        from tokendiff.evaluation.reference import check_reference
        from tokendiff.evaluation.tasks.quality import quality_of
        from tokendiff.evaluation.tasks.suite import check_tasks
        from tokendiff.models.requests import check_generation

        if section.tasks:
            check_tasks(section)
            quality_of(section)
        if not stage.has_inputs:
            return
        if section.reference_model_name_or_path is not None:
            check_reference(section.reference_model_name_or_path)
        for point in section.points:
            check_generation(section.sampling(point), checkpoint_path=checkpoint_path)

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.frontier import run_frontier
        from tokendiff.config.loader import to_yaml
        from tokendiff.secrets import without_credentials

        run_frontier(
            section,
            config.cluster,
            title=f"{config.name}: {stage.name}",
            checkpoint_path=checkpoint_path,
            config_yaml=without_credentials(to_yaml(config)),
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        found = load_manifest(stage.output).metadata
        return {
            **found["chosen"]["figures"],
            "operating_point": found["chosen"]["sampler"],
            "num_points": len(found["points"]),
            "num_on_front": len(found["front"]),
            "report": str(stage.output / "report" / "index.html"),
            "plot": str(stage.output / "frontier.png"),
        }

    settings = {
        **keyed_section.result_fields(),
        "samplers": [point.result_fields() for point in keyed_section.points],
        "inputs": identity_of(
            *prompt_paths(keyed_section.prompts),
            keyed_section.reference_model_name_or_path,
            keyed_section.tasks_path,
        ),
        **({"lm_eval": _version_of("lm_eval")} if keyed_section.tasks else {}),
    }
    return _stage("frontier", settings, folder, action, result, check=check, **kwargs)


def promote_stage(
    config: Config, folder: str | Location, *, keyed: Config | None = None, **kwargs: Any
) -> Stage:
    def action(stage: Stage, log: RunLog) -> None:
        from pipelines.promotion import promote

        promote(config.promote, config, stage.base.parent, stage, log)

    def result(stage: Stage) -> dict[str, Any]:
        return load_manifest(stage.output).metadata

    def lost(stage: Stage) -> str:
        from pipelines.promotion import lost_version

        return lost_version(config.promote, config, stage.base.parent, stage)

    sampling = (keyed or config).generate
    kwargs = {"needs_ray": False, "lost": lost, **kwargs}
    settings = {
        **(keyed or config).promote.result_fields(),
        "gate": [line.result_fields() for line in config.promote.gate],
        "sampling": None if sampling is None else sampling.result_fields(),
    }
    return _stage("promote", settings, folder, action, result, **kwargs)


def in_own_folder(
    stage: Stage, checkpoint_path: str | None, *others: str | Location | None
) -> Stage:
    """The stage in a folder below its own that its key names, so that commands that leave
    output_dir out do not meet in one; the same command finds its folder again.

    Args:
        others: paths of what it reads besides the checkpoint and what its settings hold.
    """
    checkpoint = checkpoint_path and str(find_checkpoint(checkpoint_path, hashes=False))
    names = [None if path is None else str(path) for path in (checkpoint, *others)]
    return replace(
        stage,
        is_keyed=True,
        settings={**stage.settings, "paths": names, "made_from": identity_of(*names)},
    )


def _stage(
    kind: str,
    settings: dict[str, Any],
    folder: str | Location,
    action: Callable[[Stage, RunLog], None],
    result: Callable[[Stage], dict[str, Any]],
    **kwargs: Any,
) -> Stage:
    base = output_path(str(folder))
    kwargs = {"name": kind, **kwargs}
    return Stage(kind=kind, settings=settings, base=base, action=action, result=result, **kwargs)


def _training_log(checkpoint_path: str) -> list[dict[str, Any]]:
    """The metrics of the run that made a checkpoint, then those of its held-out rows; none where
    there is no log beside it.
    """
    path = find_checkpoint(checkpoint_path, hashes=False).parent / RECORD_FOLDER / LOG_NAME
    return [*_metrics_in(path), *_metrics_in(path, event="heldout")]


def _metrics_in(path: Location, *, event: str = "metrics") -> list[dict[str, Any]]:
    if isinstance(path, Path):
        return metrics_by_step(path, event=event)
    with tempfile.NamedTemporaryFile() as copy:
        Path(copy.name).write_bytes(path.read_bytes() if path.is_file() else b"")
        return metrics_by_step(Path(copy.name), event=event)


def _version_of(package: str) -> str | None:
    """None of a package that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _data_files(config: Config) -> list[str]:
    section = config.preprocess
    if not section.data_files:
        return []
    if section.dataset_name == SAMPLES:
        from tokendiff.data.samples import find_sample_folders

        # Its manifest holds the hash of every part, and the folder a log that goes on.
        return [str(folder / MANIFEST_NAME) for folder in find_sample_folders(section.data_files)]
    from tokendiff.data.files import find_files

    return find_files(section.data_files)


def _folder_names(config: Config) -> list[str]:
    """Tokenizer and dataset where they may be folders: `bpe` and `text` are no folders, even if one
    of that name is in the working directory.
    """
    tokenizer, dataset = config.tokenizer_name_or_path, config.preprocess.dataset_name
    tokenizers = [tokenizer] if tokenizer not in ("bytes", "bpe") else []
    datasets = [dataset] if dataset not in ("builtin", SAMPLES, *FILE_FORMATS) else []
    return tokenizers + datasets


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
