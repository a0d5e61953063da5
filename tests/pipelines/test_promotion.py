"""From an evaluation to the champion and back: the gate, the registry, and the model it serves."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
from pydantic import ValidationError

from pipelines.builders import promote_stage
from pipelines.graph import Variant
from pipelines.promotion import _trained_on, judge, sampling_fields
from pipelines.registered import PinnedModels, checkpoint_folder, with_models
from pipelines.retention import clean
from pipelines.runner import models_of, plan, run_variants
from pipelines.schedule import Selection, plan_steps
from pipelines.stage import Stage
from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.models.test_completion import block_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import Location, RemotePath
from tokendiff.artifacts.manifest import commit
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.pipeline import Config, RunnerConfig, TrackingConfig
from tokendiff.config.promote import GateConfig, PromoteConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.evaluation.bound import summarize
from tokendiff.evaluation.paired import paired_standard_error, write_rows
from tokendiff.tracking.registry import Registry
from tokendiff.training.run import train_in_process

LOWER = GateConfig(metric="perplexity", direction="lower", margin=0.1)
HIGHER = GateConfig(metric="speedup", direction="higher", margin=-0.5)
LENGTH = 12
URI = "models:/toy@champion"


@pytest.mark.parametrize(
    ("gate", "candidate", "champion", "passed"),
    [
        ([LOWER], {"perplexity": 2.0}, {"perplexity": 2.2}, True),
        (
            [LOWER],
            {"perplexity": 2.0},
            {"perplexity": 2.05},
            False,
        ),  # better, but not by the margin
        ([LOWER], {"perplexity": 2.3}, {"perplexity": 2.2}, False),
        ([LOWER], {"perplexity": 9.0}, None, True),
        ([LOWER], {"perplexity": math.nan}, None, False),
        ([LOWER], {"perplexity": math.inf}, {"perplexity": math.nan}, False),
        ([LOWER], {"perplexity": 2.0}, {"perplexity": math.nan}, True),
        ([HIGHER], {"speedup": 1.6}, {"speedup": 2.0}, True),  # worse, within the margin
        ([HIGHER], {"speedup": 1.4}, {"speedup": 2.0}, False),
        (
            [LOWER, HIGHER],
            {"perplexity": 1.0, "speedup": 1.0},
            {"perplexity": 2.0, "speedup": 2.0},
            False,
        ),
    ],
)
def test_the_gate(gate: list[GateConfig], candidate: Any, champion: Any, passed: bool) -> None:
    verdicts = judge(gate, candidate, champion)
    assert all(verdict.passed for verdict in verdicts) is passed
    assert all(verdict.text.endswith(": passed") is verdict.passed for verdict in verdicts)


def test_an_equal_figure_passes_without_a_margin_and_is_called_equal() -> None:
    gate = [
        GateConfig(metric="verify_failed", direction="lower", margin=margin)
        for margin in (0.0, 0.5)
    ]
    plain, by_margin = judge(gate, {"verify_failed": 0.0}, {"verify_failed": 0.0})
    assert plain.text == "verify_failed 0, equal to the champion's 0: passed"
    assert by_margin.text == "verify_failed 0, lower than the champion's 0 by 0.5: not passed"


@pytest.mark.parametrize(("value", "passed"), [(2.4, True), (2.5, True), (2.6, False)])
def test_a_limit_holds_without_a_champion(value: float, passed: bool) -> None:
    gate = [GateConfig(metric="perplexity", direction="lower", limit=2.5)]
    (verdict,) = judge(gate, {"perplexity": value}, None)
    assert verdict.passed is passed
    assert "at most 2.5" in verdict.text


def test_a_figure_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"no figure 'perplexity'; it has nats_per_token"):
        judge([LOWER], {"nats_per_token": 2.0, "report": "here"}, None)


def rows_of(n: int, *, worse_by: float = 0.0, seed: int = 1) -> dict[str, np.ndarray]:
    """An evaluation of n rows that are hard or easy, with noise of its own on top."""
    tokens = np.random.default_rng(0).integers(20, 60, size=n)
    hard = np.random.default_rng(1).normal(size=n) * 1.5
    own = np.random.default_rng(seed).normal(size=n) * 0.05
    nats = tokens * (3.0 + hard + own + worse_by)
    return {"row_id": np.arange(n), "nats": nats, "num_tokens": tokens, "num_bytes": 4 * tokens}


@pytest.mark.parametrize(
    ("num_standard_errors", "better_by", "passed"),
    [
        (2, 0.001, False),  # less than the noise of its own that each model's figure has
        (0, 0.001, True),
        (2, 0.03, True),
        (2, -0.03, False),
        (200, 0.03, False),
    ],
)
def test_a_gate_tells_an_improvement_from_noise(
    num_standard_errors: float, better_by: float, passed: bool
) -> None:
    champion, candidate = rows_of(400, seed=7), rows_of(400, seed=8)
    means = [
        summarize(*(rows[name] for name in ("nats", "num_tokens", "num_bytes")))
        for rows in (candidate, champion)
    ]
    # Exactly as much better as it is to be, whatever was drawn.
    champion["nats"] *= (means[0].nats_per_token + better_by) / means[1].nats_per_token
    error = paired_standard_error("nats_per_token", candidate, champion)
    assert 0.001 < error < 0.01
    assert min(mean.standard_error for mean in means) > 0.06  # larger than any difference here
    gate = GateConfig(
        metric="nats_per_token", direction="lower", min_standard_errors=num_standard_errors
    )
    ours, theirs = ({"nats_per_token": means[0].nats_per_token + d} for d in (0.0, better_by))
    (verdict,) = judge([gate], ours, theirs, lambda metric: error)
    assert verdict.passed is passed
    assert f", difference {-better_by:.3g} ± {error:.2g}: " in verdict.text
    assert ("standard errors" in verdict.text) is (num_standard_errors > 0)


def test_a_gate_that_cannot_tell_does_not_pass() -> None:
    gate = [GateConfig(metric="acceptance_length_mean", direction="higher", min_standard_errors=1)]
    high, low, unknown = ({"acceptance_length_mean": x} for x in (9.0, 2.0, math.nan))

    def passes(candidate: Any, champion: Any, error: float | None) -> bool:
        return judge(gate, candidate, champion, lambda metric: error)[0].passed

    assert not any(passes(high, low, error) for error in (None, math.inf, math.nan))
    assert not passes(low, low, 0.0)  # the very same model
    assert passes(high, low, 3.0)
    assert not passes(low, high, 3.0)
    assert passes(low, None, None)  # nobody to be better than
    assert passes(low, unknown, math.nan)


def test_a_gate_that_nothing_is_kept_by_row_for_is_refused_at_once() -> None:
    with pytest.raises(ValidationError, match=r"no figures by row of 'speedup', only of nats_per"):
        GateConfig(metric="speedup", direction="higher", min_standard_errors=2.0)
    with pytest.raises(ValidationError, match=r"margin -0.1 allows a worse model, and min_"):
        GateConfig(metric="perplexity", direction="lower", margin=-0.1, min_standard_errors=2.0)
    # A gate without is the one that it was: the stage's key is the same.
    assert set(LOWER.result_fields()) == {"metric", "direction", "margin", "limit"}
    asked = GateConfig(metric="perplexity", direction="lower", min_standard_errors=2.0)
    assert asked.result_fields()["min_standard_errors"] == 2.0


class Shop:
    """Checkpoints, their evaluations as stages, and a promote stage over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.config = Config.model_validate(
            {
                "name": "shop",
                "root": str(self.root),
                "promote": {
                    "registered_model": "toy",
                    "gate": [{"metric": "perplexity", "direction": "lower"}],
                },
                "generate": {"sampler": {"name": "ancestral", "num_inference_steps": 4}},
                "runner": {"retry_wait_s": 0.0},
            }
        )
        rows = token_folder(
            folder / "data",
            files=[random_rows(20, LENGTH)],
            max_length=LENGTH,
            tokenizer=letter_tokenizer(),
        )
        self.data = TokenData.open(rows, split="train")

    def checkpoint(self, seed: int) -> Path:
        config = TrainConfig(
            model_name_or_path="builtin:bert-tiny", max_train_steps=1, logging_steps=1, seed=seed
        )
        return train_in_process(config, self.data, self.folder / f"run-{seed}")

    def evaluation(
        self,
        name: str,
        checkpoint: Path,
        nats: float,
        rows: str = "rows",
        by_row: dict[str, np.ndarray] | None = None,
        keeps_rows: bool = True,
    ) -> Stage:
        figures, first_id = {"perplexity": nats}, 0
        if by_row is not None:
            first_id = int(by_row["row_id"][0])
            figures["nats_per_token"] = float(by_row["nats"].sum() / by_row["num_tokens"].sum())

        def act(stage: Stage, log: Any) -> None:
            stage.folder.mkdir(parents=True, exist_ok=True)
            if by_row is not None and keeps_rows:
                write_rows(stage.folder / "rows.parquet", by_row)
            metadata = {"metrics": figures, "checkpoint": str(checkpoint), "rows": rows}
            commit(stage.folder, kind="evaluation", metadata=metadata)

        settings = {
            "checkpoint": checkpoint_identity(checkpoint),
            "rows": [rows, first_id, keeps_rows],
            **figures,
        }
        return Stage(
            name=name,
            kind="evaluate",
            settings=settings,
            base=self.root / "shop",
            action=act,
            result=lambda stage: {"perplexity": nats},
            is_keyed=True,
            needs_ray=False,
        )

    def run(
        self,
        candidate: Stage,
        champion: Stage | None = None,
        gate: dict[str, Any] | None = None,
        **selection: Any,
    ) -> Any:
        others = {} if champion is None else {"champion": champion}
        config = self.config
        if gate is not None:
            section = PromoteConfig(registered_model="toy", gate=[GateConfig(**gate)])
            config = config.model_copy(update={"promote": section})
        promote = promote_stage(
            config,
            self.root / "shop",
            inputs={"candidate": candidate, **others},
            is_keyed=True,
        )
        stages = [candidate, *others.values(), promote]
        variants = [Variant(values={}, stages=stages)]
        record = run_variants(self.config, self.root, variants, Selection(**selection))
        return record.state, record.of("promote").result

    @property
    def registry(self) -> Registry:
        return Registry(self.config.tracking, self.root)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def history(shop: Shop) -> dict[str, Any]:
    """v1 promoted, a rejection, v2 promoted: what each came to."""
    first, second, third = (shop.checkpoint(seed) for seed in range(3))
    found: dict[str, Any] = {"checkpoints": [first, second, third]}
    found["first"] = shop.run(shop.evaluation("judge", first, 2.0))
    champion = shop.evaluation("champion", first, 2.0)
    found["rejected"] = shop.run(shop.evaluation("judge", second, 2.1), champion)
    found["holder after rejection"] = shop.registry.holder("toy", "champion")
    found["promoted"] = shop.run(shop.evaluation("judge", third, 1.9), champion)
    return found


@pytest.mark.slow
def test_the_alias_moves_only_when_the_gate_is_passed(shop: Shop, history: Any) -> None:
    state, result = history["first"]
    assert (state, result["decision"], result["version"]) == ("succeeded", "promoted", 1)
    assert result["gate"] == ["perplexity 2, no champion to beat: passed"]
    state, result = history["rejected"]
    assert (state, result["decision"]) == ("rejected", "rejected")
    assert result["gate"] == ["perplexity 2.1, lower than the champion's 2: not passed"]
    assert history["holder after rejection"] == 1
    state, result = history["promoted"]
    assert (result["version"], result["replaced_version"]) == (2, 1)
    model = shop.registry.open(URI)
    assert model is not None
    assert model.version == 2
    assert model.digest == checkpoint_identity(history["checkpoints"][2])
    assert json.loads(model.trained_on.read_text()) == []


@pytest.mark.slow
def test_the_promotion_that_registered_a_version_is_not_cleaned_away(
    shop: Shop, history: Any
) -> None:
    """It says that the version is there: without it the same candidate would be judged anew."""
    runner = RunnerConfig(keep_runs=1)
    items = clean(shop.config.model_copy(update={"runner": runner}), shop.root, is_dry_run=True)
    promotions = [item for item in items if item.path.name.startswith("promote-")]
    found = {
        json.loads((item.path / "decision.json").read_text())["decision"]: item.why
        for item in promotions
        if item.why != "a kept run"
    }
    assert found == {"promoted": "the promotion of a registered version", "rejected": ""}


@pytest.mark.slow
def test_a_model_that_could_not_be_served_is_not_registered(shop: Shop, history: Any) -> None:
    other = copy.copy(shop)
    gate = [GateConfig(metric="perplexity", direction="lower")]
    update = {
        "promote": PromoteConfig(registered_model="unserved", gate=gate),
        "generate": GenerateConfig.model_validate({"sampler": {"name": "ar"}}),
    }
    other.config = shop.config.model_copy(update=update)
    with pytest.raises(InputError, match=r"sampler 'ar'"):
        other.run(shop.evaluation("judge", history["checkpoints"][0], 2.0))
    assert other.registry.holder("unserved", "champion") is None


@pytest.mark.slow
def test_what_must_not_be_compared_is_refused(shop: Shop, history: Any) -> None:
    first, second, _ = history["checkpoints"]
    candidate = shop.evaluation("judge", second, 1.0)
    with pytest.raises(InputError, match=r"were evaluated on different rows"):
        shop.run(candidate, shop.evaluation("champion", first, 2.0, rows="others"))
    with pytest.raises(InputError, match=r"is v2, but was not evaluated; give promote the input"):
        shop.run(candidate)
    with pytest.raises(InputError, match=r"was moved to v2 after the champion was evaluated"):
        shop.run(candidate, shop.evaluation("champion", first, 2.0))
    assert shop.registry.holder("toy", "champion") == 2


@pytest.mark.slow
def test_an_alias_that_is_moved_while_the_candidate_is_registered_is_left_there(
    shop: Shop, history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another pipeline or by hand: the candidate was never compared with that version."""
    first, second, third = history["checkpoints"]
    mine = copy.copy(shop)
    gate = [GateConfig(metric="perplexity", direction="lower")]
    section = PromoteConfig(registered_model="contested", gate=gate)
    mine.config = shop.config.model_copy(update={"promote": section})
    mine.run(mine.evaluation("judge", first, 2.0))
    register = Registry.register

    def overtaken(registry: Registry, name: str, checkpoint: Any, **fields: Any) -> int:
        version = register(registry, name, checkpoint, **fields)
        others = register(registry, name, third, **fields)
        registry.promote(name, "champion", others, because="of another pipeline")
        return version

    candidate, champion = (
        mine.evaluation("judge", second, 1.0),
        mine.evaluation("champion", first, 2.0),
    )
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "register", overtaken)
        with pytest.raises(InputError, match=r"was v1 when the candidate was judged and is v3"):
            mine.run(candidate, champion)
    assert mine.registry.holder("contested", "champion") == 3
    with pytest.raises(InputError, match=r"was moved to v3 after the champion was evaluated"):
        mine.run(candidate, champion)
    state, result = mine.run(candidate, mine.evaluation("champion", third, 2.0))
    assert (state, result["version"], result["replaced_version"]) == ("succeeded", 2, 3)


def test_a_candidate_that_is_rejected_is_not_fetched(
    shop: Shop, history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a remote one are many gigabytes; its digest is in its manifest."""
    _, second, third = history["checkpoints"]

    def fetched(folder: Any) -> Path:
        raise AssertionError(f"{folder} was fetched")

    monkeypatch.setattr("pipelines.promotion.fetch", fetched)
    candidate = shop.evaluation("judge", second, 3.0)
    state, _ = shop.run(candidate, shop.evaluation("champion", third, 2.0))
    assert state == "rejected"


@pytest.mark.slow
def test_the_gate_reads_the_rows_of_both_evaluations(shop: Shop, history: Any) -> None:
    _, second, third = history["checkpoints"]
    gate = {"metric": "nats_per_token", "direction": "lower", "min_standard_errors": 2.0}
    better, champion = rows_of(50, seed=2), rows_of(50, worse_by=0.001, seed=3)
    candidate = shop.evaluation("judge", second, 1.0, by_row=better)
    kept = shop.evaluation("champion", third, 2.0, by_row=champion)
    state, result = shop.run(candidate, kept, gate)
    error = paired_standard_error("nats_per_token", better, champion)
    assert state == "rejected"
    assert f" ± {error:.2g}: not passed" in result["gate"][0]
    # An evaluation of an earlier version has no rows; only who asks for them misses them.
    old = shop.evaluation("champion", third, 2.0, by_row=champion, keeps_rows=False)
    with pytest.raises(InputError, match=r"^champion kept nothing by row.*\(--force champion\)"):
        shop.run(candidate, old, gate)
    _, result = shop.run(candidate, old, {**gate, "margin": 0.5, "min_standard_errors": 0.0})
    assert result["gate"][0].endswith(" by 0.5: not passed")
    # The manifest says the rows are the same, and the files that they are not.
    others = {**champion, "row_id": champion["row_id"] + 1}
    with pytest.raises(InputError, match=r"have 50 and 50 rows, of which 49 are the same"):
        shop.run(candidate, shop.evaluation("champion", third, 2.0, by_row=others), gate)
    shifted = shop.evaluation("champion", third, 2.0, by_row=others)
    _, result = shop.run(candidate, shifted, {**gate, "margin": 0.5, "min_standard_errors": 0.0})
    assert result["gate"][0].endswith(" by 0.5: not passed")
    assert shop.registry.holder("toy", "champion") == 2


@pytest.mark.slow
def test_acceptance_of_other_prompts_is_not_compared(shop: Shop, history: Any) -> None:
    _, second, third = history["checkpoints"]
    gate = {"metric": "acceptance_length_mean", "direction": "higher", "min_standard_errors": 1.0}
    ids = np.arange(5)
    blocks = {"row_id": ids, "num_accepted": 3 * ids + 4, "num_blocks": ids + 2}

    def judged(name: str, checkpoint: Path, length: float, sampled: str) -> Stage:
        stage = shop.evaluation(name, checkpoint, length)
        metadata = {"checkpoint": str(checkpoint), "rows": "rows", "sampled": sampled}

        def act(stage: Stage, log: Any) -> None:
            stage.folder.mkdir(parents=True, exist_ok=True)
            write_rows(stage.folder / "sampled_rows.parquet", blocks)
            metrics = {"acceptance_length_mean": length}
            commit(stage.folder, kind="evaluation", metadata={**metadata, "metrics": metrics})

        return replace(stage, action=act, settings={**stage.settings, "sampled": sampled})

    candidate = judged("judge", second, 2.5, "some prompts")
    with pytest.raises(InputError, match=r"were drawn with different settings"):
        shop.run(candidate, judged("champion", third, 2.6, "others"), gate)
    unasked = {**gate, "min_standard_errors": 0.0}
    _, result = shop.run(candidate, judged("champion", third, 2.6, "others"), unasked)
    assert result["gate"][0].endswith("higher than the champion's 2.6: not passed")
    _, result = shop.run(candidate, judged("champion", third, 2.6, "some prompts"), gate)
    assert "difference -0.1 ± 0: not passed" in result["gate"][0]


@pytest.mark.slow
def test_the_gate_compares_tasks_document_by_document(shop: Shop, history: Any) -> None:
    _, second, third = history["checkpoints"]
    gate: dict[str, Any] = {
        "metric": "quiz/acc",
        "direction": "higher",
        "min_standard_errors": 2.0,
    }
    was_right = (np.random.default_rng(0).random(60) < 0.5).astype(float)
    now_right = was_right.copy()
    now_right[np.flatnonzero(was_right == 0.0)[:3]] = 1.0

    def judged(name: str, checkpoint: Path, right: np.ndarray, documents: str = "same") -> Stage:
        stage = shop.evaluation(name, checkpoint, 1.0)
        metadata = {"checkpoint": str(checkpoint), "rows": "rows", "tasks": {"quiz": documents}}

        def act(stage: Stage, log: Any) -> None:
            (stage.folder / "documents").mkdir(parents=True, exist_ok=True)
            columns = {"row_id": np.arange(60), "quiz/acc": right, "count": np.ones(60)}
            write_rows(stage.folder / "documents" / "quiz.parquet", columns)
            metrics = {"quiz/acc": float(right.mean()), "quiz/f1": float(right.mean())}
            commit(stage.folder, kind="evaluation", metadata={**metadata, "metrics": metrics})

        settings = {**stage.settings, "right": right.tolist(), "documents": documents}
        return replace(stage, action=act, settings=settings)

    candidate = judged("judge", second, now_right)
    state, result = shop.run(candidate, judged("champion", third, was_right), gate)
    # Three answers of sixty: the standard error of a mean of 57 zeros and 3 ones.
    error = math.sqrt((3 - 9 / 60) / 59 / 60)
    assert state == "rejected"
    assert result["gate"][0].endswith(f"difference 0.05 ± {error:.2g}: not passed")
    with pytest.raises(InputError, match=r"not asked about the same documents of task quiz"):
        shop.run(candidate, judged("champion", third, was_right, "others"), gate)
    with pytest.raises(
        InputError, match=r"^judge and champion kept nothing by document of quiz/f1"
    ):
        shop.run(candidate, judged("champion", third, was_right), {**gate, "metric": "quiz/f1"})
    now, before = ({"quiz/acc": float(right.mean())} for right in (now_right, was_right))
    (verdict,) = judge([GateConfig(**gate)], now, before, lambda metric: error / 1.5)
    assert verdict.passed


@pytest.mark.slow
def test_a_promotion_that_was_cut_off_registers_once(
    shop: Shop, history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the registration and the alias, and before its result counts: the same version
    is found again.
    """
    champion = shop.evaluation("champion", history["checkpoints"][2], 1.9)
    candidate = shop.evaluation("judge", history["checkpoints"][1], 1.5)

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "promote", die)
        with pytest.raises(KeyboardInterrupt):
            shop.run(candidate, champion)
    assert shop.registry.holder("toy", "champion") == 2
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.promotion.commit", die)
        with pytest.raises(KeyboardInterrupt):
            shop.run(candidate, champion)
    assert shop.registry.holder("toy", "champion") == 3
    _, result = shop.run(candidate, champion)
    assert (result["version"], result["replaced_version"]) == (3, None)
    # And back, step by step, until there is nothing left to go back to.
    registry = shop.registry
    assert registry.roll_back("toy", "champion") == (3, 2)
    assert registry.roll_back("toy", "champion") == (2, 1)
    with pytest.raises(InputError, match=r"v1 replaced no other version"):
        registry.roll_back("toy", "champion")
    assert [
        line.split(" ", 2)[2].split(":")[0] for line in registry.history("toy", "champion")
    ] == [
        "v2 -> v1",
        "v3 -> v2",
        "v2 -> v3",
        "v1 -> v2",
        "v1",
    ]
    # Forward again, by the same stage: what is registered is not registered twice.
    again = shop.evaluation("champion", history["checkpoints"][0], 2.0)
    _, result = shop.run(candidate, again)
    assert (result["version"], result["replaced_version"]) == (3, 1)


def steps_of(shop: Shop, judged: Stage, **others: Stage) -> list[tuple[str, str]]:
    base, inputs = shop.root / "shop", {"candidate": judged, **others}
    promote = promote_stage(shop.config, base, inputs=inputs, is_keyed=True)
    steps = plan_steps([*inputs.values(), promote], Selection())
    return [(step.state, step.why) for step in steps]


@pytest.mark.slow
def test_what_the_registry_lost_is_promoted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Shop(tmp_path)
    judged = shop.evaluation("judge", shop.checkpoint(0), 2.0)

    def run() -> tuple[str, int | None]:
        _, result = shop.run(judged)
        told = capsys.readouterr().out
        assert result["version"] == shop.registry.holder("toy", "champion")
        (line,) = [line for line in told.splitlines() if line.startswith("promote  ")][:1]
        return line.partition("(")[2], result["version"]

    assert run()[1] == 1
    assert run()[0].startswith("made by an earlier run, ")
    shop.registry._client.delete_model_version("toy", "1")
    lost = "models:/toy/{}, which it registered, {})"
    assert run() == (lost.format(1, "is not in the MLflow registry any more"), 2)
    for number, make in enumerate((lambda path: None, Path.touch)):  # lost, and emptied
        path = tmp_path / f"{number}.db"
        make(path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        why = ["went with the MLflow store", "is not in the MLflow registry any more"][number]
        assert run() == (lost.format([2, 1][number], why), 1)
        assert run()[0].startswith("made by an earlier run, ")
    # A new store counts from v1 again, for whoever comes first.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (other := tmp_path / "other").mkdir()
    registered(other, shop.root, shop.checkpoint(1)).promote("toy", "champion", 1, because="new")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}/mlflow.db")
    state, why = steps_of(shop, judged)[1]
    assert (state, why.partition(" than ")[0]) == (
        "run",
        "models:/toy/1 is another model in the MLflow registry",
    )
    # One that is away for now lost nothing.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("tokendiff.tracking.mlflow_store._CHECK_SECONDS", 0.2)
    assert steps_of(shop, judged) == [("done", "made by an earlier run")] * 2


def test_what_a_candidate_was_trained_on_is_what_the_data_behind_its_checkpoint_is_made_of(
    tmp_path: Path,
) -> None:
    commit(tmp_path, kind="tokens", metadata={"trained_on": ["a file"]})
    data = SimpleNamespace(inputs={}, is_done=True, output=tmp_path)
    train = SimpleNamespace(inputs={"data": data}, is_done=True, output=tmp_path / "none")
    for inputs, expected in (({"checkpoint": train}, ["a file"]), ({}, [])):
        stage: Any = SimpleNamespace(inputs={"candidate": SimpleNamespace(inputs=inputs)})
        assert _trained_on(stage) == expected


@pytest.mark.parametrize("by", ["a later promotion", "a rollback"])
def test_a_version_that_the_alias_has_left_may_be_deleted(by: str, tmp_path: Path) -> None:
    """Otherwise the next run would promote again what was rolled back for its faults."""
    shop = Shop(tmp_path)
    first, second = shop.checkpoint(0), shop.checkpoint(1)
    old = shop.evaluation("judge", first, 2.0)
    shop.run(old)
    new, champion = shop.evaluation("judge", second, 1.0), shop.evaluation("champion", first, 2.0)
    assert shop.run(new, champion)[1]["version"] == 2
    deleted, left = (old, 1) if by == "a later promotion" else (new, 2)
    others = {} if deleted is old else {"champion": champion}
    if by == "a rollback":
        assert shop.registry.roll_back("toy", "champion") == (2, 1)
    shop.registry._client.delete_model_version("toy", str(left))
    assert steps_of(shop, deleted, **others)[-1] == ("done", "made by an earlier run")
    shop.registry._client.delete_registered_model_alias("toy", "champion")
    state, why = steps_of(shop, deleted, **others)[-1]
    assert (state, why.partition(", ")[0]) == ("run", f"models:/toy/{left}")


def test_a_move_that_was_cut_off_is_noted_though_the_version_was_the_champion_before(
    shop: Shop, history: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registered(tmp_path, shop.root, *history["checkpoints"][:2])
    registry.promote("toy", "champion", 1, because="new")
    registry.promote("toy", "champion", 2, because="better")
    assert registry.roll_back("toy", "champion") == (2, 1)

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_note", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote("toy", "champion", 2, because="better again")
    for _ in range(2):
        registry.promote("toy", "champion", 2, because="better again")
        newest = [line.split(" ", 2)[2] for line in registry.history("toy", "champion")][:2]
        assert newest == ["v1 -> v2: better again", "v2 -> v1: rolled back"]


def test_a_store_that_refuses_to_say_is_not_one_without_a_champion(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any candidate would pass the gate."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("not for you", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "get_model_version_by_alias", refuse)
    with pytest.raises(MlflowException, match="not for you"):
        shop.registry.holder("toy", "champion")


def test_a_move_that_is_cut_off_has_a_way_back_once_it_is_made(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = shop.registry
    registry._create("cut-off")
    for _ in range(2):
        registry._client.create_model_version("cut-off", str(shop.folder))
    registry.promote("cut-off", "champion", 1, because="new")

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for step in ("_tag", "_note"):
        with monkeypatch.context() as patch:
            patch.setattr(Registry, step, die)
            with pytest.raises(KeyboardInterrupt):
                registry.promote("cut-off", "champion", 2, because="better")
    registry.promote("cut-off", "champion", 2, because="better")
    monkeypatch.setattr(Registry, "_opened", lambda registry, version: None)
    assert registry.roll_back("cut-off", "champion") == (2, 1)
    tags = [registry._client.get_model_version("cut-off", str(v)).tags for v in (1, 2)]
    assert ["rolled_back" in each for each in tags] == [False, True]


def test_a_history_that_grows_too_long_for_a_tag_loses_its_oldest_words(shop: Shop) -> None:
    registry = shop.registry
    registry._create("told")
    for _ in range(2):
        registry._client.create_model_version("told", str(shop.folder))
    for version, length in ((1, 3000), (2, 2000), (1, 9000)):
        registry.promote("told", "champion", version, because="x" * length)
        lines = registry.history("told", "champion")
        assert f" v{version}: xxx" in lines[0]
        assert len("\n".join(lines)) <= 5000
    assert len(lines) == 2


@pytest.mark.parametrize(
    "call",
    [
        "create_registered_model",
        "get_model_version_by_alias",
        "set_registered_model_alias",
        "set_registered_model_tag",
    ],
)
def test_a_store_that_fails_in_the_middle_is_named_and_the_same_run_goes_on(
    call: str, shop: Shop, history: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is locked by another program for long."""
    checkpoint = history["checkpoints"][0]

    def locked(*args: Any, **kwargs: Any) -> None:
        raise MlflowException(
            "(sqlite3.OperationalError) database is locked", error_code=TEMPORARILY_UNAVAILABLE
        )

    (other := tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, locked)
        with pytest.raises(ConnectionError, match=rf"store sqlite:.* failed in {call} \(.*locked"):
            registered(other, shop.root, checkpoint).promote("toy", "champion", 1, because="new")
    again = registered(other, shop.root, checkpoint)
    assert again.promote("toy", "champion", 1, because="new") in (None, 1)
    assert again.holder("toy", "champion") == 1
    assert len(MlflowClient(f"sqlite:///{other}/mlflow.db").search_model_versions()) == 1
    again.promote("toy", "champion", 1, because="once more")
    (line,) = again.history("toy", "champion")
    assert line.endswith(" v1: new")


@pytest.mark.slow
def test_the_champion_is_a_version_anew_where_it_is_served_otherwise(
    shop: Shop, history: Any
) -> None:
    checkpoint = history["checkpoints"][0]
    gate = [GateConfig(metric="perplexity", direction="lower", margin=0.1)]
    other = copy.copy(shop)

    def promoted(steps: int, champion: Stage | None = None) -> tuple[int, int | None]:
        sampler = {"name": "ancestral", "num_inference_steps": steps}
        update = {
            "promote": PromoteConfig(registered_model="served", gate=gate),
            "generate": GenerateConfig.model_validate({"sampler": sampler}),
        }
        other.config = shop.config.model_copy(update=update)
        _, result = other.run(shop.evaluation("judge", checkpoint, 2.0), champion)
        return result["version"], result["replaced_version"]

    champion = shop.evaluation("champion", checkpoint, 2.0)
    assert promoted(4) == (1, None)
    assert promoted(8, champion) == (2, 1)
    # As it was once: the version that is there.
    assert promoted(4, champion) == (1, 2)
    line = other.registry.history("served", "champion")[1]
    assert line.endswith("v1 -> v2: the same checkpoint, served otherwise")
    for version, steps in ((1, 4), (2, 8)):
        model = other.registry.open(f"models:/served/{version}")
        assert model is not None
        folder = Path(str(model.trained_on)).parent.parent
        served = yaml.safe_load((folder / "MLmodel").read_text())
        assert served["flavors"]["python_function"]["config"]["sampler"]["num_inference_steps"] == (
            steps
        )


def registered(store: Path, root: Location, *checkpoints: Path) -> Registry:
    """A store of files, and in it models:/toy/1 and on with what is read of a model."""
    registry = Registry(TrackingConfig(uri=f"sqlite:///{store}/mlflow.db"), root)
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    found = client.get_experiment_by_name("toy")
    experiment = (
        client.create_experiment("toy", artifact_location=f"{store}/artifacts")
        if found is None
        else found.experiment_id
    )

    def save(folder: Path, checkpoint: Path, **kwargs: Any) -> None:
        shutil.copytree(checkpoint, folder / "artifacts" / "final")
        (folder / "artifacts" / "trained_on.json").write_text("[]")
        (folder / "MLmodel").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokendiff.tracking.registry.save_model", save)
        fields: dict[str, Any] = {"sampling": {}, "trained_on": [], "tags": {}}
        for version, checkpoint in enumerate(checkpoints, start=1):
            run_id = client.create_run(experiment).info.run_id
            assert registry.register("toy", checkpoint, run_id=run_id, **fields) == version
    return registry


def test_workers_see_a_model_of_a_store_of_this_machine(s3: str, tmp_path: Path) -> None:
    checkpoint = block_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "store").mkdir()
    root = RemotePath(s3) / "seen"
    model = registered(tmp_path / "store", root, checkpoint).open("models:/toy/1")
    assert model is not None
    assert str(model.checkpoint).startswith(f"{root}/models/")
    assert model.trained_on.read_text() == "[]"
    assert model.digest == checkpoint_identity(checkpoint)


@pytest.mark.slow
def test_a_new_store_does_not_find_the_models_of_the_old_one(s3: str, tmp_path: Path) -> None:
    root = RemotePath(s3) / "stores"
    for seed in range(2):
        checkpoint = block_checkpoint(tmp_path / f"checkpoint-{seed}", seed=seed)
        (store := tmp_path / f"store-{seed}").mkdir()
        model = registered(store, root, checkpoint).open("models:/toy/1")
        assert model is not None
        assert model.digest == checkpoint_identity(checkpoint)


def test_models_in_the_place_of_paths(shop: Shop, history: Any) -> None:
    def trained(**fields: Any) -> TrainConfig:
        config = shop.config.model_copy(update={"train": TrainConfig(**fields)})
        return with_models(config).train

    start = trained(warm_start_from="models:/toy/1").warm_start_from
    assert start is not None
    first = checkpoint_identity(history["checkpoints"][0])
    assert checkpoint_identity(Path(start)) == first
    assert checkpoint_identity(Path(checkpoint_folder("models:/toy/1", shop.config))) == first
    assert trained(warm_start_from="models:/toy@nobody").warm_start_from is None
    with pytest.raises(InputError, match=r"train.model_name_or_path: there is no models:/toy/99"):
        trained(model_name_or_path="models:/toy/99")
    assert trained(warm_start_from=f"models:/toy/{10**30}").warm_start_from is None
    with pytest.raises(InputError, match=r"checkpoint_path: there is no models:/toy@nobody.*; toy"):
        checkpoint_folder("models:/toy@nobody", shop.config)
    with pytest.raises(InputError, match=r"write models:/NAME@ALIAS or models:/NAME/VERSION"):
        shop.registry.open("models:/toy")


def test_the_served_model_answers_prompts_and_refuses_bad_ones(
    shop: Shop, history: Any, load_served: Callable[[str, str], Any]
) -> None:
    """In this process; what the checkpoint itself samples for the same rows."""
    from mlflow.exceptions import MlflowException

    from tokendiff.models.sampling import SamplingModel
    from tokendiff.tracking.mlflow_store import resolve_uri

    model = load_served(resolve_uri(shop.config.tracking, shop.root), "models:/toy/1")
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["prompt"]
    assert model.input_example is not None
    request = [{"prompt": "abc"}, {"prompt": "abc"}]
    answers = model.predict(request, params={"seed": 7})
    assert shop.config.generate is not None
    sampling = SamplingModel(history["checkpoints"][0], shop.config.generate, device="cpu")
    rows = [GenerationRow(id=(7 << 32) + place, prompt="abc") for place in range(2)]
    records = sampling.sample(rows)
    assert [answer["text"] for answer in answers] == [record["text"] for record in records]
    assert [answer["completion"] for answer in answers] == [r["completion"] for r in records]
    assert all(answer["text"].startswith("abc") for answer in answers)
    assert model.predict(request, params={"seed": 7}) == answers
    assert model.predict(request, params={"seed": 8}) != answers
    for bad in ({"prompt": "a" * (LENGTH + 1)}, {"prompt": 5}, {"prompt": None}, {"text": "abc"}):
        with pytest.raises(MlflowException) as error:
            model.predict([bad])
        assert error.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="seed must be from 0") as error:
        model.predict(request, params={"seed": -1})
    assert error.value.get_http_status_code() == 400


def test_what_is_served_with_is_the_files_own_sampling(shop: Shop) -> None:
    assert shop.config.generate is not None
    assert sampling_fields(shop.config.generate) == {
        "sampler": {"name": "ancestral", "num_inference_steps": 4}
    }


def test_what_a_file_of_chats_was_rendered_with_is_not_what_requests_are(shop: Shop) -> None:
    section = GenerateConfig.model_validate(
        {"sampler": {"name": "ancestral"}, "prompts": ["a.jsonl"], "add_generation_prompt": False}
    )
    fields = sampling_fields(section)
    assert fields == {"sampler": {"name": "ancestral"}}
    GenerateConfig.model_validate(fields)


def test_an_alias_is_read_once_for_the_same_inputs(shop: Shop, history: Any) -> None:

    def pipeline(uri: str) -> Config:
        judge = {"kind": "evaluate", "config": {"checkpoint_path": uri}}
        return Config.model_validate({"name": "shop", "stages": {"judge": judge}})

    config = pipeline(URI)

    notes: list[str] = []

    def version(*inputs: str) -> int | None:
        pinned = PinnedModels.read(config, shop.root, list(inputs))
        pinned.keep(shop.root / "shop")
        notes[:] = pinned.notes()
        model = pinned.models[URI]
        return None if model is None else model.version

    registry = shop.registry
    registry.promote("toy", "champion", 2, because="a test")
    assert version("monday") == 2
    registry.promote("toy", "champion", 1, because="a test")
    assert version("monday") == 2
    assert len(notes) == 1
    assert notes[0].startswith(f"{URI} is version 1 now; until the text or a setting changes, ")
    assert notes[0].endswith(": version 2")
    assert version("tuesday") == 1
    assert not notes
    for damaged in ("", "null", "[]"):
        (shop.root / "shop" / ".run" / "models.json").write_text(damaged)
        assert version("monday") == 1
    absent = "models:/toy@nobody"
    pinned = PinnedModels.read(pipeline(absent), shop.root, ["monday"])
    assert pinned.models == {absent: None}
    assert not pinned.moved


def test_a_plan_says_that_a_model_came_after_its_inputs_were_read(shop: Shop, history: Any) -> None:
    uri = "models:/toy@newcomer"
    judge = {"kind": "evaluate", "config": {"checkpoint_path": uri}}
    config = Config.model_validate({"name": "late", "stages": {"judge": judge}})
    first = plan(config, shop.root)
    assert [step.why for step in first.steps] == [f"there is no {uri} yet"]
    assert not first.notes
    models_of(config, shop.root).keep(shop.root / "late")  # as a run does
    shop.registry.promote("toy", "newcomer", 1, because="a test")
    later = plan(config, shop.root)
    assert [step.why for step in later.steps] == [
        f"there was no {uri} when these inputs were first run"
    ]
    assert later.notes[0].startswith(f"{uri} is version 1 now; until the text or a setting changes")
    assert later.notes[0].endswith("as it was when these inputs were first run: missing")
