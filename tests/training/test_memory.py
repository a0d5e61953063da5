"""The memory that a run is planned to take, against what its passes really keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.dflash import trainee
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import plan_draft
from tokendiff.models.dflash.second_layout import CandidateSelector
from tokendiff.objectives.dflash import _Selecting
from tokendiff.training import memory
from tokendiff.training.activations import activation_bytes, selector_bytes
from tokendiff.training.building import model_without_weights
from tokendiff.training.inputs import check_inputs
from tokendiff.training.memory import GiB, MemoryPlan, check_memory, plan_memory
from tokendiff.training.run import TrainingRun
from tokendiff.training.world import World

LENGTH, ROWS = 64, 6
CPU = torch.device("cpu")
MODELS = {"mdlm": "bert-tiny", "udlm": "dit-tiny", "hybrid": "bert-tiny"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(12, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    return TokenData.open(folder, split="train")


def config(objective: str, **changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": f"builtin:{MODELS.get(objective, 'qwen3-tiny')}",
        "objective": objective,
        "max_train_steps": 2,
        "per_device_train_batch_size": ROWS,
    }
    return TrainConfig.model_validate({**fields, **changes})


def kept_by_a_real_pass(cfg: TrainConfig, data: TokenData, folder: Path) -> int:
    """Bytes that the encoder keeps of a step's rows, its weights left out."""
    trainer = TrainingRun.build(cfg, data, folder, world=World.current()).trainer
    model: Any = trainer.denoiser
    head = model.head
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    class Watched:
        is_time_conditioned = getattr(model, "is_time_conditioned", False)

        def encode(self, *args: Any) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden: Tensor = model.encode(*args)
            return hidden

        def head(self, hidden: Tensor) -> Tensor:
            logits: Tensor = head(hidden)
            return logits

    class WatchedDraft:
        read, selector = (getattr(model, name, None) for name in ("read", "selector"))

        def draft(self, *args: Any) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden: Tensor = model.draft(*args)
            return hidden

        def head(self, hidden: Tensor) -> Tensor:
            logits: Tensor = head(hidden)
            return logits

    ids = torch.arange(ROWS)
    draws = RowGenerator.for_rows(key_from(0), ids, strata=strata_of(key_from(0), ids, ROWS))
    batch = data.read_group(0).take(ids.numpy()).batch("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.mixed_precision == "bf16"):
        watched = WatchedDraft() if cfg.objective.name == "dflash" else Watched()
        trainer.objective.loss(watched, batch, draws)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("objective", ["mdlm", "udlm", "ar", "block_diffusion", "block_refinement"])
def test_activations_are_those_that_a_pass_keeps(
    objective: str, mixed_precision: str, data: TokenData, tmp_path: Path
) -> None:
    cfg = config(objective, mixed_precision=mixed_precision)
    model = model_without_weights(cfg, letter_tokenizer(), max_length=LENGTH)
    shape = cfg.objective.encoded_shape(ROWS, LENGTH)
    planned, again = activation_bytes(cfg, model, *shape, CPU)
    assert again == 0
    assert planned == pytest.approx(kept_by_a_real_pass(cfg, data, tmp_path), rel=0.05)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("target")
    tiny_causal(vocab_size=20, num_hidden_layers=5).float().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def draft_config(
    target: Path, *, num_anchors: int, draft_layout: str = "dflash", **changes: Any
) -> TrainConfig:
    sizes: dict[str, Any] = {"num_anchors": num_anchors, "block_size": 4, "draft_num_layers": 2}
    sizes["draft_layout"] = draft_layout
    return TrainConfig.model_validate(
        {
            "objective": {"name": "dflash", **sizes},
            "target_model_id": str(target),
            "per_device_train_batch_size": ROWS,
            "max_train_steps": 2,
            **changes,
        }
    )


def planned(cfg: TrainConfig, **changes: Any) -> Any:
    fields = {"max_length": LENGTH, "num_workers": 1, "replica_size": None, "device": CPU}
    return plan_memory(cfg, letter_tokenizer(), **{**fields, **changes})


@pytest.mark.parametrize("scores", [0, 2**40])
@pytest.mark.parametrize("num_anchors", [3, 40])
@pytest.mark.parametrize("layout", ["dflash", "dflash2"])
def test_activations_of_a_draft_are_those_that_a_pass_keeps(
    layout: str,
    num_anchors: int,
    scores: int,
    target: Path,
    data: TokenData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a mask of everything, and in tiles; those depend a little on where anchors lie."""
    monkeypatch.setattr(trainee, "_TILED_SCORES", scores)
    cfg = draft_config(target, num_anchors=num_anchors, draft_layout=layout)
    kept = kept_by_a_real_pass(cfg, data, tmp_path)
    draft = plan_draft(cfg, tokenizer=letter_tokenizer(), max_length=LENGTH).draft
    of_selector = selector_bytes(draft, ROWS * num_anchors * 3)
    assert (of_selector > 0) == (layout == "dflash2")
    assert planned(cfg).activations - of_selector == pytest.approx(kept, rel=0.05)


def test_what_a_selector_keeps_is_what_its_loss_saves(target: Path) -> None:
    cfg = draft_config(target, num_anchors=3, draft_layout="dflash2")
    shape = plan_draft(cfg, tokenizer=letter_tokenizer(), max_length=LENGTH).draft
    selector, num_tokens = CandidateSelector(shape), 37
    states = torch.zeros(num_tokens, shape.hidden_size)
    before = torch.zeros(num_tokens, dtype=torch.int64)
    given = (states, before, *selector.parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selecting = _Selecting(selector, states, before)
        selecting.gradient_alone()
    left, _, *of_candidates = selecting.columns  # these are held, and not saved
    held = sum(column.nbytes for column in (left, *of_candidates))
    saved = sum(size for size, _ in kept.values())
    assert selector_bytes(shape, num_tokens) == held + saved


@pytest.mark.slow
def test_what_is_counted_of_a_draft(target: Path) -> None:
    cfg = draft_config(target, num_anchors=3, gradient_accumulation_steps=2, ema_decay=0.9)
    draft = DFlashDraftModel(plan_draft(cfg, tokenizer=letter_tokenizer(), max_length=LENGTH).draft)
    of_target = tiny_causal(vocab_size=20, num_hidden_layers=5)
    trained, frozen = (sum(p.numel() for p in m.parameters()) for m in (draft, of_target))
    alone = planned(cfg)
    assert alone.weights == 4 * trained + 4 * frozen
    assert (alone.gradients, alone.optimizer, alone.average) == (
        4 * trained,
        8 * trained,
        4 * trained,
    )
    assert alone.logits == 4 * ROWS * 3 * 3 * 20
    layer = sum(p.numel() for p in of_target.model.layers[0].parameters())
    shared = {"num_workers": 4, "replica_size": 4}
    full = planned(draft_config(target, num_anchors=3, sharding="full"), **shared)
    both = planned(draft_config(target, num_anchors=3, sharding="gradients"), **shared)
    assert full.optimizer == both.optimizer == 2 * trained
    of_layers = sum(p.numel() for p in draft.layers[0].parameters())
    rest = trained - 2 * of_layers
    # Two layers of the draft are all that it has, so it is whole at a time in both.
    assert full.weights == trained + 4 * (rest + 2 * of_layers) + 4 * (
        frozen - 5 * layer + 5 * layer // 4 + 2 * layer
    )
    assert both.weights == trained + 4 * (rest + 2 * of_layers) + 4 * frozen
    again = planned(draft_config(target, num_anchors=3, gradient_checkpointing=True))
    assert again.activations < alone.activations


def test_layers_that_compute_again_keep_their_inputs_and_one_of_them_all() -> None:
    cfg = config("mdlm", gradient_checkpointing=True)
    model = model_without_weights(cfg, letter_tokenizer(), max_length=LENGTH)
    kept, again = activation_bytes(cfg, model, ROWS, LENGTH, CPU)
    whole, _ = activation_bytes(config("mdlm"), model, ROWS, LENGTH, CPU)
    assert again == whole // 2, "of two layers"
    inputs = 2 * ROWS * LENGTH * 64 * 4
    assert inputs <= kept <= 4 * inputs


@pytest.mark.slow
def test_what_is_counted() -> None:
    def plan(num_workers: int = 1, replica_size: int | None = None, **changes: Any) -> Any:
        cfg = config("ar", **changes)
        return plan_memory(
            cfg,
            letter_tokenizer(),
            max_length=LENGTH,
            num_workers=num_workers,
            replica_size=replica_size,
            device=CPU,
        )

    model = model_without_weights(config("ar"), letter_tokenizer(), max_length=LENGTH)
    count = sum(p.numel() for p in model.parameters())
    alone = plan(ema_decay=0.9, gradient_accumulation_steps=2)
    assert (alone.weights, alone.gradients) == (4 * count, 4 * count)
    assert (alone.optimizer, alone.average) == (8 * count, 4 * count)
    assert plan().average == 0
    hidden = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert plan(optimizer="muon").optimizer == 8 * (count - hidden) + 4 * hidden
    shared = plan(num_workers=4, replica_size=4, sharding="full")
    assert shared.optimizer == 2 * count
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = count - 2 * layer
    assert shared.weights == count + 4 * rest + 4 * 2 * layer
    assert shared.gradients == count + 4 * rest + 4 * layer
    adapters = plan(lora_rank=2, gradient_accumulation_steps=2)
    assert adapters.optimizer < 0.2 * alone.optimizer
    assert plan().total < plan(per_device_train_batch_size=4 * ROWS).total


def test_a_run_that_does_not_fit_is_refused_with_what_would_help(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = TrainingRun.build(config("ar"), data, tmp_path, world=World.current()).memory
    assert planned.total > 2**20
    monkeypatch.setattr(memory, "_memory_of", lambda world: (2**20, 0))
    with pytest.raises(
        InputError,
        match=r"a worker needs \d+ MiB at the peak of a step \(weights .*; activations are computed"
        r"\), and cpu has 1 MiB for it; set gradient_checkpointing to true, or lower per_device_",
    ):
        TrainingRun.build(config("ar"), data, tmp_path, world=World.current())


class _Card:
    """An 80 GiB card, of which others have taken some at first, and some that stays.

    Attributes:
        num_looks: how often it was asked.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, taken: int, stays: int, own: int = 0
    ) -> None:
        self.num_looks, self._taken, self._stays, self._own = 0, taken, stays, own
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._free)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own * GiB)
        monkeypatch.setattr(memory.time, "sleep", lambda seconds: None)

    def _free(self, device: torch.device) -> tuple[int, int]:
        self.num_looks += 1
        taken = self._taken if self.num_looks < 4 else self._stays
        return (80 - taken - self._own) * GiB, 80 * GiB


def plan_of(gibibytes: int) -> MemoryPlan:
    rest = {"gradients": 0, "optimizer": 0, "average": 0, "activations": 0, "logits": 0}
    return MemoryPlan(weights=gibibytes * GiB, **rest)


def test_what_others_have_taken_of_a_card_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    cfg = config("ar", gradient_checkpointing=True, per_device_train_batch_size=1)
    _Card(monkeypatch, taken=50, stays=50)
    check_memory(cfg, plan_of(32), world)  # the plan may be wrong by a tenth
    with pytest.raises(
        InputError,
        match=r"cuda:0 has 30.0 GiB for it \(other processes have taken 50.0 GiB\); end the "
        r"processes that use it, or give the run more workers",
    ):
        check_memory(cfg, plan_of(40), world)
    card = _Card(monkeypatch, taken=50, stays=0)
    check_memory(cfg, plan_of(40), world)
    assert card.num_looks == 4, "a process that has just ended gives it back a little later"
    card = _Card(monkeypatch, taken=50, stays=50, own=20)
    with pytest.raises(InputError, match=r"cuda:0 has 30.0 GiB for it .* 50.0 GiB\); give the run"):
        check_memory(cfg, plan_of(90), world)
    assert card.num_looks == 1, "the whole card would not do"
    _Card(monkeypatch, taken=0, stays=0, own=60)
    check_memory(cfg, plan_of(70), world)  # what this process has is its own
    card = _Card(monkeypatch, taken=1, stays=1)  # by CUDA, for this process
    with pytest.raises(InputError, match=r"cuda:0 has 79.0 GiB for it; give the run"):
        check_memory(cfg, plan_of(87), world)
    assert card.num_looks == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sharding": "full"}, "sharding: it is not known which modules of a 'albert' model"),
        ({"optimizer": "muon"}, "optimizer muon: it is not known .* leave optimizer out"),
    ],
)
def test_a_model_whose_layers_are_not_known_is_refused_before_a_worker_starts(
    changes: dict[str, Any], says: str, data: TokenData, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    albert = AutoConfig.for_model("albert", embedding_size=8, max_position_embeddings=64, **small)
    AutoModelForMaskedLM.from_config(albert).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    cfg = config("mdlm", model_name_or_path=str(tmp_path), **changes)
    with pytest.raises(InputError, match=says):
        check_inputs(cfg, data)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("xlm", {"emb_dim": 16, "n_layers": 1, "n_heads": 2}),
        ("longformer", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ],
)
def test_a_model_that_asks_what_is_in_a_tensor_is_planned_without_its_activations(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    shape = AutoConfig.for_model(model_type, vocab_size=20, **fields)
    AutoModelForMaskedLM.from_config(shape).save_pretrained(tmp_path)
    plan = plan_memory(
        config("mdlm", model_name_or_path=str(tmp_path)),
        letter_tokenizer(),
        max_length=LENGTH,
        num_workers=1,
        replica_size=None,
        device=CPU,
    )
    assert plan.activations == 0 < plan.weights
    assert "activations are not known and not counted" in plan.describe()
