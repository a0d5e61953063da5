"""What a config trains: the model that it starts from, with its adapters, the objective, and the
noise process that checkpoints record.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokendiff.artifacts.checkpoint import DRAFT_ADAPTERS
from tokendiff.artifacts.model_folders import local_model
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.rows import TokenData
from tokendiff.diffusion.interfaces import Objective
from tokendiff.diffusion.kernels import AbsorbingKernel, UniformKernel
from tokendiff.errors import InputError
from tokendiff.models.adapters import add_adapters
from tokendiff.models.builtin import is_builtin
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.dflash.config import DFlashDraftConfig
from tokendiff.models.dflash.planning import plan_draft
from tokendiff.models.dflash.target_states import open_states
from tokendiff.models.dflash.trainee import DraftTrainee, load_trainee
from tokendiff.models.families import Family, family_of, published_type
from tokendiff.models.kept_base import (
    draft_adapter_fields,
    fill_draft_adapters,
    put_draft_adapters,
    read_fields,
)
from tokendiff.models.opening import load_causal_denoiser, load_denoiser
from tokendiff.models.plans import plan_model
from tokendiff.models.pretrained import open_config
from tokendiff.models.vocabulary import check_vocabulary
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import BlockDiffusion
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.objectives.dflash import DFlash
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.training.world import World

Prediction = Literal["own", "next"]

if TYPE_CHECKING:
    from tokendiff.config.objectives import (
        BlockDiffusionConfig,
        BlockRefinementConfig,
        DFlashConfig,
        HybridConfig,
        MDLMConfig,
        UDLMConfig,
    )
    from tokendiff.config.train import TrainConfig


def _build_mdlm(config: "MDLMConfig", process: NoiseProcess) -> Objective:
    kernel = process.kernel()
    assert isinstance(kernel, AbsorbingKernel)
    predicts_next = process.predict == "next"
    return MDLM(kernel=kernel, predicts_next=predicts_next, **_common_fields(config))


def _build_token_noise(config: "UDLMConfig | HybridConfig", process: NoiseProcess) -> Objective:
    return TokenNoiseDiffusion(
        kernel=process.kernel(),
        loss_type=config.loss_type,
        predicts_next=process.predict == "next",
        **_common_fields(config),
    )


def _build_block_diffusion(config: "BlockDiffusionConfig", process: NoiseProcess) -> Objective:
    kernel = process.kernel()
    fields: dict[str, Any] = {
        "block_length": config.block_length,
        "eos_token_id": process.eos_token_id,
        "restarts_at_answers": process.block_start is not None,
        "ar_loss_weight": config.ar_loss_weight,
        "diffusion_loss_weight": config.diffusion_loss_weight,
        "predicts_next": config.predict == "next",
        **_common_fields(config),
    }
    if isinstance(kernel, UniformKernel):
        is_loo = process.prediction == "loo"
        loss_type: Literal["elbo", "cross_entropy"] = "elbo" if is_loo else "cross_entropy"
        return UniformBlockDiffusion(kernel=kernel, loss_type=loss_type, **fields)
    assert isinstance(kernel, AbsorbingKernel)
    return BlockDiffusion(
        kernel=kernel,
        exact_mask_counts=config.exact_mask_counts,
        keeps_base=process.keeps_base,
        **fields,
    )


def _build_block_refinement(config: "BlockRefinementConfig", process: NoiseProcess) -> Objective:
    if config.prompt_length >= process.max_length:
        raise InputError(
            f"prompt_length {config.prompt_length} leaves nothing of rows of {process.max_length} "
            "tokens to train on; lower it, or preprocess with a larger max_length"
        )
    mode = process.attention_mask_mode
    return BlockRefinement(
        mask_token_id=process.mask_token_id,
        block_length=config.block_length,
        eos_token_id=process.eos_token_id,
        attention_mask_mode="2d" if mode == "2d" else "4d",
        clean_context=config.clean_context,
        prompt_length=config.prompt_length,
        restarts_at_answers=process.block_start is not None,
        lambda_conf=config.lambda_conf,
        conf_temperature=config.conf_temperature,
    )


def _common_fields(
    config: "MDLMConfig | UDLMConfig | HybridConfig | BlockDiffusionConfig",
) -> dict[str, Any]:
    names = ("min_time", "max_loss_weight", "lambda_conf", "conf_temperature")
    return {name: getattr(config, name) for name in names}


def _build_dflash(config: "DFlashConfig", draft: DFlashDraftConfig) -> Objective:
    assert draft.block_size is not None
    return DFlash(
        block_size=draft.block_size,
        mask_token_id=draft.mask_token_id,
        num_anchors=config.num_anchors,
        loss_type=config.loss_type,
        decay_gamma=config.decay_gamma,
        dpace_alpha=config.dpace_alpha,
    )


# The closed table behind `objective: NAME`, of those with a noise process.
OBJECTIVES: dict[str, Callable[[Any, NoiseProcess], Objective]] = {
    "mdlm": _build_mdlm,
    "udlm": _build_token_noise,
    "hybrid": _build_token_noise,
    "block_refinement": _build_block_refinement,
    "block_diffusion": _build_block_diffusion,
}


def build_trainee(
    config: "TrainConfig",
    data: TokenData,
    tokenizer: Any,
    *,
    world: World,
    warn: Callable[[str], None],
) -> tuple[ModelInTwoParts | DraftTrainee, Objective, NoiseProcess | None]:
    """What is trained, by what, and the noise process that the checkpoint records."""
    if config.objective.name == "dflash":
        plan = plan_draft(config, tokenizer=tokenizer, max_length=data.max_length)
        for note in plan.notes:
            warn(note)
        trainee = load_trainee(plan, device=world.device, seed=config.seed, dropout=config.dropout)
        return trainee, _build_dflash(config.objective, plan.draft), None
    check_kept_base(config, tokenizer)
    field, start = starting_point(config)
    fields: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": data.max_length,
        "from_scratch": config.from_scratch,
        "dropout": config.dropout,
        "seed": config.seed,
        "warn": warn,
        "field": field,
        "is_on_disk": config.sharding != "none" and world.size > 1,
    }
    model: ModelInTwoParts
    predict: Prediction = "own"
    if config.objective.is_causal:
        canvas = takes_canvas(config)
        model = load_causal_denoiser(
            start, keeps_base=config.keep_base, takes_canvas=canvas, **fields
        )
    else:
        denoiser = load_denoiser(start, predict=wanted_prediction(config), **fields)
        model, predict = denoiser, "next" if denoiser.predicts_next else "own"
    check_published_run(config, model.model.config)
    if not config.from_scratch:
        check_vocabulary(start, tokenizer, field=field)
    if config.keep_base:
        _add_draft_adapters(config, model, tokenizer)
    elif config.lora_rank is not None:
        add_configured_adapters(config, model.model, tokenizer)
    family = family_of(published_type(model.model.config))
    return model, *make_objective(config, tokenizer, data, predict=predict, family=family)


def takes_canvas(config: "TrainConfig") -> bool:
    """See `plan_model`."""
    return getattr(config.objective, "noise", None) == "uniform"


def check_published_run(config: "TrainConfig", model_config: Any) -> None:
    """Raise InputError where a run asks of a published model what is not done with its family."""
    _check_canvas_run(config, model_config)
    _check_converted_run(config, model_config)


def _check_canvas_run(config: "TrainConfig", model_config: Any) -> None:
    """Raise InputError where a run asks of an encoder with a decoder what is not done with one."""
    if not _has_canvas(model_config):
        return
    model_type = published_type(model_config)
    objective: Any = config.objective
    for field, value, is_wrong, remedy in (
        ("ar_loss_weight", objective.ar_loss_weight, objective.ar_loss_weight == 0.0,
         "its encoder reads from left to right, as the next-token loss trains it; set it to 1"),
        ("predict", objective.predict, objective.predict != "own",
         "its decoder tells each token at its own position; remove predict"),
        ("max_loss_weight", objective.max_loss_weight, objective.max_loss_weight is not None,
         "its loss is the cross-entropy, which has no weight; remove it"),
        ("optimizer", config.optimizer, config.optimizer != "adamw",
         "its experts are no matrices; set it to adamw"),
        ("compile", config.compile, config.compile,
         "its two passes are not compiled; set it to false"),
    ):  # fmt: skip
        if is_wrong:
            raise InputError(f"{field} {value!r} with a model of type {model_type!r}: {remedy}")


def _has_canvas(model_config: Any) -> bool:
    return family_of(published_type(model_config)).attention == "canvas"


def _check_converted_run(config: "TrainConfig", model_config: Any) -> None:
    """Raise InputError where what a run makes of a published model could not be saved: weights that
    only its own layout holds, of a model that its own loader would take for what it was.
    """
    model_type = published_type(model_config)
    family = family_of(model_type)
    if family.layout is None or not family.layout.is_converted:
        return
    fields = config.objective.process_fields() or {}
    sees_blocks = fields.get("attention_mask_mode") == "4d"
    is_kept = (
        sees_blocks == (family.attention == "blocks")
        and fields.get("context_attention", "block") == "block"
        and fields.get("predict") in (None, "own")
        and fields.get("forward_process") == "absorbing"
        and not config.keep_base
    )
    if not is_kept:
        remedy = (
            "with objective 'block_diffusion', without noise, predict, ar_loss_weight and "
            "keep_base, or with 'block_refinement' and attention_mask_mode '4d'"
            if family.attention == "blocks"
            else "with objective 'mdlm'"
        )
        raise InputError(
            f"objective {config.objective.name!r} would make another model of one of type "
            f"{model_type!r}, which could not be saved; train it as it was: {remedy}"
        )
    if config.optimizer == "muon":
        raise InputError(
            f"optimizer 'muon' with a model of type {model_type!r}: its experts are no matrices; "
            "set it to adamw"
        )


def states_reader(
    config: "TrainConfig", data: TokenData, tokenizer: Any, trainee: ModelInTwoParts | DraftTrainee
) -> Callable[[Any, Any], Tensor] | None:
    """What gives a trainer the hidden states that were computed before; None where the target is
    to compute them.

    Raises:
        InputError: they are of another target, of other layers or rows, or in another dtype.
    """
    if config.target_states_path is None:
        return None
    assert isinstance(trainee, DraftTrainee), "checked by the config"
    plan = plan_draft(config, tokenizer=tokenizer, max_length=data.max_length)
    states = open_states(config, plan, data, dtype=trainee.target.dtype)
    return partial(states.read, max_length=data.max_length)


def wanted_prediction(config: "TrainConfig") -> Prediction | None:
    """What a denoiser of whole rows is to predict; None where the config leaves it to the model."""
    return getattr(config.objective, "predict", None)


def _add_draft_adapters(config: "TrainConfig", model: ModelInTwoParts, tokenizer: Any) -> None:
    """New ones, or those of a warm start."""
    field, start = starting_point(config)
    fields = draft_adapter_fields(config, tokenizer, name=start, field=field)
    put_draft_adapters(model, fields, dropout=config.lora_dropout, seed=config.seed)
    folder = Path(local_model(start))
    if config.warm_start_from is not None and (folder / DRAFT_ADAPTERS).is_file():
        fill_draft_adapters(model, folder)


def check_kept_base(config: "TrainConfig", tokenizer: Any | None) -> None:
    """Check a run against the base model that it keeps, or starts from.

    Args:
        tokenizer: that made the rows; None where they are still to be made.

    Raises:
        InputError: the model cannot stay as it is, or adapters of a warm start would be lost.
    """
    field, start = starting_point(config)
    folder = Path(local_model(start))
    has_adapters = config.warm_start_from is not None and (folder / DRAFT_ADAPTERS).is_file()
    if not config.keep_base:
        if has_adapters:
            raise InputError(
                f"warm_start_from {start!r} holds adapters beside a base model that was kept; set "
                "keep_base to train them on, or give it as model_name_or_path to start from the "
                "base model alone"
            )
        return
    if is_builtin(start):
        raise InputError(
            f"keep_base: {field} {start!r} starts from new weights; give a trained model"
        )
    text = open_config(start, field=field, remedy="give a folder or hub name").get_text_config()
    if (window := getattr(text, "sliding_window", None)) is not None:
        raise InputError(
            f"keep_base: {field} {start!r} has layers that see a window of {window} tokens, which "
            "block diffusion does without; give a model without a window, or leave keep_base out"
        )
    if tokenizer is None:
        return
    fields = draft_adapter_fields(config, tokenizer, name=start, field=field)
    if has_adapters and (found := read_fields(folder)) != fields:
        differing = ", ".join(
            f"{name} {found[name]!r}"  # type: ignore[literal-required]
            for name, value in fields.items()
            if found[name] != value  # type: ignore[literal-required]
        )
        raise InputError(
            f"warm_start_from {start!r} holds other adapters than this run trains (theirs have "
            f"{differing}); set the lora fields to theirs"
        )


def starting_point(config: "TrainConfig") -> tuple[str, str]:
    """Field and name of the model that training starts from."""
    field = "model_name_or_path" if config.warm_start_from is None else "warm_start_from"
    return field, getattr(config, field)


def model_without_weights(config: "TrainConfig", tokenizer: Any, *, max_length: int) -> Any:
    """The transformers model that a run trains, with its adapters, on the meta device.

    Raises:
        InputError: there is no such model, or it does not go with the rows.
    """
    field, name = starting_point(config)
    plan = plan_model(
        name,
        tokenizer=tokenizer,
        max_length=max_length,
        is_causal=config.objective.is_causal,
        from_scratch=config.from_scratch,
        predict=wanted_prediction(config),
        field=field,
        takes_canvas=takes_canvas(config),
    )
    check_published_run(config, plan.config)
    text = plan.config.get_text_config()
    text.vocab_size = max(text.vocab_size, plan.vocab_size)  # as the embedding will have grown
    with torch.device("meta"):
        model = plan.auto_class.from_config(plan.config, dtype=torch.float32)
    if config.lora_rank is not None:
        add_configured_adapters(config, model, tokenizer)
    return model


def add_configured_adapters(config: "TrainConfig", model: Any, tokenizer: Any) -> None:
    """Put the adapters that a config asks for into a transformers model.

    Raises:
        InputError: peft is not installed, or the model has no such layers.
    """
    assert config.lora_rank is not None
    objective = config.objective
    # Without noise no mask is read; and a DiffusionGemma has never read one.
    reads_mask = objective.process_fields() is not None and not _has_canvas(model.config)
    add_adapters(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        trained_token_id=tokenizer.mask_token_id if reads_mask else None,
        reads_its_logit=getattr(objective, "ar_loss_weight", 0.0) > 0.0,
        seed=config.seed,
    )


def make_objective(
    config: "TrainConfig",
    tokenizer: Any,
    data: TokenData,
    *,
    predict: Prediction,
    family: Family,
) -> tuple[Objective, NoiseProcess | None]:
    """The objective of a model that gives logits of the tokenizer's ids, and its noise process.

    Args:
        predict: what the model does, where it is a denoiser of whole rows.
        family: of the model.

    Raises:
        InputError: the objective does not go with the rows.
    """
    fields = config.objective.process_fields()
    if fields is None:
        return Autoregressive(), None
    if config.keep_base:  # blocks see what its own cache holds
        fields |= {"context_attention": "causal", "keeps_base": True}
    if family.attention == "canvas":  # what its weights tell, and its own loader takes them to
        fields["prediction"] = family.prediction
    ends: dict[str, Any] = {}
    if config.objective.is_causal:
        ends["eos_token_id"] = tokenizer.eos_token_id
        ends["block_start"] = _block_start(fields.pop("block_start"), data)
    else:
        fields["predict"] = predict
    process = NoiseProcess(
        objective=config.objective.name,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        max_length=data.max_length,
        **fields,
        **ends,
    )
    return OBJECTIVES[config.objective.name](config.objective, process), process


def _block_start(wanted: str | None, data: TokenData) -> str | None:
    """What the noise process records, of what the config says."""
    starts = {"answers": "answer", "last_answer": "last_answer"}
    found = starts.get(data.train_on)
    if wanted == "answer" and found is None:
        raise InputError(
            "block_start answer: these rows were preprocessed with the loss on all tokens, so the "
            "starts of answers are not known; preprocess chats with train_on answers, or set "
            "block_start to document"
        )
    return None if wanted == "document" else found
