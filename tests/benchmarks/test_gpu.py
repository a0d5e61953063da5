"""The command that proves the package on a card: whole on the CPU, and its parts by themselves. The
tests with the marker `gpu` are its proofs on a card.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import attention, command, mathematics, samplers, trainer
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.mathematics import OBJECTIVES
from benchmarks.gpu.models import PROVEN, Shape, causal_lm
from benchmarks.gpu.report import (
    ERROR,
    FAILS,
    HOLDS,
    MEASURED,
    NO_TIME,
    Case,
    Finding,
    run_case,
    within,
)
from benchmarks.gpu.roofline import Pass, block_diffusion_pairs, causal_pairs
from tokendiff.diffusion.attention_masks import block_diffusion, dense
from tokendiff.diffusion.kernels import AbsorbingKernel

ROOT = Path(__file__).parents[2]
CPU = Machine(torch.device("cpu"))
# A machine with a card may have torch, transformers and pytest, and none of these.
ABSENT = (
    *("ray", "mlflow", "datasets", "pydantic", "pydantic_core", "rich", "jinja2", "peft"),
    *("psutil", "accelerate", "lm_eval", "moto", "xdist", "pytest_timeout"),
)
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "


def run_without(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code where the libraries in ABSENT cannot be imported."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT + code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )


@pytest.mark.slow
def test_the_command_proves_everything_where_little_is_installed(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--minutes", "8", "--out", str(tmp_path)]
    done = run_without(f"from benchmarks.gpu.command import main; sys.exit(main({arguments!r}))")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(command.PARTS)
    assert all(row["verdict"] == HOLDS for row in rows if row["is_proof"])
    assert not [row for row in rows if row["verdict"] in (ERROR, NO_TIME)]
    assert {row["part"] for row in rows if row["is_proof"]} == set(command.PROOFS)
    proven = {row["name"] for row in rows}
    assert {f"objective {name}, bf16" for name in OBJECTIVES} <= proven
    page = (tmp_path / "gpu.md").read_text()
    assert page in done.stdout
    assert all(f"| {name} |" in page for name in proven)


@pytest.mark.slow
def test_tests_for_cards_are_collected_where_little_is_installed() -> None:
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    code = f"import pytest; sys.exit(pytest.main({options!r}))"
    done = run_without(code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu.py::test_proven_on_a_card[" in done.stdout


def proofs() -> dict[str, Any]:
    """Name -> part, of all that is proven."""
    parts = (mathematics, attention, samplers, trainer)
    return {case.name: part for part in parts for case in part.cases(CPU)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", proofs())
def test_proven_on_a_card(name: str) -> None:
    cases = proofs()[name].cases(Machine(torch.device("cuda", torch.cuda.current_device())))
    found = [case for case in cases if case.name == name]
    if not found:  # compilers have other names there
        pytest.skip("of the CPU alone")
    row = run_case("card", found[0], seconds_left=300.0)
    assert row.verdict == HOLDS, row.figure


def row_of(part: Any, name: str) -> Any:
    (case,) = [case for case in part.cases(CPU) if case.name == name]
    return run_case("any", case, seconds_left=300.0)


def test_a_wrong_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of(mathematics, "loss absorbing_cosine").verdict == HOLDS
    monkeypatch.setattr(AbsorbingKernel, "masked_loss_weight", lambda self, t: 1.0 / t)
    assert row_of(mathematics, "loss absorbing_cosine").verdict == FAILS


@pytest.mark.slow
def test_rounding_that_is_too_coarse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def coarse(query: Any, *args: Any, **kwargs: Any) -> Any:
        # What a card does to float32 that is allowed to round products.
        rounded = query if query.dtype == torch.float64 else query.bfloat16().to(query.dtype)
        return attend(rounded, *args, **kwargs)

    name = "flex, tiles, causal, packed"
    assert row_of(attention, name).verdict == HOLDS
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", coarse)
    assert row_of(attention, name).verdict == FAILS


def test_ties_are_told_from_wrong_rows() -> None:
    expected = [[1, 2], [3, 4], [5, 6], [7, 8]]
    ours = [[1, 2], [3, 9], [5, 6], [7, 8]]

    def moved(seed: int) -> list[list[int]]:
        return [[1, 2], [3, 7], [5, 6], [7, 8]] if seed == 2 else expected

    assert samplers.compared(ours, expected, moved).verdict == HOLDS
    assert samplers.compared(ours, expected, lambda seed: expected).verdict == FAILS
    most = [[0, 0]] * 4  # when all are ties nothing was compared
    assert samplers.compared(most, expected, lambda seed: most).verdict == FAILS


def test_a_row_that_goes_wrong_is_a_verdict_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Finding:
        raise RuntimeError("out of luck")

    def endless() -> Finding:
        while True:
            time.sleep(0.01)

    def cases(machine: Machine) -> Iterator[Case]:
        yield Case(name="broken", compared="x", run=broken, is_proof=True)
        yield Case(name="endless", compared="x", run=endless, most_seconds=0.1)
        yield Case(name="no number", compared="x", run=lambda: within(float("nan"), 1.0))
        yield Case(name="right", compared="x", run=lambda: within(0.5, 1.0), is_proof=True)

    monkeypatch.setattr(mathematics, "cases", cases)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", "mathematics"]
    assert command.main(arguments) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == [ERROR, NO_TIME, FAILS, HOLDS]
    assert "RuntimeError: out of luck" in rows[0]["figure"]
    assert "not proven on CPU" in capsys.readouterr().err
    assert command.main([*arguments, "--minutes", "0"]) == 1  # nothing is proven in no time
    last = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["verdict"] for row in last} == {NO_TIME}


def test_settings_are_those_of_the_config() -> None:
    from tokendiff.config.train import TrainConfig

    config = TrainConfig()
    settings = trainer.Settings()
    for field in fields(settings):
        assert getattr(settings, field.name) == getattr(config, field.name), field.name
    assert settings.rows_per_step == config.rows_per_step


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    length = 24
    model = causal_lm(PROVEN, "cpu", torch.float32)
    model.set_attn_implementation("eager")  # torch does not know what the others compute on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64))
    # Eager attention computes what the mask hides too.
    forward = Pass(shape=PROVEN, tokens=2 * length, pairs=2 * length**2, head_tokens=2 * length)
    assert counter.get_total_flops() == forward.operations


@pytest.mark.parametrize("block_length", [4, 8])
def test_pairs_are_those_of_the_mask(block_length: int) -> None:
    length = 32
    document = torch.zeros(1, length, dtype=torch.int64)
    block = torch.arange(length)[None] // block_length
    mask = dense(block_diffusion(document, block), 1, 2 * length, 2 * length)
    assert int(mask.sum()) == block_diffusion_pairs(length, block_length)
    assert causal_pairs(length) == int(torch.ones(length, length).tril().sum())


def test_the_sizes_are_the_published_ones() -> None:
    from benchmarks.gpu.models import QWEN3_06B, QWEN3_17B

    def weights(shape: Shape) -> int:
        from transformers import Qwen3ForCausalLM

        with torch.device("meta"):
            return sum(p.numel() for p in Qwen3ForCausalLM(shape.config()).parameters())

    assert weights(QWEN3_06B) == 596_049_920
    assert weights(QWEN3_17B) == 1_720_574_976


def test_peaks_are_found_by_the_name_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    h100s = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")
    alike = ("NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA A10G")
    for name in ("NVIDIA H200", *h100s, "NVIDIA L40S", "NVIDIA A100-SXM4-40GB", *alike, "Elk"):
        machine = Machine(torch.device("cpu"))
        machine.__dict__["name"] = name
        found[name] = machine.stated
    assert found["NVIDIA H200"] == (9.89e14, 4.8e12)
    assert found["NVIDIA H100 80GB HBM3"] == (9.89e14, 3.35e12)
    assert found["NVIDIA H100 PCIe"] == (7.56e14, 2.0e12)
    assert found["NVIDIA L40S"] == (3.62e14, 8.64e11)
    assert found["NVIDIA A100-SXM4-40GB"] == (3.12e14, 1.56e12)
    assert found["NVIDIA GH200 480GB"] == (9.89e14, 4.0e12)
    # Other cards than the L4 and the A10, of which the table says nothing.
    assert found["NVIDIA L40"] is found["NVIDIA A10G"] is found["Elk"] is None


def test_a_measured_case_has_no_limit() -> None:
    case = Case(name="x", compared="y", run=lambda: Finding(figure="1", limit="", verdict=MEASURED))
    assert run_case("p", case, seconds_left=1.0).verdict == MEASURED
    assert run_case("p", case, seconds_left=0.0).verdict == NO_TIME
