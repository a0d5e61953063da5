"""The model card of `final/`: what was trained on what, and how to load it.

It is made from what decides the run and from nothing else, so a run that was resumed, or made again
elsewhere, leaves the same bytes: no path, no time, no name of a machine. A bound or samples that
later stages make stand in their report, not here: `final/` is committed before they run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokendiff.artifacts.checkpoint import BEST_STEP
from tokendiff.artifacts.locations import is_uri, local_path
from tokendiff.artifacts.model_folders import split_revision
from tokendiff.artifacts.noise_process import NoiseProcess

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LICENSE = re.compile(  # in the front matter alone
    r"\A---\n(?:(?!---$).*\n)*?license: *([A-Za-z0-9][\w.-]*) *\n(?:.*\n)*?---$", re.MULTILINE
)
_SETTINGS = ("learning_rate", "lr_scheduler", "rows_per_step", "mixed_precision", "seed")
_DRAFT_USE = """\
from tokendiff.models.dflash.model import DFlashDraftModel

draft = DFlashDraftModel.from_pretrained("PATH")"""
_DENOISER_USE = """\
from tokendiff.models.checkpoints import load_for_inference

denoiser, tokenizer, process = load_for_inference("PATH")"""
_OF_CHATS = (
    "It was trained on the answers of conversations. To ask it something, add "
    "`--use_chat_template --add_generation_prompt`, if its tokenizer has a chat template."
)
_CAUSAL_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""


def model_card(
    metadata: Mapping[str, Any], *, process: NoiseProcess | None, heldout: str | None
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        metadata: of the manifest: "run" (`run_identity`), "step", and the best step if there is
            one.
        process: of a model that decodes by diffusion; None for drafts and token by token models.
        heldout: what the best evaluation on held-out rows came to, in words.
    """
    run = metadata["run"]
    objective = run["objective"]
    name, is_draft = objective["name"], run["target_model_id"] is not None
    start = _start_of(run)
    base = split_revision(start)[0] if _is_hub_id(start) and not run["from_scratch"] else None
    matter = [
        "library_name: tokendiff",
        "pipeline_tag: text-generation",
        *([f"license: {found}"] if (found := _license_of(start)) else []),
        *([f"base_model: {base}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in _tags(name, process, is_draft=is_draft)),
    ]
    step = metadata.get(BEST_STEP, metadata["step"])
    settings = ", ".join(f"{field} {run[field]}" for field in _SETTINGS)
    facts = {
        "Objective": f"`{name}`",
        "Trained from": _in_words(start, run),
        **({"Adapters": _adapters_of(run)} if "lora_rank" in run else {}),
        "Data": f"packed rows of tokens with the digest `{run['data']}`",
        "Steps": f"{step:,} ({settings})",
        **({"Held-out rows": heldout} if heldout else {}),
    }
    return "\n".join(
        [
            "---",
            *matter,
            "---",
            "",
            f"# {'A draft model' if is_draft else 'A language model'} trained with `{name}`",
            "",
            "Made with tokendiff. `MANIFEST.json` lists the digest of every file here.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {text} |" for label, text in facts.items()),
            "",
            *_how_to_load(process, is_draft=is_draft),
            "",
            "## Objective",
            "",
            "```json",
            json.dumps(objective, indent=2, sort_keys=True),
            "```",
            "",
        ]
    )


def _start_of(run: Mapping[str, Any]) -> str:
    names = ("target_model_id", "warm_start_from", "model_name_or_path")
    return next(str(run[name]) for name in names if run[name] is not None)


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(split_revision(name)[0]) is not None and not Path(name).exists()


def _license_of(start: str) -> str | None:
    """What the card beside local weights says of their license; it holds for what comes of them."""
    card = local_path(start) / CARD_NAME
    if is_uri(start) or not card.is_file():
        return None
    found = _LICENSE.match(card.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def _tags(name: str, process: NoiseProcess | None, *, is_draft: bool) -> list[str]:
    kinds = ["speculative-decoding"] if is_draft else ["diffusion"] if process else []
    return ["tokendiff", *kinds, "text-generation", name.replace("_", "-")]


def _in_words(start: str, run: Mapping[str, Any]) -> str:
    what = f"`{start}`" if start.startswith("builtin:") or _is_hub_id(start) else "a local model"
    if run["target_model_id"] is not None:
        return f"new weights, as a draft of {what}" if run["draft_model_id"] is None else what
    is_new = run["from_scratch"] or start.startswith("builtin:")
    return f"new weights, of the form of {what}" if is_new else what


def _adapters_of(run: Mapping[str, Any]) -> str:
    modules = ", ".join(f"`{name}`" for name in run["lora_target_modules"])
    where = f" in {modules}" if modules else ""
    settings = f"lora_alpha {run['lora_alpha']}, lora_dropout {run['lora_dropout']}"
    is_kept = run.get("keep_base", False)
    what = "beside the weights of the base model" if is_kept else "merged into the weights"
    return f"LoRA of rank {run['lora_rank']}{where} ({settings}), {what}"


def _how_to_load(process: NoiseProcess | None, *, is_draft: bool) -> list[str]:
    use = _DRAFT_USE if is_draft else _DENOISER_USE if process else _CAUSAL_USE
    flags = "--sampler ar --model_id PATH --prompt 'Once upon a time'"
    if is_draft:
        flags = flags.replace("ar --model_id", "dflash --target_model_id TARGET --draft_model_id")
    elif process is not None:
        what = "--num_samples 4" if process.block_length is None else "--prompt 'Once upon a time'"
        flags = f"--checkpoint_path PATH {what}"
    is_of_chats = process is not None and process.block_start is not None
    return [
        "## How to load it",
        "",
        "`PATH` is this folder.",
        "",
        "```python",
        use,
        "```",
        "",
        "```bash",
        f"tokendiff generate {flags} --output_dir samples",
        "```",
        *(["", _OF_CHATS] if is_of_chats else []),
    ]
