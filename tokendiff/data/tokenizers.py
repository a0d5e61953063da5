"""Tokenizers: two of our own that need no download, and any of transformers'.

Whatever the tokenizer, what comes out has a mask, an EOS and a padding token.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.model_folders import check_there, local_model, revision_of
from tokendiff.errors import InputError, input_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PAD, MASK, EOS = "[PAD]", "[MASK]", "[EOS]"
# How the mask is written where neither a model's config nor its tokenizer says which token it is.
MASK_TOKENS = ("<|MASK|>", "<|mask|>", "<|mdm_mask|>", MASK, "<mask>")
# Tokenizer classes of files that AutoTokenizer does not open as what they are, and classes of
# transformers that do; the first comes with code of its own.
_SAME_AS = {
    "DreamTokenizer": "Qwen2Tokenizer",
    # Such a tokenizer is whole in its tokenizer.json. Beside a Qwen2's config AutoTokenizer makes a
    # Qwen2Tokenizer of it all the same, which splits text otherwise and adds a token.
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
_REMEDY = (
    "give bytes, bpe, a hub name, or a folder that holds a tokenizer (by default it is that of "
    "model_name_or_path or warm_start_from)"
)


def build_tokenizer(
    name_or_path: str, *, documents: Iterable[str], vocab_size: int
) -> tuple["PreTrainedTokenizerBase", list[str]]:
    """Make or load a tokenizer.

    Args:
        name_or_path: bytes (256 tokens and the special ones), bpe (byte-level, trained on
            `documents`), both lossless; or a transformers name or folder.
        documents: what bpe is trained on; not read otherwise.
        vocab_size: of bpe, the special tokens included.

    Returns:
        The tokenizer, and notes for the user on what had to be added to it.

    Raises:
        InputError: a name or folder that transformers cannot load, or a vocabulary with gaps.
    """
    if name_or_path == "bytes":
        return _wrapped(_byte_tokenizer()), []
    if name_or_path == "bpe":
        tokenizer = _wrapped(_trained_bpe(documents, vocab_size))
        if len(tokenizer) < vocab_size:
            return tokenizer, [f"bpe found {len(tokenizer)} tokens of the vocab_size {vocab_size}"]
        return tokenizer, []
    tokenizer = open_tokenizer(name_or_path, field="tokenizer_name_or_path", remedy=_REMEDY)
    notes = _add_missing_tokens(tokenizer)
    _check_gaps(tokenizer, name_or_path)
    return tokenizer, notes


def check_tokenizer(name_or_path: str) -> None:
    """Raise InputError if `build_tokenizer` would, whatever the documents are."""
    if name_or_path not in ("bytes", "bpe"):
        build_tokenizer(name_or_path, documents=(), vocab_size=0)


def _check_gaps(tokenizer: "PreTrainedTokenizerBase", name_or_path: str) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise InputError(
            f"tokenizer_name_or_path {name_or_path!r}: has {len(tokenizer)} tokens, but ids up to "
            f"{highest}; a vocabulary with gaps cannot be used"
        )


def is_of_tokenizer(path: Path) -> bool:
    """Whether a file may be a tokenizer's: they have many names."""
    return any(part in path.name for part in ("token", "vocab", ".model", "merges", ".bpe"))


def open_tokenizer(
    name: str | Path,
    *,
    field: str,
    remedy: str = "save it beside the model",
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of transformers that a name stands for: of the hub, a folder, or one of ours
    behind a URI.

    Args:
        field: of the config that gave the name.
        remedy: what to do where there is none.
        trust_remote_code: run code that comes with it.

    Raises:
        InputError: there is none, or transformers cannot read it.
    """
    import transformers
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    place = f"{field} {str(name)!r}"
    with input_errors(f"{place}: no tokenizer can be opened there", remedy), _quiet_configs():
        check_there(str(name))
        folder = local_model(str(name))
        if Path(folder).is_dir() and not any(map(is_of_tokenizer, Path(folder).iterdir())):
            raise InputError(f"{place} holds no tokenizer (no tokenizer.json, for one); {remedy}")
        revision = revision_of(str(name))
        own_class = get_tokenizer_config(folder, **revision).get("tokenizer_class", "")
        if (same_as := _SAME_AS.get(own_class)) is not None:
            tokenizer: Any = getattr(transformers, same_as).from_pretrained(folder, **revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **revision
            )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty tokenizer up where the folder has no files of one.
        raise InputError(f"{place} holds no tokenizer; {remedy}")
    return tokenizer


@contextmanager
def _quiet_configs() -> Iterator[None]:
    """Within it transformers does not warn of the config of the model beside a tokenizer, say that
    it does not know its type: whether the model can be opened is seen where it is.
    """
    with errors_alone("transformers.configuration_utils"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated")
        yield


@contextmanager
def errors_alone(*names: str) -> Iterator[None]:
    """Within it loggers pass on errors, and nothing that is less.

    By a filter, as a change of their level makes `logging` go through all loggers that there are.
    """
    loggers = [logging.getLogger(name) for name in names]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for logger in loggers:
        logger.addFilter(is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_error)


def _byte_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [PAD, MASK, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trained_bpe(documents: Iterable[str], vocab_size: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, MASK, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _wrapped(tokenizer: "Tokenizer") -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=EOS
    )


def _add_missing_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    notes = []
    known = next((token for token in MASK_TOKENS if token in tokenizer.get_vocab()), MASK)
    if tokenizer.mask_token_id is None and known != MASK:
        tokenizer.add_special_tokens({"mask_token": known})
        notes.append(
            f"the tokenizer does not say which token is its mask; {known}, id "
            f"{tokenizer.mask_token_id}, is taken for it"
        )
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
        notes.append(
            f"the tokenizer has no mask token; added {MASK} as id {tokenizer.mask_token_id}"
        )
    if tokenizer.eos_token_id is None:
        if tokenizer.sep_token_id is not None:
            tokenizer.eos_token = tokenizer.sep_token
            notes.append(f"the tokenizer has no EOS token; {tokenizer.sep_token} ends documents")
        else:
            tokenizer.add_special_tokens({"eos_token": EOS})
            notes.append(
                f"the tokenizer has no EOS token; added {EOS} as id {tokenizer.eos_token_id}"
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return notes
