"""The section `preprocess`: where the text comes from, and how it becomes packed rows."""

from typing import Literal

from pydantic import Field, model_validator

from tokendiff.config.base import MAX_COUNT, Section, added, operational

FILE_FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
TEXT = "text"
FILLED_FOR = ("mdlm", "udlm", "hybrid")  # objectives that answers are filled up for by default
SAMPLES = "samples"  # the folders that jobs.generate writes

_CHATS_ONLY = ("chat_template", "train_on", "too_long", "fill_answers")


class PreprocessConfig(Section):
    """Text to packed token rows."""

    dataset_name: str = Field(
        "builtin",
        min_length=1,
        description="builtin (CPython's own documentation); text, jsonl (an object a line), json "
        "(one array), csv, tsv, parquet or samples (what jobs.generate wrote), all with "
        "data_files; or a Hugging Face dataset: a hub name (or name@revision) or a local folder",
    )
    dataset_config_name: str | None = Field(
        None, description="configuration of a Hugging Face dataset"
    )
    dataset_split: str = Field("train", description="split of a Hugging Face dataset")
    data_files: list[str] = Field(
        [],
        description="files or globs; text files may be compressed (.gz .bz2 .xz .zst .lz4 .br); "
        "for samples, folders",
    )
    text_column: str = Field(
        "text",
        min_length=1,
        description="column that holds a text or a list of texts; doc.text names the field text "
        "inside the column doc",
    )
    dataset_format: (
        Literal["text", "messages", "sharegpt", "prompt_completion", "alpaca"] | None
    ) = added(
        None,
        description="what a row is: text, or a conversation as messages (role, content), "
        "sharegpt (conversations: from, value), prompt_completion or alpaca (instruction, "
        "input, output); by default found by its columns",
    )
    chat_template: str | None = added(
        None,
        min_length=1,
        description="file with the Jinja template that writes conversations out; by default the "
        "tokenizer's own",
    )
    train_on: Literal["answers", "last_answer", "all"] = added(
        "answers",
        description="tokens of a conversation that the loss counts: all answers, the last answer, "
        "or everything",
    )
    too_long: Literal["cut", "drop"] = added(
        "cut",
        description="what happens to a conversation longer than max_length: cut off its end, or "
        "drop it whole",
    )
    fill_answers: bool | None = added(
        None,
        description="fill the last answer up with EOS to a random length, so that a model that "
        "denoises whole rows learns to end an answer inside a longer slot; by default "
        "on for mdlm, udlm and hybrid, off for other objectives",
    )
    isolate_documents: bool | None = added(
        None,
        description="hide the documents of a row from each other, in models that see whole rows "
        "too; by default on for conversations, off for text",
    )
    sample_by: Literal["line", "document"] = Field(
        "line", description="what one document is in text files: a line or the whole file"
    )
    use_dummy_data: bool = Field(False, description="train on random tokens in place of a dataset")
    num_dummy_samples: int = Field(2048, ge=1, le=MAX_COUNT, description="rows of random tokens")
    tokenizer_name_or_path: str | None = Field(
        None,
        description="bytes, bpe (trained on the corpus), or a transformers name (or "
        "name@revision) or path; by default the model's own; where the model is a built-in one, "
        "that of warm_start_from, or else bpe",
    )
    vocab_size: int = Field(2048, ge=300, le=10_000_000, description="size of the bpe vocabulary")
    max_length: int = Field(128, ge=2, le=MAX_COUNT, description="tokens per packed row")
    heldout_fraction: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="share of documents, chosen by hash, that is kept for evaluation",
    )
    partition_bytes: int = Field(
        32 << 20,
        ge=1,
        le=2**50,
        description="most input bytes that one task packs into one shard; a larger file is cut "
        "into equal parts",
    )
    new_since: str | None = Field(
        None,
        description="models:/NAME@ALIAS, a registered model: files that it was trained on are used "
        "for held-out rows only, and its tokenizer is kept; if there is no such model "
        "yet, all files count as new",
    )
    output_dir: str | None = operational(None, description="folder for the shards")
    max_errors: int = operational(
        100,
        ge=0,
        le=MAX_COUNT,
        description="most rows that may be unusable (cut off, no text, not UTF-8); they are left "
        "out and named in errors/. With more of them the job fails",
    )

    @model_validator(mode="after")
    def _files_where_they_belong(self) -> "PreprocessConfig":
        if self.use_dummy_data:
            self.refuse_ignored(("dataset_name",), "use_dummy_data")
        takes_files = self.dataset_name in (*FILE_FORMATS, SAMPLES)
        if takes_files and not self.data_files:
            raise ValueError(
                f"dataset_name {self.dataset_name!r} needs data_files: a list of files or globs"
            )
        if self.data_files and not takes_files:
            raise ValueError(
                f"data_files goes with dataset_name {', '.join(FILE_FORMATS)} or {SAMPLES}, not "
                f"{self.dataset_name!r}"
            )
        if self.new_since is not None and self.dataset_name not in FILE_FORMATS:
            raise ValueError(
                "new_since compares files, so it needs dataset_name "
                f"{', '.join(FILE_FORMATS)}, not {self.dataset_name!r}; remove it"
            )
        if "num_dummy_samples" in self.model_fields_set and not self.use_dummy_data:
            raise ValueError("num_dummy_samples goes with use_dummy_data")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "PreprocessConfig":
        beside = f"dataset_name {self.dataset_name!r}"
        if self.dataset_name != "text":
            self.refuse_ignored(("sample_by",), beside)
        if self.dataset_name in ("builtin", SAMPLES, *FILE_FORMATS):
            self.refuse_ignored(("dataset_config_name", "dataset_split"), beside)
        if self.dataset_name == SAMPLES:
            self.refuse_ignored(("text_column",), beside)
        if self.dataset_format in (None, TEXT):
            chats_only = () if self.dataset_format is None else _CHATS_ONLY
            self.refuse_ignored(chats_only, "dataset_format text")
        elif self.use_dummy_data or self.dataset_name in ("builtin", "text", SAMPLES):
            raise ValueError(
                f"dataset_format {self.dataset_format!r} goes with dataset_name jsonl, json, csv, "
                f"tsv, parquet or a Hugging Face dataset, not {self.dataset_name!r}"
            )
        else:
            self.refuse_ignored(("text_column",), f"dataset_format {self.dataset_format!r}")
        if self.dataset_name in ("builtin", SAMPLES):  # dummy data too, which has no dataset_name
            self.refuse_ignored(("max_errors",), beside)
        if self.tokenizer_name_or_path not in (None, "bpe"):
            self.refuse_ignored(
                ("vocab_size",), f"tokenizer_name_or_path {self.tokenizer_name_or_path!r}"
            )
        return self
