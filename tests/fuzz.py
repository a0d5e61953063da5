"""Inputs that nobody would write, by hypothesis: whatever a user's file holds, what comes of it is
a result, or an error of the package's own.

    python -m tests.fuzz --inputs 1000000 --seed 3

prints a line per reader and ends with exit code 1 where one raised anything else; the smallest
input that does is shown. `tests/test_fuzz.py` runs a few hundred.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests import ROOT
from tests.builders import letter_tokenizer
from tokendiff.artifacts.manifest import MANIFEST_NAME, fingerprint, verify
from tokendiff.artifacts.noise_process import SCHEDULER_CONFIG, NoiseProcess
from tokendiff.config import strict_yaml
from tokendiff.config.loader import load_config
from tokendiff.data.chats import FORMATS
from tokendiff.data.files import read_jsonl, read_lines
from tokendiff.data.partition import Piece
from tokendiff.data.prompt_index import PromptFile
from tokendiff.data.prompts import PromptEncoder
from tokendiff.data.templates import ChatRenderer, RenderError
from tokendiff.errors import CorruptFileError, InputError

OWN = (InputError, CorruptFileError)

# Any JSON: lone surrogates, huge numbers and deep nesting among it.
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(alphabet=st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010), max_size=3),
    st.sampled_from(["", "a", "user", "system", "\x00", "1e999", "../x", "{{ a }}", "\u202e"]),
)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), TEXTS),
    st.floats(),
    st.sampled_from([10**30, -1, 0, 2**63, 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, and with others."""
    return st.dictionaries(st.sampled_from(names) | TEXTS, VALUES, max_size=6)


def dumped(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """As JSON, whole or cut off, or with bytes in it that are none."""

    def text(value: Any, cut: int, spoilt: bytes) -> bytes:
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        at = cut % (len(data) + 1)
        return data if cut < 0 else data[:at] + spoilt + (data[at:] if cut % 2 else b"")

    return st.builds(text, values, st.integers(-40, 40), st.binary(max_size=3))


def lines_of(records: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    line = records | st.binary(max_size=20) | st.sampled_from([b"", b" ", b"[", b"[" * 3000])
    ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
    return st.builds(lambda parts, end: end.join(parts), st.lists(line, max_size=4), ends)


# What the readers make of one input


def read_config(folder: Path, data: bytes) -> None:
    path = folder / "a.yaml"
    path.write_bytes(data)
    load_config(path)


def read_override(folder: Path, text: str) -> None:
    strict_yaml.parse_value(text, source="-o")


def read_prompts(folder: Path, data: bytes) -> None:
    for name in ("a.jsonl", "a.txt"):
        (folder / name).write_bytes(data)
        file = PromptFile.index(str(folder / name))
        found = list(file.read(0, file.num_prompts)) if file.num_prompts else []
        assert len(found) == file.num_prompts
        for place, prompt in found:
            assert place.startswith(str(folder))
            if not isinstance(prompt, InputError):
                _encode(prompt)


_TOKENIZER = letter_tokenizer()
_TOKENIZER.chat_template = (
    "{% for m in messages %}{{ m.role }}{{ m.content.strip() }}{{ m['n'] }}{% endfor %}"
)


def _encode(prompt: Any) -> None:
    try:
        PromptEncoder(tokenizer=_TOKENIZER)(prompt)
    except InputError:
        return


def read_text(folder: Path, data: bytes) -> None:
    path = folder / "text.jsonl"
    path.write_bytes(data)
    piece = Piece(path=str(path), start=0, stop=len(data), num_bytes=len(data))
    list(read_lines(piece))
    list(read_jsonl(piece, "text"))


def read_chat(folder: Path, row: dict[str, Any]) -> None:
    renderer = ChatRenderer(tokenizer=_TOKENIZER)
    for form in FORMATS.values():
        if form.is_in(row):
            try:  # what a format raises makes a bad row
                renderer(form.read(row))
            except (ValueError, RenderError):
                continue


def read_scheduler_config(folder: Path, data: bytes) -> None:
    (folder / SCHEDULER_CONFIG).write_bytes(data)
    NoiseProcess.load(folder).describe()


def read_manifest(folder: Path, data: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(data)
    verify(folder)


def read_signed_manifest(folder: Path, body: dict[str, Any]) -> None:
    """With the digest that belongs to it."""
    try:
        digest = fingerprint(body)
    except UnicodeEncodeError:  # a lone surrogate, which no digest is of
        digest = ""
    text = json.dumps({**body, "digest": digest})
    read_manifest(folder, text.encode("utf-8", "surrogatepass"))


_SCHEDULERS = [
    {
        "_class_name": name,
        "forward_process": process,
        "alpha_schedule": "log_linear",
        "eps": 1e-3,
        "vocab_size": 16,
        "mask_token_id": 1,
        "max_length": 12,
        "prediction": "loo",
        **block,
    }
    for name, process, block in (
        ("TokenDiffusionScheduler", "absorbing", {}),
        ("TokenDiffusionScheduler", "uniform", {"exclude_mask_from_uniform": True}),
        ("HybridTokenDiffusionScheduler", "hybrid", {"p_uniform": 0.1, "gamma": 1.0}),
        ("BlockRefinementScheduler", "absorbing", {"block_length": 4, "attention_mask_mode": "4d"}),
    )
]
_SCHEDULER_NAMES = (
    *_SCHEDULERS[0],
    *("sigma_min", "sigma_max", "p_uniform", "gamma", "exclude_mask_from_uniform", "objective"),
    *("block_length", "block_start", "attention_mask_mode", "context_attention", "predict"),
    *("clean_context", "keeps_base"),
)
_CHANGED_SCHEDULERS = st.builds(
    lambda fields, changes: {**fields, **changes},
    st.sampled_from(_SCHEDULERS),
    st.dictionaries(st.sampled_from(_SCHEDULER_NAMES), VALUES, max_size=2),
)
_ENTRY = st.fixed_dictionaries({"size": VALUES, "sha256": VALUES}) | VALUES
_PIPELINES = [path.read_bytes() for path in sorted((ROOT / "pipelines").glob("*.yaml"))]
_YAML = [b"&a ", b"*a", b"!!python/object:os.system ", b"<<: ", b"? ", b"- ", b": ", b"\t", b"|\n"]
_YAML += [b"{", b"}", b"[", b"]", b"'", b'"', b"---\n", b"...\n", b"%YAML 9\n", b"1e999", b"0o9"]


def _spoilt(data: bytes, places: list[tuple[int, int, bytes]]) -> bytes:
    for at, size, piece in places:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + size :]
    return data


_PIECES = (
    st.sampled_from(_YAML)
    | st.binary(max_size=4)
    | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
)
_MESSAGES = st.lists(objects("role", "content", "from", "value", "name"), max_size=3) | VALUES
Target = tuple[st.SearchStrategy[Any], Callable[[Path, Any], None]]
TARGETS: dict[str, Target] = {
    "pipeline YAML": (
        st.builds(
            _spoilt,
            st.sampled_from(_PIPELINES),
            st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 30), _PIECES), max_size=4),
        ),
        read_config,
    ),
    "any YAML": (st.lists(_PIECES, max_size=8).map(b"".join), read_config),
    "overrides": (TEXTS | st.text(max_size=30), read_override),
    "prompts": (
        lines_of(
            dumped(st.fixed_dictionaries({"messages": _MESSAGES}) | objects("prompt", "messages"))
        ),
        read_prompts,
    ),
    "jsonl": (lines_of(dumped(objects("text"))), read_text),
    "chats": (
        st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys(("messages", "conversations", "prompt"), _MESSAGES),
                **dict.fromkeys(("completion", "response", "chosen"), _MESSAGES),
                **dict.fromkeys(("instruction", "input", "output"), VALUES),
            },
        ),
        read_chat,
    ),
    "scheduler_config": (
        _CHANGED_SCHEDULERS.map(lambda fields: json.dumps(fields).encode())
        | dumped(_CHANGED_SCHEDULERS | VALUES),
        read_scheduler_config,
    ),
    "manifest": (dumped(objects("format", "kind", "metadata", "files", "digest")), read_manifest),
    "signed manifest": (
        st.fixed_dictionaries(
            {
                "kind": VALUES,
                "metadata": VALUES,
                "files": st.dictionaries(TEXTS, _ENTRY, max_size=3) | st.just({}) | VALUES,
            }
        ),
        read_signed_manifest,
    ),
}


def run_target(name: str, *, inputs: int, start: int) -> int:
    """Give a reader so many inputs; returns how many it refused with an error of the package's own.

    Raises:
        Exception: whatever else it raises, for the smallest input found.
    """
    strategy, read = TARGETS[name]
    num_refused = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        @seed(start)
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def try_one(value: Any) -> None:
            nonlocal num_refused
            try:
                read(folder, value)
            except OWN:
                num_refused += 1

        try_one()
    return num_refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS), help="one reader, with all the inputs")
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(TARGETS)
    # Hypothesis keeps what it has seen of a run in memory, so that one run is no million inputs.
    most, failed = 5_000, []
    for name in names:
        left, num_refused, begun = -(-args.inputs // len(names)), 0, time.monotonic()
        number = 0
        while left > 0:
            inputs = min(left, most)
            try:
                num_refused += run_target(name, inputs=inputs, start=args.seed + number)
            except Exception as error:
                failed.append(name)
                print(f"{name}: seed {args.seed + number}: {type(error).__name__}: {error}")
                for note in getattr(error, "__notes__", []):
                    print(f"  {note}")
                break
            left, number = left - inputs, number + 1
        done = -(-args.inputs // len(names)) - max(left, 0)
        seconds = time.monotonic() - begun
        print(f"{name}: {done:,} inputs, {num_refused:,} refused, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
