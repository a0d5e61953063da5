"""The report, read back the way a browser and a person would."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tokendiff.evaluation.report import (
    Denoising,
    Report,
    explain_bound,
    render_page,
    write_report,
)

HOSTILE = "</script><img src=x onerror=alert(1)><!-- &amp; '\" {{ 7 * 7 }} $\\frac$ \u2028"
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and what stands in scripts; tags must balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: dict[str | None, str] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            name = attributes.get("id")
            self.scripts[name] = self.scripts.get(name, "") + data
        elif tag != "style":
            self.text += data

    def named(self, tag: str, css_class: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag
            and (css_class is None or css_class in (attributes.get("class") or "").split())
        ]


def denoising(text: str = " world") -> Denoising:
    return Denoising(
        frames=[[5, 0, 0], [5, 0, 7], [5, 6, 7]],
        times=[1.0, 0.5, 0.0],
        vocabulary={5: "hello", 6: text, 7: "\x00\n"},
        mask_token_id=0,
        num_prompt_tokens=1,
    )


def full_report(text: str) -> Report:
    """`text` in every place that takes one."""
    return Report(
        title=text,
        subtitle=text,
        summary=[(text, text, text)],
        explanation=text,
        loss_curve=[(1, 3.0), (2, 2.0)],
        loss_reference=(text, 2.5),
        curves={text: [(1, 1.0)]},
        metrics={text: 1.0},
        samples=[
            {"id": text, "prompt": None, "text": text, "num_model_calls": 3, "seconds": 1.5},
            {"id": 1, "prompt": text, "text": text, "num_model_calls": 3, "seconds": 1.5},
            {"id": 2, "prompt": text, "text": "other", "num_model_calls": 3, "seconds": 1.5},
        ],
        denoising=denoising(text),
        tables=[(text, [text], [[text]])],
        config_yaml=text,
    )


def write(folder: Path, report: Report) -> Page:
    return Page(write_report(folder, report))


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = write_report(tmp_path, full_report("plain"))
    assert path == tmp_path / "index.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "loss_curve.png"]
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", source)
    page = Page(path)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not attributes.keys() & {
            "src",
            "href",
            "xlink:href",
            "srcset",
            "action",
            "style-src",
        }
    policies = [a["content"] for a in page.named("meta") if "http-equiv" in a]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])


def test_hostile_text_is_shown_and_inert_everywhere(tmp_path: Path) -> None:
    harmless = write(tmp_path / "harmless", full_report("plain"))
    hostile = write(tmp_path / "hostile", full_report(HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    assert [a.keys() for _, a in hostile.elements] == [a.keys() for _, a in harmless.elements]
    assert hostile.text.count(HOSTILE) == harmless.text.count("plain")
    assert hostile.scripts[None] == harmless.scripts[None]
    assert json.loads(hostile.scripts["denoising"])["vocabulary"]["6"] == HOSTILE
    assert not re.search("[<>&\u2028]", hostile.scripts["denoising"])


@pytest.mark.slow
def test_nothing_turns_the_direction_of_text_and_no_link_is_made(tmp_path: Path) -> None:
    """In any place: a text that shows another order of words than it has, or hides some."""
    controls = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    turned = "a" + "".join(map(chr, controls)) + "b javascript:alert(1) data:text/html,x"
    page = write(tmp_path, full_report(turned))
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not [hex(code) for code in controls if chr(code) in source]
    shown = "a" + "".join(f"[U+{code:04X}]" for code in controls) + "b javascript:alert(1)"
    harmless = write(tmp_path / "harmless", full_report("plain"))
    assert page.text.count(shown) == harmless.text.count("plain")
    assert json.loads(page.scripts["denoising"])["vocabulary"]["6"].startswith(shown)
    assert not {name for _, a in page.elements for name in a if name.startswith("on")}
    # Joiners, which languages and emojis need, stay.
    assert "\u200d" in write(tmp_path / "joined", full_report("a\u200db")).text


def test_held_out_rows_are_drawn_beside_the_loss(tmp_path: Path) -> None:
    report = Report(title="t", loss_curve=[(10, 3.0), (20, 2.0)])
    alone = write(tmp_path / "alone", report)
    beside = write(tmp_path / "beside", replace(report, heldout_curve=[(0, 4.0), (20, 2.5)]))
    assert not alone.named("path", "heldout")
    line, dots = beside.named("path", "heldout")
    # From the left edge, above all else, to the right edge; the loss begins in the middle.
    assert re.fullmatch(r"M0\.0 [0-9.]+L1000\.0 [0-9.]+", str(line["d"]))
    assert str(beside.named("path", "line")[0]["d"]).startswith("M500.0 ")
    assert len(str(dots["d"]).split("M")) == 3
    first, last = (float(point.split(" ")[1]) for point in str(line["d"])[1:].split("L"))
    assert first < last
    assert "held out" in beside.text
    assert "held out" not in alone.text
    longer = write(tmp_path / "longer", replace(report, heldout_curve=[(0, 4.0), (40, 2.5)]))
    assert str(longer.named("path", "line")[0]["d"]).startswith("M250.0 ")


def test_frames_survive_the_page(tmp_path: Path) -> None:
    page = write(tmp_path, Report(title="t", denoising=denoising()))
    data = json.loads(page.scripts["denoising"])
    assert data["frames"] == denoising().frames
    assert data["times"] == denoising().times
    assert data["vocabulary"] == {"5": "hello", "6": " world", "7": "\u2400\n"}
    assert (data["mask_token_id"], data["num_prompt_tokens"]) == (0, 1)
    slider = page.named("input")[0]
    assert (slider["min"], slider["max"], slider["type"]) == ("0", "2", "range")
    assert slider["aria-label"]
    identifiers = {a["id"] for _, a in page.elements if "id" in a}
    used = set(re.findall(r'getElementById\("(\w+)"\)', page.scripts[None]))
    assert used <= identifiers
    assert "prefers-reduced-motion" in page.scripts[None]


def test_noise_of_other_tokens_is_not_called_masked(tmp_path: Path) -> None:
    frames = [[5, 6, 7], [5, 6, 6], [5, 5, 6]]
    without = write(tmp_path, Report(title="t", denoising=replace(denoising(), frames=frames)))
    assert "masked" not in without.text.lower()
    assert "The noise is other tokens" in without.text
    assert "still masked" in write(tmp_path, Report(title="t", denoising=denoising())).text


@pytest.mark.slow
def test_text_is_kept_and_the_prompt_told_apart(tmp_path: Path) -> None:
    def sample(prompt: str | None, text: str, **more: Any) -> dict[str, Any]:
        known = {"id": 0, "prompt": prompt, "text": text, "num_model_calls": 3, "seconds": 0.5}
        return {**known, **more}

    def shown(prompt: str | None, text: str, **more: Any) -> list[str]:
        path = write_report(tmp_path, Report(title="t", samples=[sample(prompt, text, **more)]))
        blocks = re.findall(r"<pre.*?</pre>", path.read_text(encoding="utf-8"), re.DOTALL)
        return [re.sub(r"<span>|</?pre[^>]*>", "", block) for block in blocks]

    given = '<span class="prompt">%s</span>'
    assert shown(None, "\n  a\n\tb ") == ["\n  a\n\tb </span>"]
    assert shown("  a\n", "  a\n b\r\x7f") == [given % "  a\n" + " b\u240d\u2421</span>"]
    assert shown("A B", "a b c") == [given % "A B", "a b c</span>"]  # a lower-casing tokenizer
    assert shown("A?", "user A? bot B", completion="B") == [given % "A?", "B</span>"]  # a chat
    assert shown("A?", "user A? bot B") == [given % "A?", "user A? bot B</span>"]
    assert shown(None, "\ud800") == ["?</span>"]  # no UTF-8 file can hold a lone surrogate


def test_every_value_appears_and_nan_is_said(tmp_path: Path) -> None:
    metrics: dict[str, float] = {
        "bound_nats_per_token": 4.3123456,
        "perplexity": 74.61,
        "tokens": 1234567,
        "rate": 2.5e-7,
        "lost": math.nan,
        "gone": math.inf,
        "below": -math.inf,
        "huge": 1e300,
        "numpy": np.float64(0.5),
    }
    report = Report(
        title="A run",
        subtitle="its checkpoint",
        summary=[("Bound", "4.31", "nats per token")],
        explanation="It has learnt.",
        metrics=metrics,
        tables=[("Speed", ["what", "ratio"], [["plain", 1.0], ["Ray", 0.9876543]])],
        config_yaml="train:\n  seed: 17\n",
    )
    page = write(tmp_path, report)
    expected = ["A run", "its checkpoint", "Bound", "4.31", "nats per token", "It has learnt."]
    expected += [*metrics, "4.31235", "74.61", "1,234,567", "2.5e-07", "not a number", "infinite"]
    expected += [
        "minus infinite",
        "1e+300",
        "0.5",
        "Speed",
        "ratio",
        "Ray",
        "0.987654",
        "train:\n  seed: 17\n",
    ]
    for text in expected:
        assert text in page.text, text
    assert "nan" not in page.text.lower().replace("nats", "")


def test_what_is_empty_is_left_out(tmp_path: Path) -> None:
    page = write(tmp_path, Report(title="only a title", loss_curve=[(1, math.nan)]))
    assert not page.scripts
    assert not page.named("section")
    assert page.text.split() == ["only", "a", "title"] * 2  # <title> and <h1>
    assert imread(tmp_path / "loss_curve.png").size


def values_off_the_chart(
    path: Path, css_class: str, *, chart: int = 0
) -> list[tuple[float, float]]:
    """(step, value) of a path's points, read against the tick labels as a person would."""
    figure = re.findall(r"<figure.*?</figure>", path.read_text(encoding="utf-8"), re.DOTALL)[chart]

    def scale(css: str, side: str) -> Any:
        ticks = re.findall(rf'<span class="{css}[^"]*" style="{side}: ([\d.]+)%">([^<]*)<', figure)
        at = [float(place) for place, _ in ticks]
        values = [float(text.replace(",", "")) for _, text in ticks]
        assert len(values) >= 2
        return np.poly1d(np.polyfit(at, values, 1))

    x, y = scale("x", "left"), scale("y", "top")
    assert x(100) > x(0)
    assert y(0) > y(100)  # greater values stand higher
    d = re.findall(rf'<path class="{css_class}" d="([^"]*)"', figure)
    if not d:
        return []
    points = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d[0])
    return [(float(x(float(a) / 10)), float(y(float(b) / 10))) for a, b in points]


def test_few_points_can_be_read_off_the_chart(tmp_path: Path) -> None:
    points = [(30, 3.5), (10, 7.25), (20, 4.0)]
    rates = [(10, 1e-4), (20, 2e-4), (30, 0.0)]
    report = Report(
        title="t",
        loss_curve=points,
        loss_reference=("unigram entropy", 9.0),  # above the curve, and in the chart
        curves={"learning rate": rates},
    )
    path = write_report(tmp_path, report)
    expected = np.array(sorted(points))
    assert np.array(values_off_the_chart(path, "line")) == pytest.approx(expected, abs=0.02)
    assert np.array(values_off_the_chart(path, "dots")) == pytest.approx(expected, abs=0.02)
    assert values_off_the_chart(path, "band") == []
    assert values_off_the_chart(path, "reference")[0][1] == pytest.approx(9.0, abs=0.01)
    (reference,) = Page(path).named("path", "reference")
    assert 0 < float(str(reference["d"]).removeprefix("M0 ").removesuffix("H1000")) < 1000
    assert np.array(values_off_the_chart(path, "line", chart=1))[:, 1] == pytest.approx(
        [value for _, value in rates], abs=1e-6
    )
    text = Page(path).text
    assert "loss, nats per token" in text
    assert "unigram entropy: 9.000" in text
    assert "From 7.25 at step 10 to 3.5 at step 30; lowest 3.5 at step 30." in text


def test_many_points_are_drawn_as_means_and_extremes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    steps = np.arange(1, 100_001)
    losses = 3 + 4 * np.exp(-steps / 20_000) + generator.normal(0, 0.3, steps.size)
    losses[[500, 70_000]] = [12.0, 0.5]  # spikes that a mean alone would hide
    losses[3] = math.nan
    points = list(zip(steps.tolist(), losses.tolist(), strict=True))
    path = write_report(tmp_path, Report(title="t", loss_curve=points))
    assert path.stat().st_size < 100_000
    assert not Page(path).named("path", "dots")
    band = np.array(values_off_the_chart(path, "band"))
    line = np.array(values_off_the_chart(path, "line"))
    upper, lower = band[:400], band[:399:-1]
    assert upper[:, 0] == pytest.approx(line[:, 0])
    assert lower[:, 0] == pytest.approx(line[:, 0])
    assert np.all((lower[:, 1] < line[:, 1]) & (line[:, 1] < upper[:, 1]))
    assert band[:, 1].max() == pytest.approx(12.0, abs=0.02)
    assert band[:, 1].min() == pytest.approx(0.5, abs=0.02)
    assert line[:, 1].mean() == pytest.approx(np.nanmean(losses), abs=0.01)
    assert np.interp(50_000, *line.T) == pytest.approx(3 + 4 * np.exp(-2.5), abs=0.1)
    caption = Page(path).text
    assert "99,999 points in 400 groups" in caption
    assert "1 not finite" in caption


@pytest.mark.slow
def test_one_point_and_a_flat_curve_have_a_place(tmp_path: Path) -> None:
    for points in ([(7, 2.0)], [(7, 0.0)], [(1, 2.0), (9, 2.0)], [(5, 1.0), (5, 3.0)]):
        page = write(tmp_path, Report(title="t", loss_curve=points))
        (line,) = page.named("path", "line")
        places = [float(place) for place in re.findall(r"-?[\d.]+", str(line["d"]))]
        assert len(places) == 2 * len(points)
        assert all(0 <= place <= 1000 for place in places)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(tmp_path / name, full_report("plain"))
    for name in ("index.html", "loss_curve.png"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert first == second
    image = imread(tmp_path / "first" / "loss_curve.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 800
    assert image.std() > 0.05  # something is drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": []}, "one or more"),
        ({"frames": [[5, 6, 7], [5, 6]], "times": [1.0, 0.0]}, "same length"),
        ({"times": [1.0, 0.0]}, "3 finite numbers"),
        ({"times": [1.0, math.nan, 0.0]}, "finite"),
        ({"num_prompt_tokens": 4}, r"0\.\.3"),
        ({"vocabulary": {5: "hello"}}, r"\[6, 7\]"),
    ],
)
def test_denoising_is_checked_at_birth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(denoising(), **changes)


def test_a_wide_table_names_its_values_where_a_phone_shows_no_header() -> None:
    """Below a phone's width its rows are lists; roles keep it a table for a screen reader."""
    wide = ("Points", ["front", "sampler", "quality", "speed"], [["1", "sdar", 20.5, 3]])
    narrow = ("Shares", ["tokens", "share"], [[1, 0.5]])
    page = render_page(Report(title="x", tables=[wide, narrow])).decode()
    first, second = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert re.findall(r'<td[^>]* data-name="(\w+)">([^<]*)<', first) == [
        ("front", "1"), ("sampler", "sdar"), ("quality", "20.5"), ("speed", "3"),
    ]  # fmt: skip
    roles = ["table", "rowgroup", "row", *["columnheader"] * 4, "rowgroup", "row", *["cell"] * 4]
    assert re.findall(r'role="(\w+)"', first) == roles
    assert "role" not in second
    assert "data-name" not in second


def test_explanation_claims_only_what_the_bound_shows() -> None:
    better = explain_bound(4.0, 6.0, standard_error=0.1)
    assert better.startswith("This model uses context: the right token is at least 7.39 times")
    assert "2.000 nats (33%) lower" in better
    assert "at least" not in explain_bound(4.0, 6.0, standard_error=0.1, is_exact=True)
    for bound, error in ((6.5, 0.1), (5.9, 0.1), (5.85, 0.1), (6.0, 0.0)):
        text = explain_bound(bound, 6.0, standard_error=error)
        assert text.startswith("It is not shown that this model has learnt anything from context.")
        assert "not clearly below" in text
    for wrong in ((math.nan, 6.0, 0.1), (4.0, math.inf, 0.1), (4.0, 6.0, math.nan)):
        text = explain_bound(wrong[0], wrong[1], standard_error=wrong[2])
        assert text.startswith("This model cannot be judged")
        assert "learnt" not in text
