"""Files that are made to do harm, or were damaged: templates that are programs, names that lead
elsewhere, lines and row groups without end, bits that are not what they were.
"""

import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.manifest import MANIFEST_NAME, commit, fingerprint, load_manifest
from tokendiff.data import lines, rows
from tokendiff.data.chats import Conversation, Message
from tokendiff.data.files import find_files
from tokendiff.data.prompt_index import PromptFile
from tokendiff.data.prompts import PromptEncoder
from tokendiff.data.rows import TokenData
from tokendiff.data.templates import ChatRenderer, RenderError
from tokendiff.errors import CorruptFileError, InputError

# The usual ways out of a template, and programs that fail in ways of their own.
TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch PLACE').read() }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}",
    "format": "{{ '{0.__class__.__init__}'.format(messages) }}{{ ().__class__.__bases__[0].x }}",
    "namespace": "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
    "attr": "{{ (messages|attr('__class__'))|attr('__base__')|attr('__subclasses__')() }}",
    "change": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "zero": "{{ 1 / 0 }}",
    "index": "{{ messages[99].role.x }}",
    "attribute": "{{ messages.nothing() }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_reaches_nothing_and_fails_as_a_template(tmp_path: Path, name: str) -> None:
    place = tmp_path / "reached"
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATES[name].replace("PLACE", str(place))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    with pytest.raises(InputError, match="the chat template of the checkpoint refuses them"):
        PromptEncoder(tokenizer=tokenizer)(messages)
    talk = Conversation(messages=(Message(role="user", content="a"),))
    with pytest.raises(RenderError, match="the chat template refuses it"):
        ChatRenderer(tokenizer=tokenizer, train_on="all")(talk)
    assert not place.exists()
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/..", "", "a\\b", "a\0b"],
)
def test_a_manifest_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    """By whoever can make a folder, digest and all."""
    body: dict[str, Any] = {"format": 1, "kind": "tokens", "metadata": {}}
    entry = {"size": 1, "sha256": "0" * 64}
    for files in ({name: entry}, {"a": entry, name: entry}):
        text = json.dumps({**body, "files": files, "digest": fingerprint({**body, "files": files})})
        (tmp_path / MANIFEST_NAME).write_text(text)
        with pytest.raises(CorruptFileError, match="is not the name of a file in the folder"):
            load_manifest(tmp_path)


@pytest.mark.parametrize("entry", [{}, [], None, {"size": "1", "sha256": "0" * 64}, {"size": 1}])
def test_a_manifest_says_size_and_hash(tmp_path: Path, entry: Any) -> None:
    body = {"format": 1, "kind": "tokens", "metadata": {}, "files": {"a": entry}}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**body, "digest": fingerprint(body)}))
    with pytest.raises(CorruptFileError, match="not a manifest"):
        load_manifest(tmp_path)


def test_a_line_without_end_is_refused_before_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a few bytes on disk are very many."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * (4 << 20)))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(lines.lines_in, "__kwdefaults__", {"max_bytes": 1 << 20})
    with pytest.raises(InputError, match=r"bomb.jsonl.gz: .*a line is longer than 1,048,576 bytes"):
        PromptFile.index(str(path))
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 1000 + b'"}\n' * 2))
    assert PromptFile.index(str(path)).num_prompts == 2


def test_a_row_group_that_memory_would_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = token_folder(
        tmp_path / "data",
        files=[[[4] * 500] * 8],  # far fewer bytes in the file than in memory
        max_length=500,
        tokenizer=letter_tokenizer(),
    )
    data = TokenData.open(folder, split="train")
    monkeypatch.setattr(rows, "_MAX_GROUP_BYTES", 4 * 8 * 500 - 1)
    with pytest.raises(InputError, match=r"row group 0 of \S+ has 8 rows of 500"):
        data.read_group(0)
    monkeypatch.undo()
    assert len(data.read_group(0)) == 8


@pytest.mark.slow
def test_a_flipped_bit_of_a_shard_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Also in the footer, which has no checksum: a column that is called otherwise is not taken for
    one that text does not have.
    """
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(24, 12)],
        max_length=12,
        tokenizer=letter_tokenizer(),
    )
    (path,) = (folder / "train").iterdir()
    table = pq.read_table(path)
    targets = pa.array([[place > 4 for place in range(12)]] * 24)
    table = table.append_column("is_target", targets)
    table = table.append_column("num_filler", pa.array([0] * 24, pa.int32()))
    pq.write_table(table, path, row_group_size=16, write_page_checksum=True)
    metadata = load_manifest(folder).metadata
    (folder / MANIFEST_NAME).unlink()
    commit(folder, kind="tokens", metadata=metadata)
    data = TokenData.open(folder, split="train")
    sound, expected = path.read_bytes(), [vars(data.read_group(group)) for group in range(2)]
    bits = random.Random(0).sample(range(8 * len(sound)), 1000)
    for name in (b"is_target", b"num_filler"):
        for found in re.finditer(name, sound):
            bits += range(8 * found.start(), 8 * found.end())
    outcomes = Counter[str]()
    for bit in bits:
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            for group, whole in enumerate(expected):
                for field, value in vars(data.read_group(group)).items():
                    np.testing.assert_array_equal(value, whole[field])
        except CorruptFileError:
            outcomes["found"] += 1
        else:
            outcomes["changes nothing"] += 1
    assert min(outcomes["found"], outcomes["changes nothing"]) > 100


def test_a_file_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    """Its identity goes into keys and manifests, which are UTF-8."""
    (tmp_path / "a.txt").write_text("text")
    try:
        (tmp_path / os.fsdecode(b"b\xff.txt")).write_text("text")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(InputError, match=r"b\\xff\.txt' is not UTF-8; rename the file") as caught:
        find_files([f"{tmp_path}/*.txt"])
    str(caught.value).encode()
    with pytest.raises(InputError, match=r"^data_files .*can't encode"):
        find_files([f"file://{tmp_path}/*.txt"])
