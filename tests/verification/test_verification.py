"""The certificate: of sound code and checkpoints everything passes, and each break is caught where
it is, not somewhere.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs import evaluate as evaluate_job
from pipelines import tables
from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.objectives.test_block_objectives import packed_batch, tiny_model
from tests.objectives.test_targets import block_process
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.diffusion import kernels
from tokendiff.diffusion.attention_masks import block_diffusion as block_diffusion_rule
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.evaluation import bound
from tokendiff.models.denoiser import TransformersDenoiser
from tokendiff.objectives import block_diffusion, chunked
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.samplers import ancestral, base, hidden_states
from tokendiff.training.run import train_in_process
from tokendiff.verification import certificate, toys
from tokendiff.verification import checkpoints as checkpoint_verification
from tokendiff.verification import installed_code as verification
from tokendiff.verification.block_checkpoints import LoadedBlockCheckpoint, block_rules
from tokendiff.verification.certificate import Check, Rule, apply

LENGTH = 12
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mdlm": {"name": "mdlm"},
    "udlm": {"name": "udlm", "exclude_mask_from_uniform": False, "alpha_schedule": "cosine"},
    "hybrid": {"name": "hybrid", "loss_type": "cross_entropy"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(40, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(10, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="heldout")


@pytest.fixture(scope="module")
def checkpoints(data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few steps of each objective; of the uniform one with a model that is told the time."""
    train = TokenData.open(data.folder, split="train")
    return {
        name: train_in_process(
            TrainConfig.model_validate(
                {
                    "model_name_or_path": f"builtin:{'dit' if name == 'udlm' else 'bert'}-tiny",
                    "max_train_steps": 8,
                    "per_device_train_batch_size": 8,
                    "learning_rate": 1e-2,
                    "objective": objective,
                }
            ),
            train,
            tmp_path_factory.mktemp(name) / "out",
        )
        for name, objective in OBJECTIVES.items()
    }


def of_checkpoint(checkpoint: Path, data: TokenData) -> list[Check]:
    rows = data.read_group(0)
    return list(checkpoint_verification.verify_checkpoint(checkpoint, rows.tokens, rows.lengths))


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def failed_code(*names: str, rules: tuple[Rule[Any], ...] = verification.RULES) -> set[str]:
    """The rules that fail for toys, made anew: a kernel is kept once it is asked for."""
    checks: list[Check] = []
    for name in names:
        checks += apply(rules, name, toys.ToyLanguage(toys.TOYS[name].process))
    return failed(checks)


@pytest.mark.slow
def test_the_installed_code_passes() -> None:
    checks = list(verification.verify_code())
    assert failed(checks) == set()
    assert len(checks) == verification.num_code_checks()
    assert {check.name for check in checks if check.subject == "uniform_blocks"} == {"block_loss"}
    # What is computed and not drawn is far inside its tolerance.
    assert max(check.figure or 0.0 for check in checks if check.name == "bound") < 1e-5
    assert max(check.figure or 0.0 for check in checks if check.name == "reverse") < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_checkpoint_passes(name: str, checkpoints: dict[str, Path], data: TokenData) -> None:
    checks = of_checkpoint(checkpoints[name], data)
    assert failed(checks) == set()
    assert [check.name for check in checks] == [r.name for r in checkpoint_verification.RULES]
    assert {check.subject for check in checks} == {"checkpoint"}


# Breaks of the code. Each names the rules that must fail, and those that must not.


def wrong_vocabulary_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """V for V - 1, consistently: the distributions do not even sum to 1."""

    def spread(self: UniformKernel, total: Tensor) -> kernels.Noise:
        mask = 0.0 if self.exclude_mask else total / self.vocab_size
        return kernels.Noise(mask + torch.zeros_like(total), total / self.vocab_size)

    monkeypatch.setattr(UniformKernel, "_spread", spread)


def wrong_masked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / t, which is right under the log-linear schedule."""
    monkeypatch.setattr(AbsorbingKernel, "masked_loss_weight", lambda self, t: 1.0 / t)


def wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """b' alone, the rate without what has left the clean token."""

    def loss_weight(self: ForwardKernel, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        is_mask = x_t == self.mask_token_id
        rate = self.noise_prime(t).at(is_mask)
        return rate / (self.noise(t).at(is_mask) + self.alpha(t) * (x_t == x_0))

    monkeypatch.setattr(ForwardKernel, "loss_weight", loss_weight)


def wrong_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """p(x_0 | x_t) in place of the leave-one-out posterior."""
    monkeypatch.setattr(ForwardKernel, "loo_logits", lambda self, logits, x_t, t: logits)


def wrong_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """b_t - b_s, alpha_{t|s} forgotten."""

    def transition(self: ForwardKernel, s: Tensor, t: Tensor) -> tuple[Tensor, kernels.Noise]:
        alpha_s, noise_s = self.cleaner_end(s)
        noise = self.noise(t)
        return self.alpha(t) / alpha_s, kernels.Noise(
            noise.mask - noise_s.mask, noise.token - noise_s.token
        )

    monkeypatch.setattr(ForwardKernel, "transition", transition)


def wrong_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForwardKernel, "prior_nats", lambda self: 0.0)


def wrong_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reconstruction left out of the reported bound."""

    def nothing(model: Any, x_0: Tensor, *args: Any) -> Tensor:
        return torch.zeros(len(x_0), dtype=torch.float64)

    monkeypatch.setattr(bound, "_end_nats", nothing)


def wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """c' without the factor gamma / 2."""
    right = HybridKernel._uniform_part

    def part(self: HybridKernel, t: Tensor) -> tuple[Tensor, Tensor]:
        c, c_prime = right(self, t)
        return c, c_prime / (0.5 * self.gamma)

    monkeypatch.setattr(HybridKernel, "_uniform_part", part)


def wrong_noise_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids above the mask are not moved up: the last id is never drawn."""

    def draw_noise(self: ForwardKernel, t: Tensor, uniform: Tensor) -> Tensor:
        noise = self.noise(t)
        rest = uniform * (1.0 - self.alpha(t)) - noise.mask
        return torch.where(
            (rest < 0) | (noise.token <= 0),
            self.mask_token_id,
            (rest / noise.token.clamp(min=1e-300)).long().clamp(0, self.num_noise_tokens - 1),
        )

    monkeypatch.setattr(ForwardKernel, "draw_noise", draw_noise)


def wrong_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture is right, but the belief about x_t is left out of it."""
    right = ancestral._belief_in
    monkeypatch.setattr(
        ancestral,
        "_belief_in",
        lambda tokens, logits, where: 0.0 * right(tokens, logits, where=where),
    )


@pytest.mark.parametrize(
    ("break_it", "subject", "caught", "sound"),
    [
        (wrong_vocabulary_size, "uniform", {"forward", "reverse", "bound"}, {"derivative"}),
        (wrong_masked_weight, "absorbing_cosine", {"closed_form"}, {"forward", "bound"}),
        (wrong_weight, "hybrid", {"bound"}, {"forward", "reverse", "mixture"}),
        (wrong_weight, "uniform", {"bound"}, {"forward", "reverse", "mixture"}),
        (wrong_posterior, "uniform", {"posterior"}, {"forward", "reverse", "bound"}),
        (wrong_posterior, "hybrid", {"posterior"}, {"forward", "reverse", "bound"}),
        (wrong_transition, "absorbing_log_linear", {"reverse", "mixture"}, {"bound"}),
        (wrong_transition, "uniform_with_mask", {"reverse", "mixture"}, {"bound"}),
        (wrong_prior, "uniform", {"bound"}, {"closed_form", "reverse"}),
        (wrong_estimate, "uniform", {"estimate"}, {"bound", "closed_form"}),
        (wrong_derivative, "hybrid", {"derivative", "bound"}, {"forward", "reverse"}),
        (wrong_noise_draw, "hybrid", {"corrupt"}, {"forward", "reverse", "bound"}),
        (wrong_sampler, "uniform", {"sampler"}, {"mixture", "reverse", "bound"}),
    ],
)
def test_a_break_of_the_code_is_caught_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    subject: str,
    caught: set[str],
    sound: set[str],
) -> None:
    break_it(monkeypatch)
    wrong = failed_code(
        subject, rules=tuple(r for r in verification.RULES if r.name in caught | sound)
    )
    assert wrong == caught


def nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def own_clean_block_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noisy positions see the clean text of their own block too."""

    def rule(document: Tensor, block: Tensor, *args: Any, **sight: Any) -> Any:
        right, length = block_diffusion_rule(document, block, *args, **sight), document.shape[1]
        return lambda b, q, kv: (
            right(b, q, kv)
            | ((q < length) & (kv >= length) & (block[b, q % length] == block[b, kv % length]))
        )

    monkeypatch.setattr(block_diffusion, "block_diffusion", rule)


def wrong_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is counted once, whatever the draw of its time."""
    right = UniformBlockDiffusion.loss_at

    def loss_at(
        self: Any, model: Any, rows: Any, x_t: Any, t: Any, slope: Tensor, **told: Any
    ) -> Any:
        return right(self, model, rows, x_t, t, torch.ones_like(slope), **told)

    monkeypatch.setattr(UniformBlockDiffusion, "loss_at", loss_at)


@pytest.mark.parametrize(
    ("break_it", "caught"),
    [
        (nothing_wrong, set()),
        (wrong_weight, set()),  # what a checkpoint is checked against has the same weight
        (own_clean_block_seen, {"one_pass"}),
        (wrong_slope, {"noisy_loss"}),
    ],
)
def test_a_break_of_blocks_of_random_tokens_is_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    caught: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verification, "_BLOCK_NODES", 10)  # fewer, for a coarser figure
    language = toys.BlockLanguage(toys.BLOCKS.process)
    batch, process = packed_batch(), block_process(forward_process="uniform")
    break_it(monkeypatch)
    (check,) = apply(verification.BLOCK_RULES, "uniform_blocks", language)
    assert check.figure is not None
    assert (check.figure > 0.01) == (break_it is not nothing_wrong)
    loaded = LoadedBlockCheckpoint(process=process, model=tiny_model().double(), batch=batch)
    found = failed(list(apply(block_rules(process), "checkpoint", loaded)))
    assert found >= caught
    assert bool(found) == bool(caught)


# Breaks that show on a checkpoint.


def stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states of the first step are used for ever."""

    def update(self: Any, tokens: Tensor, is_needed: Tensor, time: Tensor) -> Tensor:
        if self._hidden is None:
            self._hidden = self._model.encode(tokens, torch.ones_like(tokens).bool(), time)
        return is_needed

    monkeypatch.setattr(hidden_states.HiddenStates, "update", update)


def skipped_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions whose move is only possible are taken to stay."""
    right = ForwardKernel.move_probability

    def bounds(self: ForwardKernel, x_t: Tensor, belief: Tensor, **times: Any) -> Any:
        # What the sampler asks for first, before any model: with a belief of 0.
        is_bound = x_t.ndim == 2 and not bool(belief.any())
        clean, noise = right(self, x_t, belief, **times)
        return (0.7 * clean, 0.7 * noise) if is_bound else (clean, noise)

    monkeypatch.setattr(ForwardKernel, "move_probability", bounds)


def masks_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.Predictor._belief

    def belief(self: Any, *args: Any) -> Tensor:
        self._mask = self._mask[:0]
        return right(self, *args)

    monkeypatch.setattr(base.Predictor, "_belief", belief)


def padding_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransformersDenoiser.encode
    monkeypatch.setattr(
        TransformersDenoiser,
        "encode",
        lambda self, tokens, is_valid, time: right(self, tokens, torch.ones_like(is_valid), time),
    )


def gradient_of_the_last_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked._KnownGradient.forward

    def half(ctx: Any, loss: Tensor, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        return right(ctx, loss, [grads[0], *(0.5 * grad for grad in grads[1:])], *leaves)

    monkeypatch.setattr(chunked._KnownGradient, "forward", staticmethod(half))


def field_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NoiseProcess.save

    def save(self: NoiseProcess, folder: Path) -> None:
        right(self, folder)
        path = folder / "scheduler_config.json"
        fields = json.loads(path.read_text())
        del fields["gamma"], fields["p_uniform"]
        path.write_text(json.dumps(fields))

    monkeypatch.setattr(NoiseProcess, "save", save)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "objective", "caught"),
    [
        (stale_cache, "mdlm", {"cache"}),
        (stale_cache, "hybrid", {"cache"}),
        (skipped_too_much, "hybrid", {"skipping"}),
        (masks_predicted, "mdlm", {"mask"}),
        (padding_seen, "udlm", {"padding"}),
        (gradient_of_the_last_chunk, "mdlm", {"loss", "chunks"}),
        (gradient_of_the_last_chunk, "udlm", {"loss", "chunks"}),
        (field_forgotten, "hybrid", {"scheduler_config"}),
        (wrong_transition, "hybrid", {"reverse"}),
    ],
)
def test_a_break_that_shows_on_a_checkpoint_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
    data: TokenData,
    break_it: Callable[[pytest.MonkeyPatch], None],
    objective: str,
    caught: set[str],
) -> None:
    break_it(monkeypatch)
    assert failed(of_checkpoint(checkpoints[objective], data)) >= caught


# The certificate.


def toy_checks() -> Iterator[Check]:
    def fail(value: float) -> float:
        raise ZeroDivisionError("by 0")

    rules = [
        Rule(name=name, claim="it is 0", oracle="0", tolerance=0.5, figure=figure)
        for name, figure in (
            ("good", lambda value: value),
            ("bad", lambda value: value + 1.0),
            ("nan", lambda value: float("nan")),
            ("broken", fail),
        )
    ]
    return apply(rules, "toy", 0.5)


def test_a_certificate_says_what_failed_and_survives_the_file(tmp_path: Path) -> None:
    checks = list(toy_checks())
    assert failed(checks) == {"bad", "nan", "broken"}
    certificate.write_certificate(tmp_path, checks, about={"checkpoint": "here"})
    text = json.loads((tmp_path / "certificate.json").read_text(), parse_constant=pytest.fail)
    assert (text["verify_passed"], text["verify_failed"], text["checkpoint"]) == (1, 3, "here")
    assert [entry["passed"] for entry in text["checks"]] == [True, False, False, False]
    assert certificate.read_certificate(tmp_path) == checks
    assert certificate.read_certificate(tmp_path / "none") == []
    in_pipeline = [{"certificate": str(tmp_path / "certificate.json")}]
    assert tables.failure_of(in_pipeline) == certificate.failure(checks)
    assert tables.failure_of([{}]) is None
    assert tables.verified_lines(checks) == ["toy  1 of 4 checks passed"]
    message = certificate.failure(checks)
    assert message is not None
    assert "3 of 4 checks failed" in message
    assert "toy/bad: it is 0; off by 1.5, at most 0.5" in message
    assert "toy/broken: it is 0; ZeroDivisionError: by 0" in message
    assert certificate.failure(checks[:1]) is None
    ((title, header, rows),) = certificate.tables(checks)
    assert title == "Certificate of the installed code: 3 of 4 checks failed"
    assert header[-1] == "toy"
    assert [row[-1] for row in rows] == [
        0.5,
        "FAILED: 1.5",
        "FAILED: not finite",
        "FAILED: ZeroDivisionError: by 0",
    ]


@pytest.mark.slow
def test_the_job_certifies_and_fails_on_a_break(
    in_this_process: None,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    # A new store is made while the job runs, which takes long on busy cores.
    monkeypatch.setattr("tokendiff.tracking.mlflow_delivery._LAST_TRY_SECONDS", 120.0)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def run(out: Path, *flags: str) -> int:
        return evaluate_job.main(
            [
                *("--checkpoint_path", str(checkpoints["udlm"]), "--output_dir", str(out)),
                *("--num_mask_samples", "1", "--cpus_per_worker", "0.5", "-o"),
                *(f"tracking.uri={store}", *flags),
            ]
        )

    out = tmp_path / "sound"
    assert run(out, "--verify") == 0
    printed = capsys.readouterr().out
    assert "checkpoint            11 of 11 checks passed" in printed
    manifest = load_manifest(out)
    assert "certificate.json" in manifest.files
    assert manifest.metadata["metrics"]["verify_failed"] == 0
    page = (out / "report" / "index.html").read_text()
    assert "Certificate of the installed code: all 61 checks passed" in page
    assert "Certificate of the checkpoint: all 11 checks passed" in page
    assert "uniform (alpha_schedule cosine" in page
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tokendiff"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.data.metrics["evaluate/verify_passed"] == 72
    assert 0 < tracked.data.metrics["verify/uniform/sampler"] < 0.04
    assert "certificate.json" in {item.path for item in client.list_artifacts(tracked.info.run_id)}

    # Without the flag the certificate of before is no part of the folder any more.
    assert run(out, "--enabled", "false") == 0
    assert "certificate.json" not in load_manifest(out).files
    assert not (out / "certificate.json").exists()
    capsys.readouterr()

    # A worker finds something wrong: all is written, and the job fails.
    from tokendiff.cluster import evaluate as cluster_evaluate

    monkeypatch.setattr(cluster_evaluate, "verify", lambda *args, **kwargs: list(toy_checks()))
    assert run(tmp_path / "broken", "--verify", "--enabled", "false", "--json") == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["verify_passed"], result["verify_failed"]) == (1, 3)
    assert "error: verification: 3 of 4 checks failed" in captured.err
    assert "toy/bad" in captured.err
    assert "Traceback" not in captured.err
    assert load_manifest(tmp_path / "broken").metadata["metrics"]["verify_failed"] == 3
    assert "3 of 4 checks failed" in (tmp_path / "broken/report/index.html").read_text()
