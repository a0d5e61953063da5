"""What can go wrong with a training run and is known before a worker starts or a weight is read:
all that the config, the model's config, the tokenizer, and what is in the folders tell.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import FINAL, committed_checkpoints
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import is_committed
from tokendiff.data.rows import TokenData, check_rows_to_judge, step_plan
from tokendiff.data.target_states import TargetStates
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import CorruptFileError
from tokendiff.models.builtin import check_builtin, is_builtin
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.dflash.planning import check_pair, check_rows, plan_draft
from tokendiff.models.dflash.target_states import states_wanted
from tokendiff.models.families import family_of, published_type
from tokendiff.models.layers import find_layers
from tokendiff.models.plans import open_trainable_config, plan_model
from tokendiff.models.pretrained import check_length, check_weights
from tokendiff.models.vocabulary import check_vocabulary
from tokendiff.training.building import (
    check_kept_base,
    check_published_run,
    make_objective,
    model_without_weights,
    starting_point,
    takes_canvas,
    wanted_prediction,
)
from tokendiff.training.commits import commits_of_run
from tokendiff.training.identity import check_same_run

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig


def check_training(
    config: "TrainConfig",
    *,
    data_path: str | Location,
    output_dir: Location | None,
    num_workers: int,
    planned_length: int | None = None,
) -> None:
    """Check a run before anything of it starts.

    Args:
        output_dir: what is there must be of the same run; None where it is to be made again.
        planned_length: tokens of the rows that an earlier stage is to make at data_path; None where
            they must be there.

    Raises:
        InputError: it cannot be done.
        CorruptFileError: a shard is missing or cut short.
    """
    if planned_length is not None and not is_committed(location(data_path)):
        check_model(config, max_length=planned_length)
        return
    data = TokenData.open(data_path, split="train")
    step_plan(config, data, rank=0, world_size=num_workers)
    if output_dir is None:
        check_inputs(config, data)
        return
    with commits_of_run(config, output_dir):
        check_inputs(config, data)
    final = output_dir / FINAL
    for folder in [*committed_checkpoints(output_dir), *([final] if is_committed(final) else [])]:
        with suppress(CorruptFileError):  # a damaged one is passed over, in its time
            check_same_run(folder, config, data)


def check_inputs(config: "TrainConfig", data: TokenData) -> None:
    """Check model and objective against the rows and their tokenizer.

    Raises:
        InputError: they do not go together.
    """
    if config.eval_steps is not None:
        check_rows_to_judge(data.folder, "heldout")
    tokenizer = open_tokenizer(data.tokenizer_path, field="data_path")
    if config.objective.name == "dflash":
        draft = plan_draft(config, tokenizer=tokenizer, max_length=data.max_length)
        check_rows(data, draft.target, tokenizer, target_model_id=draft.target_model_id)
        check_weights(draft.target_model_id, field="target_model_id")
        if draft.draft_model_id is not None:
            check_weights(draft.draft_model_id, field="draft_model_id")
        if config.target_states_path is not None:
            TargetStates.open(config.target_states_path, states_wanted(config, draft, data))
        return
    field, name = starting_point(config)
    plan = plan_model(
        name,
        tokenizer=tokenizer,
        max_length=data.max_length,
        is_causal=config.objective.is_causal,
        from_scratch=config.from_scratch,
        isolates_documents=data.isolates_documents,
        predict=wanted_prediction(config),
        field=field,
        takes_canvas=takes_canvas(config),
    )
    check_published_run(config, plan.config)
    if not config.from_scratch:
        check_vocabulary(name, tokenizer, field=field)
    check_kept_base(config, tokenizer)
    family = family_of(published_type(plan.config))
    make_objective(config, tokenizer, data, predict=plan.predict, family=family)
    _check_modules(config, tokenizer, max_length=data.max_length)


def filling_notes(config: "TrainConfig", data: TokenData) -> list[str]:
    """What to say of answers that were filled up, or were not, for another objective's sake: who
    preprocesses by itself may not know for which one it is. What a config asked for is meant so.
    """
    from tokendiff.config.preprocess import FILLED_FOR

    chats, name = data.metadata.get("chats"), config.objective.name
    asked_for = data.metadata.get("config", {}).get("fill_answers")
    if chats is None or asked_for is not None:
        return []
    is_filled, wants_filling = bool(chats.get("fills_answers")), name in FILLED_FOR
    if is_filled == wants_filling:
        return []
    what = "are filled up with EOS, which is learnt too" if is_filled else "are not filled up"
    wish = "does without" if is_filled else "learns from that where an answer ends in a longer slot"
    return [
        f"the answers in {data.folder} {what}; {name} {wish}. To change it, preprocess with "
        f"fill_answers {str(wants_filling).lower()}"
    ]


def check_model(config: "TrainConfig", *, max_length: int) -> None:
    """Check the model where its rows, and so their tokenizer, are still to be made.

    Raises:
        InputError: there is none, or it goes neither with the objective nor with such rows.
    """
    if config.objective.name == "dflash":
        check_pair(config, max_length=max_length)
        return
    field, name = starting_point(config)
    check_kept_base(config, None)
    if is_builtin(name):
        check_builtin(name)
        return
    model, _ = open_trainable_config(
        name,
        is_causal=config.objective.is_causal,
        field=field,
        takes_canvas=takes_canvas(config),
    )
    check_published_run(config, model)
    check_length(model, name, field=field, max_length=max_length)
    if not config.from_scratch:
        check_weights(name, field=field)


def _check_modules(config: "TrainConfig", tokenizer: Any, *, max_length: int) -> None:
    """Check what depends on the layers that a model has, on one without weights."""
    fields = {
        "sharding": config.sharding != "none",
        "optimizer muon": config.optimizer == "muon",
    }
    if not (config.lora_rank is not None or config.gradient_checkpointing or any(fields.values())):
        return
    model = model_without_weights(config, tokenizer, max_length=max_length)
    if config.gradient_checkpointing:
        ModelInTwoParts(model, vocab_size=len(tokenizer)).recompute_activations()
    for field in (field for field, is_set in fields.items() if is_set):
        find_layers(model, field=field)
