"""A model's vocabulary beside that of the tokenizer that made the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokendiff.artifacts.model_folders import local_model
from tokendiff.data.tokenizers import errors_alone, open_tokenizer
from tokendiff.errors import InputError
from tokendiff.models.builtin import MODEL_FIELD, is_builtin


def check_vocabulary(model_name_or_path: str, tokenizer: Any, *, field: str = MODEL_FIELD) -> None:
    """Refuse data whose ids mean other tokens than the pretrained model learnt.

    Raises:
        InputError: `tokenizer` gives a token of the model's own tokenizer another id. It may add
            tokens. A model that comes without a tokenizer is taken on trust. Or that tokenizer is
            in the model's folder, and cannot be opened.
    """
    is_ours = is_builtin(model_name_or_path)
    own = {} if is_ours else _vocabulary_of(model_name_or_path, field=field)
    here = tokenizer.get_vocab()
    differing = [token for token, index in own.items() if here.get(token) != index]
    if differing:
        instead = ", or train from_scratch" if field == MODEL_FIELD else ""
        raise InputError(
            f"the data was not made with the tokenizer of {field} "
            f"{model_name_or_path!r} ({len(differing):,} of its {len(own):,} tokens have another "
            f"id, {differing[0]!r} for one); preprocess with tokenizer_name_or_path set to the "
            f"model{instead}"
        )


def _vocabulary_of(model_name_or_path: str, *, field: str = MODEL_FIELD) -> dict[str, int]:
    """Tokens and ids of the tokenizer that comes with a model; empty where there is none.

    Raises:
        InputError: the model's folder has one that cannot be opened.
    """
    folder = Path(local_model(model_name_or_path))
    # transformers makes an empty tokenizer up for some folders that have none.
    if folder.is_dir() and not any(
        any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "spiece*")
    ):
        return {}
    try:
        return dict(open_tokenizer(model_name_or_path, field=field).get_vocab())
    except InputError:
        if folder.is_dir():
            raise
        return {}  # of a hub name it cannot be told whether there is none


def check_mask_token(tokenizer: Any) -> None:
    """Raise InputError where the tokenizer has no mask token that a model could be given."""
    mask = tokenizer.mask_token_id
    if mask is None:
        raise InputError(
            "the tokenizer has no mask token; jobs.preprocess adds one to the tokenizer it saves"
        )
    if not 0 <= mask < len(tokenizer):
        raise InputError(
            f"the tokenizer's mask token {tokenizer.mask_token!r} has id {mask}, outside its "
            f"vocabulary of {len(tokenizer)}; number the tokens from 0 without gaps"
        )


def unknown_mask(name: str, tokenizer: Any, *, field: str = MODEL_FIELD) -> bool:
    """Whether the mask is a token that a model does not know, which is then the tokenizer's last.

    Raises:
        InputError: other tokens are new to the model too, so that it cannot stay as it is.
    """
    own = set(_vocabulary_of(name, field=field).values())
    unknown = sorted(set(tokenizer.get_vocab().values()) - own) if own else []
    if not unknown:
        return False
    if unknown != [tokenizer.mask_token_id] or unknown[0] != max(own) + 1:
        raise InputError(
            f"keep_base: {field} {name!r} does not know {len(unknown)} tokens of the tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(unknown[0])!r} for one; only the mask may be new, "
            "and the last of all; preprocess with the model's own tokenizer"
        )
    return True


def fit_embedding(
    model: Any,
    name: str,
    tokenizer: Any,
    vocab_size: int,
    warn: Callable[[str], None],
    *,
    field: str = MODEL_FIELD,
) -> None:
    """Give the model an embedding for each of the tokenizer's ids, and say which are new to it.

    Raises:
        InputError: what the model has in place of an embedding cannot grow.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise InputError(
            f"{field} {name!r} is of type {model.config.model_type!r}, whose tokens have no plain "
            f"embedding (torch's nn.Embedding) but a {type(embedding).__name__}; give a model that "
            "has one, for example of type bert, roberta or modernbert"
        )
    size = embedding.num_embeddings
    if size < vocab_size:
        # transformers draws the new rows from a normal distribution around the mean of the old
        # ones that is so narrow (1e-9 of their covariance) that they are that mean.
        with errors_alone("transformers.modeling_utils"):  # how they are drawn is said below
            model.resize_token_embeddings(vocab_size, mean_resizing=True)
    new = _start_unknown_tokens(model, name, tokenizer) or [*range(size, vocab_size)]
    if not new:
        return
    token = tokenizer.convert_ids_to_tokens(new[0])
    told = f"the tokenizer's {token!r} is new to the model: its embedding starts"
    if len(new) > 1:
        told = f"{len(new):,} tokens of the tokenizer are new to the model, {token!r} for one: "
        told += "their embeddings start"
    grown = f"; the embedding grows from {size:,} rows to {vocab_size:,}"
    warn(f"{told} at the mean of the others{grown if size < vocab_size else ''}")


@torch.no_grad()
def _start_unknown_tokens(model: Any, name: str, tokenizer: Any) -> list[int]:
    """Give tokens that the model's own tokenizer does not have the mean embedding; returns them.

    Models are padded to a round number of ids, so a mask token that was added to the tokenizer
    often needs no new row: it gets one that was never trained, of a scale unlike all others (zero,
    in some). The mean of what was trained says "some token" and no one in particular, which is what
    a mask is; noise would be a token that the layers above take for content. One new token need not
    be told apart from others, so the mean is not disturbed. With a tied head the mask's logit
    becomes the mean of all logits; it is excluded wherever a mask could be predicted.
    """
    own = _vocabulary_of(name)
    unknown = sorted(set(tokenizer.get_vocab().values()) - set(own.values()))
    if not own or not unknown:
        return []
    known = torch.tensor(sorted(own.values()))
    heads = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not heads[0]:
        heads.append(output.weight)
    for weight in heads:
        weight[unknown] = weight[known[known < len(weight)]].mean(0)
    return unknown
