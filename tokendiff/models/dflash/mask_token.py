"""The id that marks the positions which a draft fills in, for a frozen target without a mask token:
one that does not occur in text.
"""

import re
from typing import Any

from tokendiff.data.tokenizers import MASK_TOKENS
from tokendiff.errors import InputError
from tokendiff.models.decoding import find_stop_tokens

# <|reserved_special_token_0|>, <unused0>, [unused1]: a name that says so, in brackets of any kind.
_RESERVED = re.compile(r"[<\[].*(reserved|unused).*[>\]]", re.IGNORECASE)


def choose_mask_token(target: Any, tokenizer: Any, *, target_model_id: str) -> tuple[int, str]:
    """An id of the target's embedding that no text has, and a sentence that says which.

    A token that is written like a mask; else the first of the reserved or unused ones; else the
    first row of the embedding that is beyond the tokenizer, since models are often padded to a
    round size; else the first special token that has no part to play and does not occur in the chat
    template. The same target gives the same id.

    Args:
        target: the target's config.
        tokenizer: of the data; what it adds to the target's own is beyond the embedding, or its
            mask token would do.

    Raises:
        InputError: there is none.
    """
    size = target.get_text_config().vocab_size
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    in_use = {*_ids_with_a_part(tokenizer), *find_stop_tokens(target_model_id, target, tokenizer)}
    free = [index for index in sorted(by_id) if index < size and index not in in_use]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    masks = [index for index in free if by_id[index] in MASK_TOKENS]
    reserved = [index for index in free if _RESERVED.fullmatch(by_id[index])]
    beyond = max(by_id) + 1
    added = [
        index
        for index in free
        if index in (known := tokenizer.added_tokens_decoder)
        and known[index].special
        and by_id[index] not in template
    ]
    if masks:
        index, what = masks[0], "which is written like one"
    elif reserved:
        index, what = reserved[0], "a token that is kept free"
    elif beyond < size:
        index, what = beyond, f"a row of its embedding beyond the tokenizer's {beyond:,} tokens"
    elif added:
        index, what = added[0], "a special token that has no part to play"
    else:
        raise InputError(
            f"target_model_id {target_model_id!r} is frozen and has no mask token, and none of its "
            f"ids is free to be one: all {size:,} rows of its embedding are tokens, none of them "
            "reserved or unused; set mask_token_id to the id of a token that does not occur in "
            "your text"
        )
    name = f" ({by_id[index]})" if index in by_id else ""
    return index, (
        f"target_model_id {target_model_id!r} has no mask token: id {index}{name}, {what}, stands "
        "for what the draft fills in; mask_token_id sets another"
    )


def _ids_with_a_part(tokenizer: Any) -> list[int]:
    """Ids of the special tokens that the tokenizer names by what they do: BOS, EOS, padding, ..."""
    named = [*tokenizer.special_tokens_map.values()]
    return [int(index) for index in tokenizer.convert_tokens_to_ids(named)]
