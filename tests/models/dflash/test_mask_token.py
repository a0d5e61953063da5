"""Which id stands for what a draft fills in, where the target has no mask token."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from tokendiff.errors import InputError
from tokendiff.models.dflash.mask_token import choose_mask_token

LETTERS = list("abcdefgh")


def tokenizer_of(*tokens: str, special: tuple[str, ...] = (), **roles: str) -> Any:
    """[END], the tokens, letters, and special tokens behind them; END is the EOS token."""
    from tokenizers import Tokenizer, models

    vocabulary = {token: index for index, token in enumerate(["[END]", *tokens, *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", **roles)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def chosen(tokenizer: Any, size: int, target_model_id: str = "target") -> tuple[int, str]:
    target = Qwen3Config(vocab_size=size, eos_token_id=None, bos_token_id=None)
    index, note = choose_mask_token(target, tokenizer, target_model_id=target_model_id)
    assert 0 <= index < size
    assert note.startswith(f"target_model_id '{target_model_id}' has no mask token: id {index}")
    return index, note


@pytest.mark.parametrize(
    "name",
    ["<|reserved_special_token_0|>", "<unused0>", "[unused1]", "<|unused_3|>", "[RESERVED_9]"],
)
def test_a_reserved_token_goes_first(name: str) -> None:
    tokenizer = tokenizer_of("x", name, "<unused99>", special=("<fim_pad>",))
    index, note = chosen(tokenizer, 64)
    assert index == 2
    assert f"id 2 ({name})" in note


@pytest.mark.parametrize("name", ["unused", "reserved", "[notes]", "<unuseful>", "un[used]"])
def test_a_word_is_no_reserved_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    index, note = chosen(tokenizer, 64)
    assert index == len(tokenizer) == 10
    assert "id 10, a row of its embedding beyond the tokenizer's 10 tokens" in note


def test_rows_beyond_the_tokenizer_are_beyond_its_highest_id() -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"[END]": 0, "a": 1, "b": 3}, unk_token="[END]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]")
    assert chosen(tokenizer, 8)[0] == 4


def test_a_token_that_is_written_like_a_mask_is_one() -> None:
    assert chosen(tokenizer_of("<unused0>", "<|mask|>"), 64)[0] == 2


def test_of_special_tokens_one_without_a_part_is_taken() -> None:
    """Not those that begin, end or pad a text, nor those of the chat template."""
    special = ("[BOS]", "[PAD]", "<|user|>", "<|eot|>", "<repo>", "<file>")
    tokenizer = tokenizer_of(special=special, bos_token="[BOS]", pad_token="[PAD]")
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|eot|>{% endfor %}"
    index, note = chosen(tokenizer, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens(index) == "<repo>"
    assert "(<repo>), a special token that has no part to play" in note
    assert chosen(tokenizer, len(tokenizer) + 1)[0] == len(tokenizer), "no text can have that one"


def test_what_ends_a_text_by_the_generation_config_is_in_use(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(special=("<eom>", "<repo>"))
    assert chosen(tokenizer, len(tokenizer))[0] == len(tokenizer) - 2
    ends = tokenizer.convert_tokens_to_ids("<eom>")
    GenerationConfig(eos_token_id=[0, ends]).save_pretrained(tmp_path)
    assert chosen(tokenizer, len(tokenizer), str(tmp_path))[0] == len(tokenizer) - 1


def test_a_token_beyond_the_embedding_is_none() -> None:
    """As the mask token is that jobs.preprocess adds to the tokenizer of a target."""
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    assert tokenizer.mask_token_id == 9
    for size in (9, 7):
        with pytest.raises(InputError, match=f"all {size} rows of its embedding are tokens.*set"):
            chosen(tokenizer, size)
    reserved = tokenizer_of(special=("<unused0>",))
    with pytest.raises(InputError, match="set mask_token_id to the id of a token that does not"):
        chosen(reserved, 9)
