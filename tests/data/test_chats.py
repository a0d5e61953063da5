"""Conversations: the formats they come in, their tokens and targets, and whole ones in rows."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.chat_documents import ChatDocuments, ChatOptions
from tokendiff.data.chats import FORMATS, Conversation, Message
from tokendiff.data.fitting import Fitter, fit
from tokendiff.data.packing import PackedRows, TokenizedDocuments
from tokendiff.data.preprocess import PartitionStats, preprocess_partition
from tokendiff.data.prompts import PromptEncoder
from tokendiff.data.rows import TokenData
from tokendiff.data.sources import (
    find_dataset_format,
    plan_partitions,
    read_conversations,
    read_documents,
)
from tokendiff.data.templates import ChatRenderer, RenderError, TrainOn, read_template
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}"
    "<</SYS>>{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
    " {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# The end of an answer is in two spans: it is tagged, and it stands behind one that is.
TAGGED_TWICE = TAGGED.replace(
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
    "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
TEMPLATES = {"chatml": CHATML, "tagged": TAGGED, "tagged twice": TAGGED_TWICE, "llama": LLAMA}
# Earlier answers lose what they thought once a new question follows.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer(template: str | None) -> Any:
    tokenizer = build_tokenizer("bytes", documents=(), vocab_size=300)[0]
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str, system: str | None = None) -> Conversation:
    """Turns of the user and the assistant."""
    roles = ("user", "assistant")
    first = [] if system is None else [Message(role="system", content=system)]
    turns = [Message(role=roles[n % 2], content=text) for n, text in enumerate(contents)]
    return Conversation(messages=(*first, *turns))


TALKS = [
    conversation("Hi", "Hello"),
    conversation("Größe?", "25 € - ja", "und\njetzt", "nein  ", system="Sei kurz."),
    conversation("a" * 40, " b", "c", "d\n\ne", "f", "g<h"),
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_template_and_targets_the_answers(
    name: str, talk: Conversation
) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    messages = [{"role": m.role, "content": m.content} for m in talk.messages]
    rendered = ChatRenderer(tokenizer=tokenizer)(talk)
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert rendered.tokens.tolist() == whole
    # Bytes are tokens here: what the answers say, one after the other, and what ends each turn.
    end = " [EOS]" if name == "llama" else "<|im_end|>"
    answers = [m.content for m in talk.messages if m.role == "assistant"]
    said = [text.strip() if name == "llama" else text for text in answers]
    start = " " if name == "llama" else ""
    expected = "".join(f"{start}{text}{end}" for text in said)
    assert tokenizer.decode(rendered.tokens[rendered.is_target]) == expected
    text_bytes = len(expected.replace("<|im_end|>", "").replace("[EOS]", "").encode())
    assert rendered.num_bytes(len(whole)) == text_bytes
    # Of the tokens up to each, by the letters that targets are; those of a character that takes
    # several count with its last one.
    counted = np.cumsum(rendered.is_target & ~np.isin(whole, tokenizer.all_special_ids))
    if all(m.content.isascii() for m in talk.messages):
        assert [rendered.num_bytes(stop) for stop in range(1, len(whole) + 1)] == counted.tolist()


@pytest.mark.parametrize("kind", ["bytes", "offsets", "letters"])
def test_a_token_that_holds_the_blank_before_an_answer_is_of_the_answer(kind: str) -> None:
    """A template that asks with "assistant: " and a tokenizer that has " Paris" for a token."""
    if kind == "letters":
        words = ["[UNK]", "user", ":", "##:", "hi", "assistant", "paris", "[EOS]"]
        model = models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]")
        core = Tokenizer(model)
        core.normalizer = normalizers.BertNormalizer()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        if kind == "offsets":  # a normalizer whose changes the lengths of tokens do not tell
            core.normalizer = normalizers.NFKC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator(["user: hi assistant: Paris"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rendered = ChatRenderer(tokenizer=tokenizer)(conversation("hi", "Paris", "hi", "Paris"))
    said = tokenizer.convert_ids_to_tokens(rendered.tokens[rendered.is_target])
    assert said == ["paris" if kind == "letters" else "\u0120Paris", "[EOS]"] * 2


def test_special_tokens_are_told_where_other_ids_are_above_theirs() -> None:
    """As in Llama 2 and BERT."""
    words = ["[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant", "hi", "you"]
    words_only = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, "[UNK]"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, additional_special_tokens=words[1:3], eos_token=words[2]
    )
    tokenizer.chat_template = CHATML
    rendered = ChatRenderer(tokenizer=tokenizer)(conversation("you", "hi you"))
    assert [words[token] for token in rendered.tokens[rendered.is_special]] == words[1:3] * 2
    assert rendered.num_bytes(len(rendered.tokens)) == len("hi you")


@pytest.mark.parametrize("splits", [False, True])
def test_a_tokenizer_may_split_special_tokens_by_its_own_setting(splits: bool) -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.split_special_tokens = splits
    talk = conversation("Hi", "Hello")
    plain = [{"role": m.role, "content": m.content} for m in talk.messages]
    whole = tokenizer.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert ChatRenderer(tokenizer=tokenizer)(talk).tokens.tolist() == whole
    assert (tokenizer.convert_tokens_to_ids("<|im_end|>") in whole) != splits


@pytest.mark.parametrize("train_on", ["answers", "last_answer"])
@pytest.mark.parametrize("name", [*TEMPLATES, "forgetful", "bare"])
def test_an_outline_finds_the_answers_that_prefixes_find(name: str, train_on: TrainOn) -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    templates = {**TEMPLATES, "forgetful": FORGETFUL, "bare": bare + asked}
    rng = np.random.default_rng(0)
    words = ["a", " b ", "word0word", "> c", "\n", "é\t", "<|im_end", "user: ", "assistant: a  "]

    def said() -> str:
        return "".join(rng.choice(words, size=rng.integers(1, 5)))

    renderer = ChatRenderer(tokenizer=chat_tokenizer(templates[name]), train_on=train_on)
    refused = slow = 0
    for _ in range(200):
        system = said() if rng.random() < 0.3 else None
        messages = conversation(*(said() for _ in range(2 * rng.integers(1, 4))), system=system)
        try:
            expected = renderer._by_prefixes(messages.messages)
        except RenderError as error:
            refused += 1
            with pytest.raises(RenderError, match=re.escape(str(error))):
                renderer._by_outline(messages.messages)
        else:
            assert renderer._by_outline(messages.messages) == expected
            outline = renderer._outline(tuple(message.role for message in messages.messages))
            assert outline is not None
            contents = [message.content for message in messages.messages]
            slow += outline.spans(contents, expected[0]) is None
    assert (0 < refused < 200) == (name == "forgetful" and train_on == "answers")
    assert slow < 100 if name == "forgetful" else slow == 0


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # A question is written where its answer is, so that both are in one span.
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "{{ messages[loop.index0 - 1].content }} > {{ m.content }}\n{% endif %}{% endfor %}",
            ["a question > yes", "why > because"],
        ),
        # What stands behind the last message depends on what that says.
        (
            CHATML + "{% if messages[-1].content == 'because' %}{{ 'end' }}{% endif %}",
            ["yes<|im_end|>", "because<|im_end|>\nend"],
        ),
    ],
)
def test_a_text_of_no_outline_is_taken_by_prefixes(template: str, expected: list[str]) -> None:
    messages = conversation("a question", "yes", "why", "because").messages
    text, spans = ChatRenderer(tokenizer=chat_tokenizer(template))._by_outline(messages)
    assert [text[start:stop] for start, stop in spans] == expected


def test_an_answer_may_begin_the_text_with_what_the_tokenizer_drops() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "hi": 1, "you": 2}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()  # drops control characters
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    renderer = ChatRenderer(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core))
    talk = conversation("", "\x01hi you")
    rendered = renderer(Conversation(messages=talk.messages, plain=("", "\x01hi you")))
    assert rendered.tokens.tolist() == [1, 2]
    assert rendered.is_target.all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_that_are_refused_leave_the_others_of_their_batch(name: str) -> None:
    """One by the template, one before it; what is kept is what each gives by itself."""
    short = "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}"
    renderer = ChatRenderer(tokenizer=chat_tokenizer(short + TEMPLATES[name]))
    given = [*TALKS, conversation("a <|im_end|>", "b"), TALKS[0]]
    for talks in (given, [*TALKS[:1], *given[3:]]):
        refused: dict[Conversation, RenderError] = {}
        kept = list(renderer.render(talks, refused.__setitem__))
        reasons = ["spells the special token"]
        if len(talks) > 3:
            reasons = ["too long", "too long", *reasons]
        for error, reason in zip(refused.values(), reasons, strict=True):
            assert reason in str(error)
        assert [talk for talk, _ in kept] == [TALKS[0], TALKS[0]]
        for talk, rendered in kept:
            alone = renderer(talk)
            assert rendered.encoded.text == alone.encoded.text
            assert rendered.tokens.tolist() == alone.tokens.tolist()
            assert rendered.is_target.tolist() == alone.is_target.tolist()


def test_the_last_answer_or_all_tokens_can_be_the_targets() -> None:
    tokenizer = chat_tokenizer(CHATML)
    last = ChatRenderer(tokenizer=tokenizer, train_on="last_answer")(TALKS[1])
    assert tokenizer.decode(last.tokens[last.is_target]) == "nein  <|im_end|>"
    everything = ChatRenderer(tokenizer=tokenizer, train_on="all")(TALKS[1])
    assert everything.is_target.all()


def weighted(*weights: float | None) -> Conversation:
    """Answers "a0", "a1", ... of these weights."""
    messages: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        messages += [user(f"q{number}"), {**assistant(f"a{number}"), "weight": weight}]
    return FORMATS["messages"].read({"messages": messages})


@pytest.mark.parametrize("name", ["chatml", "tagged"])
def test_an_answer_of_weight_0_is_context(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])

    def learnt(talk: Conversation, train_on: TrainOn = "answers") -> str:
        rendered = ChatRenderer(tokenizer=tokenizer, train_on=train_on)(talk)
        plain = conversation(*(message.content for message in talk.messages))
        everything = ChatRenderer(tokenizer=tokenizer)(plain).tokens
        assert rendered.tokens.tolist() == everything.tolist()
        return str(tokenizer.decode(rendered.tokens[rendered.is_target]))

    assert learnt(weighted(1, 0, None)) == "a0<|im_end|>a2<|im_end|>"
    assert learnt(weighted(0, 1)) == "a1<|im_end|>"
    assert learnt(weighted(1, 0)) == "a0<|im_end|>"
    assert learnt(weighted(0, 1.0), "last_answer") == "a1<|im_end|>"
    whole = tokenizer.decode(ChatRenderer(tokenizer=tokenizer)(weighted(1, 1)).tokens)
    assert learnt(weighted(0, 1), "all") == whole.replace("a0<|im_end|>", "")
    for train_on in ("last_answer", "all"):
        with pytest.raises(RenderError, match=f"weight 0, and train_on {train_on} goes up to"):
            learnt(weighted(1, 0), train_on)
    with pytest.raises(RenderError, match=r"marks 4 parts of 2 answers"):
        ChatRenderer(tokenizer=chat_tokenizer(TAGGED_TWICE))(weighted(0, 1))
    documents = ChatDocuments(
        tokenizer=tokenizer,
        options=ChatOptions(dataset_format="messages"),
        max_length=512,
        dropped=Counter(),
    )
    (_, ends), *_ = documents.of([weighted(1, 0)], lambda bad: None)
    assert tokenizer.decode(ends.tokens).endswith("a0<|im_end|>[EOS]")
    # A prompt that goes on from there: blocks start at the edges of answers that were learnt.
    encoder = PromptEncoder(tokenizer=tokenizer)
    messages = [user("q0"), {**assistant("a0"), "weight": 0}, user("q1"), assistant("a1")]
    ids = encoder([*messages, user("q2")])
    marked = np.array(ids)[encoder.answers_in([*messages, user("q2")], ids)]
    assert tokenizer.decode(marked) == "a1<|im_end|>"
    # How far answers are filled up, by their messages, does not depend on weights.
    assert repr(weighted(1, 0).messages) == repr(conversation("q0", "a0", "q1", "a1").messages)


def test_a_template_that_rewrites_earlier_turns_takes_last_answers_alone() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    talk = conversation("a", "hm>b", "c", "ha>d")
    with pytest.raises(RenderError, match=r"before message 1 when later.*last_answer.*generation"):
        ChatRenderer(tokenizer=tokenizer)(talk)
    rendered = ChatRenderer(tokenizer=tokenizer, train_on="last_answer")(talk)
    assert tokenizer.decode(rendered.tokens[rendered.is_target]) == "ha>d<|im_end|>"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%-  generation -%}", "{%+\tgeneration %}"])
def test_a_template_may_write_its_tags_with_any_blanks(tag: str) -> None:
    answer = "{{ m.content.split('>')[-1] }}"
    marked = FORGETFUL.replace(answer, f"{tag}{answer}{{% endgeneration %}}")
    tokenizer = chat_tokenizer(marked)
    rendered = ChatRenderer(tokenizer=tokenizer)(conversation("a", "hm>b", "c", "ha>d"))
    assert tokenizer.decode(rendered.tokens[rendered.is_target]) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        ("{{ raise_exception('no system here') }}", TALKS[0], "refuses it.*no system here"),
        ("{{ messages[0].content.nothing() }}", TALKS[0], "the chat template refuses it"),
        ("", TALKS[1], "more than one turn needs a chat template"),
        ("{% if false %}{{ messages }}{% endif %}", TALKS[0], "renders to nothing"),
        (CHATML, conversation("a <|im_end|>", "b"), "message 0 spells .*'<|im_end|>'"),
        (CHATML, conversation("a", "[EOS]"), "message 1 spells .*EOS"),
    ],
)
def test_what_cannot_be_rendered_says_why(template: str, talk: Conversation, says: str) -> None:
    with pytest.raises(RenderError, match=says):
        ChatRenderer(tokenizer=chat_tokenizer(template))(talk)


def test_a_tokenizer_without_a_template_takes_single_turns_alone() -> None:
    renderer = ChatRenderer(tokenizer=chat_tokenizer(None))
    with pytest.raises(InputError, match=r"dataset_format messages: .* no chat template; give one"):
        renderer.check("messages")
    renderer.check("alpaca")
    row = {"prompt": "1 + 1 = ", "completion": "2"}
    rendered = renderer(FORMATS["prompt_completion"].read(row))
    assert renderer.tokenizer.decode(rendered.tokens) == "1 + 1 = 2"
    assert rendered.is_target.tolist() == [False] * 8 + [True]
    alpaca = FORMATS["alpaca"].read({"instruction": "Add.", "input": "1, 2", "output": "3"})
    text = renderer.tokenizer.decode(renderer(alpaca).tokens)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3")
    broken = ChatRenderer(tokenizer=chat_tokenizer("{% for m in messages %}"))
    with pytest.raises(InputError, match=r"chat template cannot be used: .*refuses it"):
        broken.check("messages")


# Formats

SAID = conversation("Hi", "Hello")
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "user", "content": [{"type": "text", "text": "never answered"}]},
            ]
        },
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "conversations": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"role": "gpt", "content": "Hello"}]},
    ],
    "prompt_completion": [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": None, "response": "Hello"},
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "answer": [{"role": "assistant", "content": "Hello"}],
        },
    ],
    "alpaca": [{"instruction": "Hi", "input": "", "output": "Hello"}],
}


@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows]
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "datasets"])
def test_each_format_is_found_in_each_kind_of_file(
    name: str, row: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    if kind == "csv" and not all(isinstance(value, str) for value in row.values()):
        pytest.skip("a field of csv is a text")
    path = write(tmp_path, kind, [{"id": "x", **row}] * 2)
    source = {"dataset_name": kind, "data_files": [path]}
    config = PreprocessConfig.model_validate(
        {"dataset_name": path} if kind == "datasets" else source
    )
    assert find_dataset_format(config) == name
    (partition,) = plan_partitions(config)
    found = list(read_conversations(partition))
    assert [item.messages for item in found if isinstance(item, Conversation)] == [
        SAID.messages
    ] * 2


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        folder = folder / "data"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        return str(folder / "train.parquet" if kind == "parquet" else folder)
    return str(path)


def test_a_text_column_that_is_there_or_named_means_text(tmp_path: Path) -> None:
    row = {"text": "a", "prompt": "b", "completion": "c"}
    files = {"dataset_name": "jsonl", "data_files": [write(tmp_path, "jsonl", [row])]}

    def found(**fields: str) -> str:
        return find_dataset_format(PreprocessConfig.model_validate({**files, **fields}))

    assert found() == "text"
    assert found(text_column="prompt") == "text"
    assert found(dataset_format="prompt_completion") == "prompt_completion"
    with pytest.raises(InputError, match=r"messages needs the columns 'messages', but .*'prompt'"):
        found(dataset_format="messages")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "datasets"])
def test_columns_of_no_format_are_told_what_the_formats_need(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind, [{"question": "a", "answer": "b"}])
    source = {"dataset_name": kind, "data_files": [path]}
    config = PreprocessConfig.model_validate(
        {"dataset_name": path} if kind == "datasets" else source
    )
    needs = (
        "set text_column to one of those there: 'question', 'answer'; or, to train on "
        "conversations, give them the columns of a chat format: messages ('messages'); sharegpt "
        "('conversations'); prompt_completion ('prompt', 'completion' or 'response' or 'output' or "
        "'answer'); alpaca ('instruction', 'output')"
    )
    with pytest.raises(InputError, match=re.escape(needs) + "$"):
        _ = [list(read_documents(partition)) for partition in plan_partitions(config)]


def user(content: Any = "a") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "b") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([user()], "no message of the assistant"),
        ([], "a list of at least one message"),
        ([user(), assistant(" ")], "message 1 is an empty answer"),
        ([user(), user(), assistant()], "message 1 has the role user, but assistant is expected"),
        ([assistant(), user()], "message 0 has the role assistant, but user is expected"),
        (
            [user(), {"role": "system", "content": "s"}, assistant()],
            "message 1 has the role system",
        ),
        ([user(), {"role": "tool", "content": "s"}], r"messages\[1\]: role must be one of .* tool"),
        ([user(), {**assistant(), "tool_calls": '[{"name": "f"}]'}], "has tool_calls"),
        (
            [user(), {**assistant("Let me look."), "tool_calls": [{"function": {"name": "f"}}]}],
            r"messages\[1\] has tool_calls, .*write the call into the text of content",
        ),
        ([user(), {**assistant(None), "function_call": {"name": "f"}}], "has function_call"),
        ('[{"role": "user"}]', "is a text, .*, not a list of messages; .*fromjson"),
        ([user(3), assistant()], r"messages\[0\].content must be a text, got 3"),
        ([user([{"type": "image"}]), assistant()], r"content\[0\] must be a part of text"),
        ([user("\ud800"), assistant()], "not valid Unicode"),
        ([user(), {**assistant(), "weight": 0.5}], r"messages\[1\].weight must be 0, .*got 0.5"),
        ([user(), {**assistant(), "weight": 0}], "every answer has weight 0"),
        (None, "a list of at least one message"),
        (["a"], r"messages\[0\] must be an object"),
    ],
)
def test_a_row_of_no_use_is_named_with_its_reason(messages: Any, says: str, tmp_path: Path) -> None:
    good = {"messages": [user(), assistant()]}
    stats, _ = packed(tmp_path, [good, {"messages": messages}], max_errors=1)
    assert stats.errors is not None
    (error,) = map(json.loads, (tmp_path / "out" / stats.errors.path).read_text().splitlines())
    assert error["place"].endswith("a.jsonl:2")
    assert re.search(says, error["reason"]), error["reason"]
    assert stats.shards["train"].documents == 1


@pytest.mark.parametrize(
    "fields",
    [
        *({"tool_calls": empty} for empty in (None, [], "[]", " null", "", [{"function": None}])),
        {"function_call": {"name": None, "arguments": None}},
    ],
)
def test_a_message_without_a_call_is_used_however_that_is_written(fields: Any) -> None:
    """As files have it whose other messages call something."""
    talk = FORMATS["messages"].read({"messages": [user(), {**assistant(), **fields}]})
    assert talk.messages == conversation("a", "b").messages


def test_a_weight_is_read_of_answers_alone() -> None:
    row = {"messages": [{**user(), "weight": 0.5}, {**assistant(), "weight": 1}]}
    assert FORMATS["messages"].read(row).messages == conversation("a", "b").messages


def test_a_message_is_refused_by_the_names_of_its_own_fields() -> None:
    read = FORMATS["sharegpt"].read
    with pytest.raises(ValueError, match=r"^conversations\[0\]: role must be .*, got tool$"):
        read({"conversations": [{"role": "tool", "content": "a"}]})
    with pytest.raises(ValueError, match=r"^conversations\[0\].content must be a text, got 3$"):
        read({"conversations": [{"role": "user", "content": 3}]})
    with pytest.raises(ValueError, match=r"^conversations\[0\]: from must be .*, got null$"):
        read({"conversations": [{"value": "a"}]})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "\ud800", "completion": "b"}, "^prompt is not valid Unicode"),
        ({"prompt": "a", "completion": "\udc80b"}, "^completion is not valid Unicode"),
        ({"prompt": [user()], "completion": "\ud800"}, "^completion is not valid Unicode"),
    ],
)
def test_a_prompt_or_completion_that_no_file_can_hold_is_refused(
    row: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        FORMATS["prompt_completion"].read(row)


# Rows


def packed(
    folder: Path, rows: list[dict[str, Any]], *, max_length: int = 64, **options: Any
) -> tuple[PartitionStats, Path]:
    """Rows of messages, tokenized as bytes with CHATML, in shards."""
    path = write(folder, "jsonl", rows)
    config = PreprocessConfig(dataset_name="jsonl", data_files=[path], max_length=max_length)
    (partition,) = plan_partitions(config)
    max_errors = options.pop("max_errors", 0)
    stats = preprocess_partition(
        partition,
        tokenizer=chat_tokenizer(CHATML),
        max_length=max_length,
        heldout_fraction=0.0,
        output_dir=folder / "out",
        max_errors=max_errors,
        chats=ChatOptions(dataset_format="messages", **options),
    )
    return stats, folder / "out"


def test_conversations_stay_whole_and_end_with_their_last_answer(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    eos = tokenizer.eos_token_id
    talks = [[user("q" * n), assistant("a" * (n % 7 + 1))] for n in range(1, 25)]
    stats, folder = packed(tmp_path, [{"messages": talk} for talk in talks])
    table = pq.read_table(folder / stats.shards["train"].path).to_pylist()
    documents, num_bytes = [], 0
    for row in table:
        assert len(row["tokens"]) == len(row["is_target"]) <= 64
        stops = np.cumsum(row["document_lengths"]).tolist()
        assert stops[-1] == len(row["tokens"])
        for start, stop in zip([0, *stops], stops, strict=False):
            documents.append((row["tokens"][start:stop], row["is_target"][start:stop]))
        num_bytes += row["num_bytes"]
    expected = []
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
        answer = len(talk[1]["content"]) + 1
        ids = [*ids[:-1], eos]  # the line end behind the turn's end is nobody's context
        expected.append((ids, [False] * (len(ids) - answer - 1) + [True] * (answer + 1)))
    assert sorted(documents) == sorted(expected)
    assert num_bytes == sum(len(talk[1]["content"]) for talk in talks)


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_one_longer_than_a_row_is_cut_at_its_end_or_dropped_and_counted(
    too_long: str, tmp_path: Path
) -> None:
    rows = [
        {"messages": [user("a"), assistant("b" * 90)]},
        {"messages": [user("a" * 90), assistant("b")]},  # cut, it would have no answer
        {"messages": [user("a"), assistant("b")]},
    ]
    stats, folder = packed(tmp_path, rows, too_long=too_long)
    cut, dropped = (1, 1) if too_long == "cut" else (0, 2)
    assert (stats.cut, stats.dropped_too_long) == (cut, dropped)
    table = pq.read_table(folder / stats.shards["train"].path)
    documents = {
        len(row["tokens"]): np.array(row["is_target"]).nonzero()[0].tolist()
        for row in table.to_pylist()
    }
    targets = {23: [20, 21, 22], 64: list(range(20, 64))}  # of the answer, however it ends
    assert documents == {length: targets[length] for length in [23, 64][: 1 + cut]}
    num_bytes = {len(row["tokens"]): row["num_bytes"] for row in table.to_pylist()}
    assert num_bytes == {length: {23: 1, 64: 44}[length] for length in documents}  # b's that stay


def documents_at(max_length: int, *talks: Conversation, **fields: Any) -> list[tuple[int, int]]:
    """(length, filling) of the documents of conversations; each is refused that is not kept."""
    tokenizer = chat_tokenizer(fields.pop("template", CHATML))
    options = ChatOptions(dataset_format="messages", **fields)
    dropped: Counter[str] = Counter()
    documents = ChatDocuments(
        tokenizer=tokenizer, options=options, max_length=max_length, dropped=dropped
    )
    refused: list[Any] = []
    found: list[tuple[int, int]] = []
    for _, part in documents.of(talks, refused.append):
        assert part.num_filler is not None
        found += zip(part.lengths.tolist(), part.num_filler.tolist(), strict=True)
    assert len(found) + len(refused) + dropped["too long"] == len(talks)
    assert not dropped["cut"]
    return found


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_one_that_fills_a_row_to_its_end_is_not_too_long(too_long: Any) -> None:
    talks = (conversation("a", "b"), conversation("a <|im_end|>", "b"))
    assert documents_at(23, *talks, too_long=too_long) == [(23, 0)]
    assert documents_at(22, *talks, too_long="drop") == []


def test_eos_is_not_written_twice() -> None:
    eos = chat_tokenizer(None).eos_token
    ended = CHATML.replace("<|im_end|>\n{% endfor %}", eos + "{% endfor %}")
    assert eos in ended
    assert documents_at(64, conversation("a", "b"), template=ended) == [(21, 0)]


def test_an_answer_is_filled_up_between_its_length_and_what_is_left_of_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the middle of what is drawn, to the geometric mean: of 10 and 250 tokens, that is 50; and
    of all tokens and four times as many, where all are targets.
    """
    middle = SimpleNamespace(digest=lambda: (2**63).to_bytes(8, "big"))
    monkeypatch.setattr("hashlib.blake2b", lambda *given, **fields: middle)
    talk = conversation("a", "bcdefghi")
    ((length, _),) = documents_at(512, talk)
    room = length - 10 + 250
    assert documents_at(room, talk, fills_answers=True) == [(length + 40, 40)]
    ((length, _),) = documents_at(512, talk, train_on="all")
    filled = documents_at(4 * length, talk, fills_answers=True, train_on="all")
    assert filled == [(2 * length, length)]


def test_answers_are_filled_up_to_a_drawn_length(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    options = ChatOptions(dataset_format="messages", fills_answers=True)
    documents = ChatDocuments(
        tokenizer=tokenizer, options=options, max_length=512, dropped=Counter()
    )
    talks = [conversation(f"{n}", "abcdefgh") for n in range(2000)]
    parts = [tokens for _, tokens in documents.of(talks, lambda bad: None)]
    assert all((part.num_bytes == len("abcdefgh")).all() for part in parts)
    fillers = np.concatenate([part.num_filler for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    for part in parts:
        assert part.is_target is not None
        assert part.num_filler is not None
        stops = np.cumsum(part.lengths)
        for stop, filler in zip(stops, part.num_filler, strict=True):
            assert (part.tokens[stop - filler - 1 : stop] == tokenizer.eos_token_id).all()
            assert part.is_target[stop - filler - 1 : stop].all()
    assert lengths.max() <= 512
    # Log-uniform between 10 tokens, the answer with its two ends, and what is left of 512.
    most = 512 - (lengths - fillers - 10)
    level = np.log((fillers + 10) / 10) / np.log(most / 10)
    assert abs(level.mean() - 0.5) < 0.03
    assert abs((level < 0.25).mean() - 0.25) < 0.04
    again = [tokens for _, tokens in documents.of(reversed(talks), lambda bad: None)]
    assert sorted(np.concatenate([part.num_filler for part in again])) == sorted(fillers)


def documents_of(lengths: np.ndarray, first: int = 0) -> TokenizedDocuments:
    """Documents whose tokens all are their number."""
    tokens = np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths)
    return TokenizedDocuments(
        tokens=tokens,
        num_bytes=lengths,
        lengths=lengths,
        is_target=tokens % 2 == 0,
        num_filler=lengths % 3,
    )


def test_fitting_loses_nothing_and_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 0.8, 12_000).astype(np.int64), 3, 512)
    fitter, rows = Fitter(512, 64), []
    for at in range(0, len(lengths), 50):
        if (full := fitter.add(documents_of(lengths[at : at + 50], first=at))) is not None:
            assert len(full) % 64 == 0
            rows.append(full)
    filled = np.concatenate([part.row_lengths for part in rows])
    assert filled.mean() > 0.99 * 512
    last = fitter.flush()
    assert last is not None
    rows.append(last)
    seen: Counter[int] = Counter()
    for part in rows:
        check(part, lengths)
        seen.update(part.tokens.tolist())
    assert seen == dict(enumerate(lengths.tolist()))


def check(part: PackedRows, lengths: np.ndarray) -> None:
    assert part.is_target is not None
    assert part.num_filler is not None
    starts = np.cumsum(part.document_lengths) - part.document_lengths
    numbers = part.tokens[starts]  # of each document
    assert (part.document_lengths == lengths[numbers]).all()
    assert (part.tokens == np.repeat(numbers, part.document_lengths)).all()
    assert (part.is_target == (part.tokens % 2 == 0)).all()
    of_row = np.repeat(np.arange(len(part)), part.documents_per_row)
    sums = np.bincount(of_row, weights=part.document_lengths)
    assert (sums == part.row_lengths).all()
    assert sums.max() <= 512
    assert (np.bincount(of_row, weights=lengths[numbers] % 3) == part.num_filler).all()
    assert (part.num_bytes == part.row_lengths).all()


def test_rows_are_handed_out_as_soon_as_there_are_four_rounds_of_them() -> None:
    """And all that are 97 % full or more, in whole rounds; one round where none is."""

    def handed_out(*lengths: int, rows_at_once: int) -> list[int]:
        fitter = Fitter(100, rows_at_once)
        *before, last = (documents_of(np.array([length])) for length in lengths)
        assert [fitter.add(part) for part in before] == [None] * len(before)
        rows = fitter.add(last)
        return [] if rows is None else rows.row_lengths.tolist()

    assert handed_out(97, 97, 97, 97, 12, rows_at_once=1) == [97] * 4
    assert handed_out(97, 97, 97, 97, 11, rows_at_once=1) == []
    assert handed_out(96, 96, 96, 96, 96, rows_at_once=1) == [96]
    assert handed_out(*[97] * 7, *[60] * 2, 1, rows_at_once=2) == [98, *[97] * 5]


@pytest.mark.parametrize("lengths", [[], [1], [60, 60, 60]])
def test_all_that_waits_is_handed_out_at_the_end(lengths: list[int]) -> None:
    fitter = Fitter(100, 1)
    for length in lengths:
        assert fitter.add(documents_of(np.array([length]))) is None
    rows = fitter.flush()
    assert ([] if rows is None else rows.row_lengths.tolist()) == lengths
    assert fitter.flush() is None


def test_fit_is_best_fit() -> None:
    """Against the definition: the fullest row that has room, by looking at all of them."""
    lengths = np.random.default_rng(1).integers(1, 40, size=300)
    rows: list[list[int]] = []
    for document in np.argsort(-lengths, kind="stable").tolist():
        left = [40 - lengths[row].sum() for row in rows]
        fitting = [(room, index) for index, room in enumerate(left) if room >= lengths[document]]
        if fitting:
            rows[min(fitting)[1]].append(document)
        else:
            rows.append([document])
    assert sorted(fit(lengths, 40)) == sorted(rows)


def test_shards_are_read_with_their_targets(tmp_path: Path) -> None:
    from tokendiff.artifacts.manifest import commit

    stats, folder = packed(tmp_path, [{"messages": [user(), assistant("bc")]}])
    shard = stats.shards["train"]
    splits = {"train": {"rows": 1, "files": [{"path": shard.path, "row_groups": [1]}]}}
    metadata = {"splits": splits, "max_length": 64, "isolate_documents": True}
    commit(folder, kind="tokens", metadata=metadata)
    data = TokenData.open(folder, split="train")
    batch = data.read_group(0).batch()
    assert batch.isolates_documents
    assert batch.is_target.sum() == 4  # two bytes, and the ends of turn and document
    assert batch.is_target[0, : batch.is_valid.sum()].tolist()[-4:] == [True] * 4


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(CHATML)
    assert read_template(str(tmp_path / "a.jinja")) == CHATML
    with pytest.raises(InputError, match=r"chat_template .*b.jinja: cannot be read"):
        read_template(str(tmp_path / "b.jinja"))
