"""A pipeline file's `stages` and `matrix`: what they mean, and what is said of mistakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.graph import pipeline_stages, pipeline_variants
from pipelines.record import StageRecord
from pipelines.stage import Stage
from pipelines.tables import figure_lines
from tokendiff.artifacts.manifest import commit
from tokendiff.cluster import session
from tokendiff.config.loader import load_config, to_yaml
from tokendiff.config.stage_graph import agreement_problems
from tokendiff.errors import InputError
from tokendiff.training import memory

FILE = """\
name: toy
preprocess: {tokenizer_name_or_path: bytes, max_length: 32}
train:
  model_name_or_path: builtin:bert-tiny
  max_train_steps: 4
stages:
  judge:
    kind: evaluate
    inputs: {checkpoint: model, data: corpus}
  corpus: {kind: preprocess}
  model:
    kind: train
    inputs: {data: corpus}
    config:
      objective: udlm
      max_train_steps: 6
matrix:
  train.learning_rate: [1.0e-3, 2.0e-3]
  stages.model.config.objective.min_time: [1.0e-3, 1.0e-2]
"""
NO_MATRIX = FILE[: FILE.index("matrix:")]


def stages_of(folder: Path, text: str, *overrides: str) -> dict[str, Stage]:
    path = folder / "toy.yaml"
    path.write_text(text)
    stages = pipeline_stages(load_config(path, overrides), folder / "out")
    return {stage.title: stage for stage in stages}


def keys(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    return {title: stage.key for title, stage in stages_of(folder, text, *overrides).items()}


def test_stages_run_behind_their_inputs_with_their_own_config(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, NO_MATRIX)
    assert list(stages) == ["corpus", "model", "judge"]
    model, judge = stages["model"], stages["judge"]
    assert model.settings["objective"]["name"] == "udlm"
    assert model.settings["max_train_steps"] == 6  # its own, not the section's
    assert model.settings["model_name_or_path"] == "builtin:bert-tiny"  # the section's
    assert model.inputs["data"] is stages["corpus"]
    assert judge.folder == tmp_path / "out" / f"judge-{judge.key}"


def test_only_runs_that_begin_a_draft_have_a_key_of_its_new_start(tmp_path: Path) -> None:
    """Results of the start before it are not taken for theirs; all others are what they were."""
    text = """
name: drafts
stages:
  corpus: {kind: preprocess, config: {use_dummy_data: true}}
  other: {kind: train, inputs: {data: corpus}, config: {model_name_or_path: org/model}}
  new:
    kind: train
    inputs: {data: corpus}
    config: {objective: dflash, target_model_id: org/model}
  onward:
    kind: train
    inputs: {data: corpus, draft: new}
    config: {objective: dflash, target_model_id: org/model}
"""
    stages = stages_of(tmp_path, text)
    versions = {name: stage.version for name, stage in stages.items()}
    assert versions == {"corpus": 1, "other": 1, "new": 2, "onward": 1}
    before = replace(stages["new"], version=1)
    assert before.key != stages["new"].key
    inputs = {**stages["onward"].inputs, "draft": before}
    assert replace(stages["onward"], inputs=inputs).key != stages["onward"].key


def test_it_is_known_beforehand_which_rows_are_judged(tmp_path: Path) -> None:
    """Without data of its own, an evaluation is on what the checkpoint was trained on."""
    as_trained = NO_MATRIX.replace(", data: corpus}", "}")
    trained_elsewhere = as_trained.replace("    inputs: {data: corpus}\n", "").replace(
        "config:\n", f"config:\n      data_path: {tmp_path}\n"
    )
    for text, elsewhere in ((NO_MATRIX, None), (as_trained, None), (trained_elsewhere, tmp_path)):
        stages = stages_of(tmp_path, text, "stages.judge.config.split=train")
        folder = elsewhere or stages["corpus"].result_folder
        assert stages["judge"].judges == (folder, "train")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("{objective: hybrid}", {"name": "hybrid", "lambda_conf": 0.0}),  # its own defaults
        ("{objective: {name: hybrid}}", {"name": "hybrid", "lambda_conf": 0.0}),
        ("{objective: mdlm}", {"name": "mdlm", "lambda_conf": 0.5}),  # nothing new is said
        ("{objective: {eps: 0.01}}", {"name": "mdlm", "lambda_conf": 0.5, "eps": 0.01}),
    ],
)
def test_another_objective_takes_nothing_from_the_sections(
    tmp_path: Path, own: str, expected: dict[str, Any]
) -> None:
    text = f"""\
train: {{objective: {{name: mdlm, lambda_conf: 0.5}}}}
stages:
  corpus: {{kind: preprocess}}
  model: {{kind: train, inputs: {{data: corpus}}, config: {own}}}
"""
    objective = stages_of(tmp_path, text)["model"].settings["objective"]
    assert {name: objective[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.model.config.max_train_steps=7", {"model", "judge"}),
        ("train.learning_rate=1e-3", {"model", "judge"}),
        ("train.max_train_steps=5", set()),  # the stage has its own
        ("stages.model.config.logging_steps=1", set()),
        ("stages.judge.config.seed=1", {"judge"}),
        ("preprocess.max_length=64", {"corpus", "model", "judge"}),
        ("stages.model.max_retries=0", set()),
        ("runner.timeout_s=5", set()),
    ],
)
def test_a_key_changes_with_its_own_config_and_with_its_inputs(
    tmp_path: Path, override: str, changed: set[str]
) -> None:
    before, after = keys(tmp_path, NO_MATRIX), keys(tmp_path, NO_MATRIX, override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_memory_is_planned_for_the_device_that_workers_will_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_memory, devices = memory.plan_memory, []

    def spy(*args: Any, **fields: Any) -> memory.MemoryPlan:
        devices.append(fields["device"].type)
        return plan_memory(*args, **fields)

    monkeypatch.setattr(memory, "plan_memory", spy)
    monkeypatch.setattr(session, "is_connected", lambda: False)  # other tests may have a Ray here
    for is_there in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda is_there=is_there: is_there)
        for asked in ("false", "true", "null"):
            model = stages_of(tmp_path, NO_MATRIX, f"cluster.use_gpu={asked}")["model"]
            assert "memory of a worker" in dict(model.preview(model))
    assert devices == ["cpu", "cuda", "cpu", "cpu", "cuda", "cuda"]


def test_four_sections_are_four_stages(tmp_path: Path) -> None:
    """A file without stages, and one that spells them out: the same keys."""
    spelt_out = """\
stages:
  preprocess: {kind: preprocess}
  train: {kind: train, inputs: {data: preprocess}}
  generate: {kind: generate, inputs: {checkpoint: train}}
  evaluate: {kind: evaluate, inputs: {checkpoint: train, data: preprocess, samples: generate}}
"""
    assert keys(tmp_path, spelt_out) == keys(tmp_path, "name: toy\n")


def test_a_chain_of_models_and_text_from_samples(tmp_path: Path) -> None:
    text = """\
preprocess: {tokenizer_name_or_path: bytes, max_length: 32, dataset_name: text, data_files: [a.txt]}
generate: {output_format: parquet}
stages:
  corpus: {kind: preprocess, config: {dataset_name: builtin, data_files: []}}
  first: {kind: train, inputs: {data: corpus}}
  written: {kind: regenerate, inputs: {checkpoint: first}, config: {num_samples: 8}}
  own: {kind: preprocess, inputs: {text: written, tokenizer: first}}
  second: {kind: train, inputs: {data: own, init: first}}
"""
    before = keys(tmp_path, text)
    stages = stages_of(tmp_path, text)
    # Where inputs stand is no part of a key, and no key changes once they are there.
    stages["first"].result_folder.mkdir(parents=True)
    (stages["first"].result_folder / "config.json").write_bytes(b"{}")
    assert keys(tmp_path, text) == before
    after = keys(tmp_path, text, "stages.written.config.num_samples=9")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"written", "own", "second"}


def test_a_matrix_shares_what_is_equal(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(FILE)
    variants = pipeline_variants(load_config(path), tmp_path)
    assert [variant.values for variant in variants] == [
        {"learning_rate": rate, "min_time": time} for rate in (1e-3, 2e-3) for time in (1e-3, 1e-2)
    ]
    stages = stages_of(tmp_path, FILE)
    assert len(stages) == 1 + 4 + 4
    assert "corpus" in stages
    assert "model[learning_rate=0.001,min_time=0.01]" in stages
    assert {stage.name for stage in stages.values()} == {"corpus", "model", "judge"}
    # A variant is what its overrides would have made by themselves.
    overrides = ("train.learning_rate=2e-3", "stages.model.config.objective.min_time=1e-2")
    alone = keys(tmp_path, NO_MATRIX, *overrides)
    last = {stage.name: stage.key for stage in variants[-1].stages}
    assert last == alone


def test_an_axis_that_a_stage_does_not_see_makes_no_more_of_it(tmp_path: Path) -> None:
    text = NO_MATRIX + "matrix: {train.seed: [0, 1], evaluate.seed: [0, 1]}\n"
    titles = list(stages_of(tmp_path, text))
    assert sorted(title for title in titles if title.startswith("model")) == [
        "model[train.seed=0]",
        "model[train.seed=1]",
    ]
    assert sum(title.startswith("judge") for title in titles) == 4


def test_a_written_config_with_stages_loads_to_an_equal_one(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(FILE)
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


MISTAKES: list[tuple[str, str, str]] = [
    (
        "data: corpus}\n    config",
        "dat: corpus}\n    config",
        "13: stages.model.inputs.dat: train has no such input; did you mean 'data'?",
    ),
    (
        "kind: train",
        "kind: trian",
        "12: stages.model.kind: must be one of 'preprocess', 'cache_target_states', 'train', "
        "'regenerate', 'generate', 'evaluate', 'frontier', 'promote', got 'trian'; did you mean "
        "'train'?",
    ),
    (
        "data: corpus}\n    config",
        "data: corps}\n    config",
        "13: stages.model.inputs.data: no stage 'corps'; did you mean 'corpus'?",
    ),
    (
        "checkpoint: model",
        "checkpoint: corpus",
        "9: stages.judge.inputs.checkpoint: stage 'corpus' is of kind preprocess; "
        "this must be one of train",
    ),
    (
        "max_train_steps: 6",
        "max_train_stepz: 6",
        "16: stages.model.config.max_train_stepz: unknown field; did you mean 'max_train_steps'?",
    ),
    (
        "max_train_steps: 6",
        "max_train_steps: 0",
        "16: stages.model.config.max_train_steps: must be >= 1, got 0",
    ),
    (
        "max_train_steps: 6",
        "lr_warmup_steps: 50",
        "16: stages.model.config: lr_warmup_steps 50 exceeds max_train_steps 4",
    ),
    (
        "objective: udlm",
        "objective: ulm",
        "15: stages.model.config.objective: must be one of 'mdlm', 'udlm', 'hybrid'",
    ),
    (
        "objective: udlm",
        "objective: {name: hybrid, alpha_schedule: cosine}",
        "15: stages.model.config.objective.alpha_schedule: not a field of hybrid, only of",
    ),
    (
        "objective: udlm",
        "data_path: here",
        "15: stages.model.config.data_path: is what the input 'data' is for",
    ),
    (
        "objective: udlm",
        "output_dir: here",
        "15: stages.model.config.output_dir: is decided by the pipeline",
    ),
    (
        "corpus: {kind: preprocess}",
        "corpus: {kind: preprocess, max_length: 3}",
        "10: stages.corpus.max_length: unknown field; a stage's own fields go into "
        "config: {max_length: ...}",
    ),
    (
        "    inputs: {data: corpus}\n",
        "",
        "11: stages.model: needs inputs: {data: ...}, a stage of kind preprocess",
    ),
    (
        "  corpus: {kind",
        "  cor pus: {kind",
        "10: stages.cor pus: a stage's name is made of letters",
    ),
    (
        "[1.0e-3, 1.0e-2]",
        "[]",
        "19: matrix.stages.model.config.objective.min_time: must list one value or more, each once",
    ),
    (
        "[1.0e-3, 2.0e-3]",
        "[1.0e-3, 1.0e-3]",
        "18: matrix.train.learning_rate: must list one value or more, each once",
    ),
    ("[1.0e-3, 2.0e-3]", "[1.0e-3, x]", "18: train.learning_rate: must be a number, got 'x'"),
    (
        "[1.0e-3, 1.0e-2]",
        "[1.0e-3, 7]",
        "19: stages.model.config.objective.min_time: must be < 1.0, got 7",
    ),
    (
        "train.learning_rate: [",
        "train.learning_rat: [",
        "18: train.learning_rat: unknown field; did you mean 'learning_rate'?",
    ),
    (
        "train.learning_rate: [1.0e-3, 2.0e-3]",
        "cluster.num_workers: [1, 2]",
        "18: matrix.cluster.num_workers: is no axis: write section.field, of preprocess",
    ),
    (
        "stages.model.config.objective.min_time: [1.0e-3, 1.0e-2]",
        "stages.model.kind: [train]",
        "19: matrix.stages.model.kind: is no axis: of a stage's own fields write "
        "stages.NAME.config.FIELD",
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES)
def test_a_mistake_is_told_at_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    path = tmp_path / "toy.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(InputError) as error:
        load_config(path)
    assert any(line.startswith(f"{path}:{said}") for line in str(error.value).split("\n"))


def test_a_cycle_is_told_once_with_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("""\
stages:
  corpus: {kind: preprocess, inputs: {text: written}}
  model: {kind: train, inputs: {data: corpus}}
  written: {kind: generate, inputs: {checkpoint: model}}
  judge: {kind: evaluate, inputs: {checkpoint: model}}
""")
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}:2: stages.corpus.inputs: a stage cannot be its own input: "
        "corpus <- written <- model <- corpus"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.model.config.max_train_steps=0", "must be >= 1, got 0"),
        ("stages.model.config.objective.max_loss_weight=-1", "must be > 0.0, got -1"),
        ("stages.modl.config.seed=1", "no stage 'modl'; did you mean 'model'?"),
        ("stages.model.config.seet=1", "unknown field; did you mean 'seed'?"),
    ],
)
def test_a_mistake_in_an_override_is_told_with_it(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(FILE)
    with pytest.raises(InputError) as error:
        load_config(path, [override])
    assert str(error.value) == f"-o {override.split('=')[0]}: {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.judge.config.split=heldout", None),
        ("preprocess.heldout_fraction=0.0", "stages.judge: evaluate.split 'heldout': preprocess"),
        ("stages.corpus.config={heldout_fraction: 1.0}", "stages.model: preprocess.heldout_frac"),
        ("stages.model.config.model_name_or_path=builtin:x", "stages.model: train.model_name_or"),
        ("cluster.num_workers=9", "stages.model: cluster.num_workers 9 exceeds the 8 rows"),
    ],
)
def test_stages_that_do_not_go_together(tmp_path: Path, override: str, said: str | None) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(NO_MATRIX)
    config: Any = load_config(path, [override])
    if said is None:
        assert pipeline_stages(config, tmp_path)
        return
    with pytest.raises(InputError, match=f"^{said}"):
        pipeline_stages(config, tmp_path)


ALONE = """\
stages:
  written: {kind: generate, config: {checkpoint_path: elsewhere, seq_len: 1000}}
"""


def test_samples_of_a_checkpoint_from_elsewhere_are_held_against_no_training(
    tmp_path: Path,
) -> None:
    """Only of what the pipeline itself trains does it say how long its rows are."""
    of_pipeline = NO_MATRIX + "  written: {kind: generate, inputs: {checkpoint: model}, config: "
    with pytest.raises(InputError, match=r"^stages.written: generate.seq_len 1000 exceeds"):
        stages_of(tmp_path, of_pipeline + "{seq_len: 1000}}\n")
    assert set(stages_of(tmp_path, ALONE)) == {"written"}


def test_a_problem_of_a_file_without_stages_names_the_section_alone(tmp_path: Path) -> None:
    sections = "train: {model_name_or_path: builtin:bert-tiny}\ngenerate: {seq_len: 1000}\n"
    with pytest.raises(InputError, match=r"^generate.seq_len 1000 exceeds"):
        stages_of(tmp_path, sections)


PROMOTED = """\
stages:
  corpus: {kind: preprocess}
  model: {kind: train, inputs: {data: corpus}, config: {objective: mdlm}}
  judge: {kind: evaluate, inputs: {checkpoint: model, data: corpus}}
  promote: {kind: promote, inputs: {candidate: judge}}
"""


@pytest.mark.parametrize(
    ("objective", "section", "is_served"),
    [
        ("mdlm", "", True),
        ("{name: dflash}", "", False),
        ("mdlm", "generate: {sampler: {name: dflash}}\n", False),
        ("{name: dflash}", "generate: {sampler: {name: dflash}}\n", True),
    ],
)
def test_a_draft_is_served_by_its_own_sampler_and_nothing_else_is(
    tmp_path: Path, objective: str, section: str, is_served: bool
) -> None:
    text = section + PROMOTED.replace("objective: mdlm", f"objective: {objective}")
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    problems = agreement_problems(load_config(path))
    served = [text for text in problems if "is to be served with" in text]
    assert bool(served) != is_served


def test_a_promotion_of_a_checkpoint_from_elsewhere_is_not_held_against_a_sampler(
    tmp_path: Path,
) -> None:
    path = tmp_path / "toy.yaml"
    judged = "  judge: {kind: evaluate, config: {checkpoint_path: elsewhere}}\n"
    path.write_text(
        f"generate: {{sampler: {{name: dflash}}}}\nstages:\n{judged}"
        "  promote: {kind: promote, inputs: {candidate: judge}}\n"
    )
    assert agreement_problems(load_config(path)) == []


DRAFTED = """\
stages:
  corpus: {kind: preprocess}
  target: {kind: train, inputs: {data: corpus}}
  draft: {kind: train, inputs: {data: corpus}, config: {seed: 1}}
  decode:
    kind: generate
    inputs: {target: target, draft: draft}
    config: {sampler: {name: dflash}, num_samples: 2}
"""


def test_samples_come_from_a_draft_and_its_target(tmp_path: Path) -> None:
    before = keys(tmp_path, DRAFTED)
    after = keys(tmp_path, DRAFTED, "stages.draft.config.seed=2")
    assert {name for name in before if before[name] != after[name]} == {"draft", "decode"}
    published = DRAFTED.replace("target: target, draft", "draft").replace(
        "num_samples: 2", "target_model_id: Qwen/Qwen3-4B"
    )
    assert list(stages_of(tmp_path, published)) == ["corpus", "target", "draft", "decode"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("target: target, draft: draft", "draft: draft", "needs the input 'target', or target_mod"),
        ("target: target, draft: draft", "target: target", "needs the input 'draft', or draft_mod"),
        ("{target: target,", "{checkpoint: target, target: target,", "input 'checkpoint' has no"),
        (
            "{target: target, draft: draft}\n    config: {sampler: {name: dflash}",
            "{checkpoint: target, draft: draft}\n    config: {sampler: {name: ar}",
            "input 'draft' has no effect with sampler 'ar'",
        ),
    ],
)
def test_models_that_a_sampler_does_not_take_are_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in DRAFTED
    with pytest.raises(InputError, match=f"stages.decode: .*{says}"):
        stages_of(tmp_path, DRAFTED.replace(old, new))


def test_another_model_may_write_the_text_that_is_trained_on(tmp_path: Path) -> None:
    text = """\
stages:
  written: {kind: regenerate, config: {model_id: Qwen/Qwen3-4B, sampler: {name: ar}}}
  own: {kind: preprocess, inputs: {text: written}, config: {tokenizer_name_or_path: Qwen/Qwen3-4B}}
"""
    assert list(stages_of(tmp_path, text)) == ["written", "own"]


def test_bad_rows_are_counted_where_a_person_looks_and_change_no_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    own = ("preprocess.dataset_name=text", f"preprocess.data_files=[{tmp_path}/a.txt]")
    more = (*own, "preprocess.max_errors=5")
    assert keys(tmp_path, "name: toy", *more) == keys(tmp_path, "name: toy", *own)
    stage = stages_of(tmp_path, "name: toy")["preprocess"]
    split = {"documents": 1, "rows": 2, "tokens": 1234}
    metadata: dict[str, Any] = {
        "splits": {"train": split, "heldout": split},
        "dropped": {"empty": 0, "not_text": 0},
        "padded_fraction": 0.0,
    }

    def shown(**more: int) -> list[tuple[str, str]]:
        commit(stage.output, kind="tokens", metadata={**metadata, **more})
        record = StageRecord(
            stage="a", kind="preprocess", key="", folder="", result=stage.result(stage)
        )
        return figure_lines([record])

    stage.output.mkdir(parents=True)
    alone = ("data", "1,234 training tokens in 2 rows, 1,234 held out, 0.00 % padding")
    assert shown() == [alone]  # an earlier version's
    assert shown(errors=0) == [alone]
    assert shown(errors=3) == [alone, ("left out", f"3 bad rows, named in {stage.output}/errors")]
    assert stage.result(stage)["errors"] == 3


def test_figures_of_tasks_are_shown_with_their_chance() -> None:
    figures = {
        **{"report": "page", "nats_per_token": 2.0, "standard_error": 0.1},
        **{"unigram_entropy_nats": 3.0, "bits_per_byte": None, "unserved_requests": 1200},
        **{"quiz/acc": 0.5, "quiz/acc_standard_error": 0.0625, "text/bits_per_byte": 4.25},
    }
    record = StageRecord(stage="a", kind="evaluate", key="", folder="", result=figures)
    lines = figure_lines([record])
    assert [text for label, text in lines if label == "task"] == [
        "quiz/acc 0.5 ± 0.062",
        "text/bits_per_byte 4.25",
    ]
    assert ("not served", "1,200 requests of tasks, which tasks.json names") in lines


def test_a_folder_that_is_called_like_a_kind_of_text_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    of_text = ("preprocess.dataset_name=text", "preprocess.data_files=[a.txt]")
    of_folder = ("preprocess.dataset_name=./builtin",)

    def made() -> list[str]:
        overrides = ((), ("preprocess.tokenizer_name_or_path=bpe",), of_text, of_folder)
        return [keys(tmp_path, NO_MATRIX, *given)["corpus"] for given in overrides]

    before = made()
    for name in ("builtin", "text", "bytes", "bpe"):
        Path(name).mkdir()
        Path(name, "notes").write_text("not an input")
    assert [key == old for key, old in zip(made(), before, strict=True)] == [True] * 3 + [False]


def test_another_task_file_is_another_evaluation(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "quiz.yaml"
    asked = [f"evaluate.{fields}" for fields in ("tasks=quiz", f"tasks_path={task.parent}")]
    task.write_text("task: quiz")
    plain, before = keys(tmp_path, NO_MATRIX), keys(tmp_path, NO_MATRIX, *asked)
    task.write_text("task: quiz\nrepeats: 2")
    after = keys(tmp_path, NO_MATRIX, *asked)
    assert len({found["judge"] for found in (plain, before, after)}) == 3
    assert plain["model"] == before["model"] == after["model"]
