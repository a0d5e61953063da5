"""The commands of the tutorial and of some how-to pages, one behind the other as they are written,
and those of the published examples that the pages do not have, in our spelling. Models and text of
the hub are folders made here, built-in models are the smallest, and training ends after a few
steps of few rows; nothing else is changed. `tests.docs.test_blocks` validates the blocks of all
other pages.

What Ray would start a process for is done in this one; see `tests.in_this_process`.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, generate, pipeline, preprocess, train
from tests import ROOT
from tests.builders import tiny_causal
from tests.docs.blocks import Block, blocks_in, words_of
from tests.models import published
from tests.models.diffusion_gemma import diffusion_gemma
from tokendiff.artifacts.locations import RemotePath, files_under, upload
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import new_draft_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]

MAIN = {
    "jobs.evaluate": evaluate.main,
    "jobs.generate": generate.main,
    "jobs.pipeline": pipeline.main,
    "jobs.preprocess": preprocess.main,
    "jobs.train": train.main,
}
# What the README of the published examples does besides. Its run on random tokens replaces the one
# before it; here a run may only go on, so it gets a folder of its own.
PUBLISHED = Block(
    language="bash",
    text="""
python -m jobs.train --objective block_refinement --model_name_or_path Qwen/Qwen2.5-0.5B \\
    --output_dir qwen-dummy-output --use_dummy_data --num_dummy_samples 2048 \\
    --attention_mask_mode 2d
python -m jobs.generate --checkpoint_path qwen-dummy-output/final --sampler block_refinement \\
    --prompt "Write a short paragraph about diffusion models." --gen_length 128
""",
)
FEW_STEPS = {
    "jobs.train": [
        *("--max_train_steps", "2", "--num_workers", "1"),
        *("--per_device_train_batch_size", "2"),
    ],
}
# Stages side by side are processes of their own, which would start Ray.
HERE = {"jobs.train": ["--num_workers", "1"], "jobs.pipeline": ["-o", "runner.max_parallel=1"]}
# Pages whose commands run, those that need what others make behind them.
CHAINS = [
    ["objectives.md", "batch-generation.md", "notebook.md"],
    ["published-models.md", "instruction-tuning.md"],
    ["self-speculation.md", "drafts.md"],
]
TEXT = (ROOT / "LICENSE").read_text().split("\n\n")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_causal(folder: Path, model_type: str, *, num_layers: int, mask: str | None = None) -> Any:
    """A causal model with the kind of tokenizer that Qwen has: no mask token, and an embedding that
    is padded beyond it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([mask] if mask else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = tiny_causal(
        model_type,
        **{**sizes, "num_key_value_heads": 1, "num_hidden_layers": num_layers},
        vocab_size=320,
        max_position_embeddings=1024,
        eos_token_id=wrapped.eos_token_id,
    )
    model.float().save_pretrained(folder)
    return model.config


def save_encoder(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token")}
    specials |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(specials.values()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    wrapped.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(wrapped),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=wrapped.pad_token_id,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def save_draft(folder: Path, target: Path, target_config: Any, *, mask_token_id: int) -> None:
    config = new_draft_config(
        target_config,
        target_model_id=str(target),
        num_layers=1,
        block_size=16,
        mask_token_id=mask_token_id,
    )
    DFlashDraftModel(config).save_pretrained(folder)


def save_denoisers(llada: Path, llada2: Sequence[Path], dream: Path, gemma: Path) -> None:
    """Published denoisers beside the kind of tokenizer that they have, which names no mask."""
    sizes: dict[str, Any] = {"vocab_size": 320, "mask_token_id": 3}
    published.llada(llada, **sizes, embedding_size=320, max_sequence_length=2048)
    published.dream(dream, **sizes, max_position_embeddings=2048)
    text = {"vocab_size": 320, "max_position_embeddings": 2048, "eos_token_id": 2}
    diffusion_gemma(gemma, canvas_length=32, text_config=text)
    for folder in llada2:
        published.llada2(folder, **sizes, max_position_embeddings=2048)
    named = [(folder, "<|mask|>") for folder in (*llada2, dream)]
    for folder, mask in ((llada, "<|mdm_mask|>"), (gemma, "<mask>"), *named):
        beside = folder / "tokenizer"
        save_causal(beside, "qwen2", num_layers=1, mask=mask)
        for path in (*beside.glob("tokenizer*"), *beside.glob("chat_template*")):
            path.replace(folder / path.name)
        shutil.rmtree(beside)


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """What the pages name on the hub, and the folders that stand for it."""
    folders = {
        name: tmp_path / "hub" / name.replace("/", "--")
        for name in (
            *("bert-base-uncased", "wikitext", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-4B"),
            *("Qwen/Qwen3-8B", "JetLM/SDAR-1.7B-Chat", "z-lab/Qwen3-4B-DFlash-b16"),
            *("GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"),
            *("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-mini"),
            *("google/diffusiongemma-26B-A4B-it", "z-lab/Qwen3-8B-DFlash-b16"),
        )
    }
    save_encoder(folders["bert-base-uncased"])
    save_causal(folders["Qwen/Qwen2.5-0.5B"], "qwen2", num_layers=1)
    # A page begins a draft of five layers for the first.
    for size, num_layers in (("4B", 8), ("8B", 4)):
        target = folders[f"Qwen/Qwen3-{size}"]
        config = save_causal(target, "qwen3", num_layers=num_layers)
        draft = folders[f"z-lab/Qwen3-{size}-DFlash-b16"]
        save_draft(draft, target, config, mask_token_id=310)
    sdar = folders["JetLM/SDAR-1.7B-Chat"]
    save_causal(sdar, "qwen3", num_layers=1, mask="<|MASK|>")
    foreign = {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}
    config_path = sdar / "config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), **foreign}))
    save_denoisers(
        folders["GSAI-ML/LLaDA-8B-Instruct"],
        [folders[f"inclusionAI/LLaDA2.{version}-mini"] for version in (0, 1)],
        folders["Dream-org/Dream-v0-Instruct-7B"],
        folders["google/diffusiongemma-26B-A4B-it"],
    )
    wikitext = folders["wikitext"]
    wikitext.mkdir()
    pq.write_table(pa.table({"text": TEXT * 3}), wikitext / "train.parquet")
    (wikitext / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: train.parquet\n---\n"
    )
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def here(
    in_this_process: None, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with what the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").mkdir()
    for path in (ROOT / "pipelines").glob("*.yaml"):
        text = re.sub(r"(max_train_steps: )\d+", r"\g<1>4", path.read_text())
        text = re.sub(r"(lr_warmup_steps: )\d+", r"\g<1>0", text)
        for name in sorted(hub, key=len, reverse=True):
            text = re.sub(rf"(?<=: ){re.escape(name)}$", hub[name], text, flags=re.MULTILINE)
        small = re.sub("builtin:bert-(small|mini)", "builtin:bert-tiny", text)
        (tmp_path / "pipelines" / path.name).write_text(small)
    (tmp_path / "chats").mkdir()
    messages = [[{"role": "user", "content": "Which licence is this?"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "chats" / "one.parquet")
    talks = [(f"What is said {number}th?", text) for number, text in enumerate(TEXT * 4)]
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in talks
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Which licence is this?"}\n')
    (tmp_path / "docs" / "how-to").mkdir(parents=True)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "docs/how-to/serve.md"):
        (tmp_path / name).write_text((ROOT / name).read_text()[:8000])
    return tmp_path


def run(job: str, flags: list[str], hub: dict[str, str]) -> int:
    few = [] if "--help" in flags else FEW_STEPS.get(job, [])
    return MAIN[job]([*(hub.get(flag, flag) for flag in flags), *few])


@pytest.mark.parametrize("pages", CHAINS, ids=lambda pages: Path(pages[0]).stem)
def test_the_commands_of_how_to_pages_run_as_a_chain(
    here: Path, s3: str, hub: dict[str, str], pages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (RemotePath(s3) / "prompts" / "a.jsonl").write_bytes(b'{"prompt": "the work"}\n')
    texts = [(ROOT / "docs" / "how-to" / page).read_text() for page in pages]
    blocks = [block for text in texts for block in blocks_in(text)]
    if "objectives.md" in pages:
        blocks.append(PUBLISHED)
    chain = [words for block in blocks for words in words_of(block)]
    assert len(chain) >= 5
    for words in chain:
        if words[0] == "exec":
            exec(compile(words[1], "page", "exec"), {})
            continue
        job, flags = words[2], words[3:]
        if "s3://bucket/mdlm/final" in flags:
            final = here / "mdlm-output" / "final"
            upload(final, RemotePath(s3) / "mdlm" / "final", list(files_under(final)))
        status = run(job, flags, hub)
        output = capsys.readouterr()
        assert status == 0, f"{job} {shlex.join(flags)}\n{output.out[-2000:]}\n{output.err[-2000:]}"


def test_the_tutorial_runs(
    here: Path,
    hub: dict[str, str],
    load_served: Callable[[str, str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the first command to the answer of the promoted model, with a hundredth of the steps."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    page = re.sub(r"(max_train_steps[ =:]+)(\d+)00\b", r"\1\2", page)
    served = ""
    for block in blocks_in(page):
        if block.title:
            (here / block.title).write_text(block.text)
        for words in words_of(block):
            match words:
                case ["python", "-m", job, *flags]:
                    status = MAIN[job]([*flags, *HERE.get(job, [])])
                    output = capsys.readouterr()
                    # Step 5 says what 3 means: a longer run need not be better by chance.
                    allowed = (0, 3) if "train.max_train_steps=12" in flags else (0,)
                    assert status in allowed, f"{shlex.join(words)}\n{output.out}\n{output.err}"
                case ["mkdir" | "cp", *_]:
                    subprocess.run(" ".join(words), shell=True, check=True)
                case ["mlflow", "models", "serve", "-m", model, *_]:
                    served = model
                case ["curl", *_]:
                    body = words[words.index("-d") + 1]
                    texts = answers(load_served, served, body)
                    assert len(texts) == 1
                    assert texts[0].startswith("The mod")
    assert served == "models:/mine@champion"


def answers(load: Callable[[str, str], Any], model: str, body: str) -> list[str]:
    """What MLflow's server would answer, without the server."""
    from mlflow.pyfunc.scoring_server import invocations

    loaded = load("sqlite:///output/mlflow.db", model)
    answer = invocations(body, "application/json", loaded, loaded.metadata.get_input_schema())
    assert answer.status == 200
    return [row["text"] for row in json.loads(answer.response)["predictions"]]
