"""Two runs on one page, read back from what jobs leave in their folders."""

import re
from pathlib import Path

import pytest

from jobs import pipeline
from pipelines.side_by_side import Run, _names, side_by_side
from tests.evaluation.test_report import Page
from tokendiff.artifacts.manifest import commit
from tokendiff.evaluation.inputs import KIND
from tokendiff.tracking.run_log import LOG_NAME, RunLog


def run_folder(folder: Path, *, loss: float, bound: float) -> Path:
    with RunLog(folder / "train-1" / "run" / LOG_NAME) as log:
        log.write("start", step=0, max_train_steps=2)
        for step in (1, 2):
            log.write("metrics", step=step, loss=loss / step, tokens_per_second=10.0)
            log.write("heldout", step=step, heldout_nats_per_token=loss, heldout_standard_error=0.1)
    evaluation = folder / "evaluate-1"
    evaluation.mkdir()
    commit(evaluation, kind=KIND, metadata={"metrics": {"nats_per_token": bound, "rows": 7}})
    return folder


def test_a_page_holds_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_folder(tmp_path / "one", loss=4.0, bound=2.5)
    other = run_folder(tmp_path / "other", loss=3.0, bound=2.25)
    page = tmp_path / "pages" / "both.html"
    assert pipeline.main(["compare", str(one), "--with", str(other), "--page", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    found = Page(page)
    plots = [str(div["aria-label"]) for div in found.named("div", "plot")]
    assert [re.findall(r"From (\d) ", label) for label in plots] == [["4", "3"], ["4", "3"]]
    assert "one: From 4" in plots[0]
    assert "other: From 3" in plots[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.read_text(), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    assert ["nats_per_token", "2.5", "2.25", "-0.25"] in cells
    assert ["rows", "7", "7", "0"] in cells


def test_a_run_without_an_evaluation_has_the_figures_of_its_log(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "one", loss=4.0, bound=2.5)
    (folder / "evaluate-1" / "MANIFEST.json").unlink()
    found = Run.read(folder, name="one")
    assert found.figures == {"step": 2, "loss": 2.0, "tokens_per_second": 10.0}
    assert found.loss == [(1, 4.0), (2, 2.0)]


def test_runs_without_figures_have_no_table_of_them() -> None:
    one = Run(name="one", loss=[], heldout=[])
    assert not side_by_side(one, one).tables


def test_runs_are_called_by_what_differs_of_their_paths() -> None:
    assert _names(Path("/a/one"), Path("/a/other")) == ("one", "other")
    assert _names(Path("/a/one/out"), Path("/a/other/out")) == ("one", "other")
    assert _names(Path("/a/one"), Path("/a/one/out")) == ("one", "out")


def test_a_folder_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["compare", str(tmp_path), "--with", str(tmp_path)]) == 2
    assert "no run has left a log or a result there" in capsys.readouterr().err


def test_a_link_to_itself_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    (run := tmp_path / "run").mkdir()
    with RunLog(run / LOG_NAME) as log:
        log.write("metrics", step=1, loss=2.0)
    assert pipeline.main(["compare", str(tmp_path), "--with", str(loop)]) == 2
    assert f"error: {loop}: no run has left a log" in capsys.readouterr().err


def test_samples_that_are_gone_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "one", loss=4.0, bound=2.5)
    samples = folder / "generate-1"
    samples.mkdir()
    (samples / "part-00000.jsonl").write_text("{}\n")
    commit(samples, kind="samples")
    (samples / "part-00000.jsonl").unlink()
    assert pipeline.main(["compare", str(folder), "--with", str(folder)]) == 1
    assert "part-00000.jsonl is missing, though its MANIFEST lists it" in capsys.readouterr().err
