"""The report of a run: one HTML file that needs nothing beside it, and the loss curve as a PNG.

The page loads no script, style, font or image from anywhere, so it reads the same from a disk, a
mail or an artifact store. Equal input gives equal bytes: it holds no time of its own making.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from tokendiff.artifacts.manifest import write_atomically

Points = Sequence[tuple[int, float]]

_MAX_DRAWN_POINTS = 400
_CURVE_NAMES = ("training", "held out")
# Control characters but tab and newline, as pictures: a browser would hide or drop them. Those that
# turn the direction of text are written out: obeyed, they would show a text as another one.
_CONTROL_PICTURES: dict[int, int | str] = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"},
    127: 0x2421,
    **{
        i: f"[U+{i:04X}]"
        for i in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
}


Table = tuple[str, list[str], list[list[Any]]]  # title, header, rows


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """One sample on its way from noise to text.

    Attributes:
        frames: token ids of x_t, the start first, then after every step.
        times: t of each frame, falling.
        vocabulary: text of every id that occurs in the frames; the mask's may be left out.
        num_prompt_tokens: tokens at the front that were given.
    """

    frames: list[list[int]]
    times: list[float]
    vocabulary: dict[int, str]
    mask_token_id: int
    num_prompt_tokens: int = 0

    @property
    def has_masks(self) -> bool:
        """False where all noise is other tokens."""
        return any(self.mask_token_id in frame for frame in self.frames)

    def __post_init__(self) -> None:
        if not self.frames or len({len(frame) for frame in self.frames}) != 1:
            raise ValueError("frames must be one or more, all of the same length")
        if len(self.times) != len(self.frames) or not all(map(math.isfinite, self.times)):
            raise ValueError(f"times must be {len(self.frames)} finite numbers, got {self.times}")
        if not 0 <= self.num_prompt_tokens <= len(self.frames[0]):
            raise ValueError(
                f"num_prompt_tokens must lie in 0..{len(self.frames[0])}, "
                f"got {self.num_prompt_tokens}"
            )
        occurring = {token for frame in self.frames for token in frame}
        if unknown := sorted(occurring - self.vocabulary.keys() - {self.mask_token_id}):
            raise ValueError(f"vocabulary has no text for token ids {unknown[:5]}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows; an empty part is left out.

    Attributes:
        summary: (label, value, note) of the headline numbers.
        explanation: the first lines of the page, in plain words: what was found; see
            `explain_bound`.
        loss_curve: (step, nats per token). A loss that is not finite is not drawn, but counted.
        heldout_curve: (step, nats per token) of held-out rows, drawn beside the loss.
        curve_names: what those two are called; of a page that holds two runs side by side their
            names, and the curves are then their losses.
        loss_reference: (label, nats per token) of a horizontal line.
        loss_label: of the axis of these.
        curves: label with unit -> (step, value).
        pairs: label with unit -> a curve of each of two runs, side by side.
        metrics: name -> value, the whole table.
        samples: records with id, prompt (None without one), text (the prompt included),
            num_model_calls, tokens_per_forward (may be null). All are shown: choose before.
        tables: (title, header, rows).
        refresh_seconds: after which a browser loads the page again; None for one that stays as it
            is.
    """

    title: str
    subtitle: str = ""
    summary: list[tuple[str, str, str]] = field(default_factory=list)
    explanation: str = ""
    loss_curve: Points = ()
    heldout_curve: Points = ()
    curve_names: tuple[str, str] = _CURVE_NAMES
    loss_reference: tuple[str, float] | None = None
    loss_label: str = "loss, nats per token"
    curves: Mapping[str, Points] = field(default_factory=dict)
    pairs: Mapping[str, tuple[Points, Points]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    denoising: Denoising | None = None
    tables: list[Table] = field(default_factory=list)
    config_yaml: str = ""
    refresh_seconds: int | None = None


def write_report(folder: Path, report: Report) -> Path:
    """Write `index.html` and `loss_curve.png` to the folder; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "loss_curve.png", _loss_png(report))
    page = folder / "index.html"
    write_atomically(page, render_page(report))
    return page


def render_page(report: Report) -> bytes:
    """The page alone, as UTF-8."""
    # "replace": a lone surrogate, which no UTF-8 file can hold, becomes a question mark.
    return _render(report).encode("utf-8", "replace")


def explain_bound(
    bound: float,
    unigram_entropy: float,
    *,
    standard_error: float,
    is_exact: bool = False,
    rows: str = "held-out",
) -> str:
    """Sentences for people who do not know what a bound says, the verdict first; all three figures
    in nats per token.

    Args:
        is_exact: the bound is the negative log-likelihood itself.
        rows: which ones it is of, "held-out" or "training".

    They call the bound lower only where it is so by more than two standard errors.
    """
    what, most, least = (
        ("bound", "at most ", "at least ") if not is_exact else ("likelihood", "", "")
    )
    compared = (
        f"On {rows} text it needs {most}{bound:.3f} nats per token (the {what}); a model that "
        f"knows only how frequent each token is needs {unigram_entropy:.3f} (the unigram entropy)."
    )
    gain = unigram_entropy - bound
    if not (math.isfinite(gain) and math.isfinite(standard_error)):
        return f"This model cannot be judged: not all of its figures are finite numbers. {compared}"
    if gain <= 2 * standard_error:
        return (
            "It is not shown that this model has learnt anything from context. "
            f"{compared} The {what} is not clearly below the unigram entropy."
        )
    return (
        f"This model uses context: the right token is {least}{math.exp(gain):.3g} times as likely "
        f"as without it, in the geometric mean. {compared} The {what} is {gain:.3f} nats "
        f"({gain / unigram_entropy:.0%}) lower."
    )


def _render(report: Report) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _visible(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    environment.filters |= {"number": _format}
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    names = report.curve_names
    loss = _chart(
        report.loss_label,
        report.loss_curve,
        report.loss_reference,
        heldout=report.heldout_curve,
        names=names,
    )
    others = [_chart(label, points) for label, points in report.curves.items()]
    others += [_chart(n, a, heldout=b, names=names) for n, (a, b) in report.pairs.items()]
    texts = report.denoising.vocabulary.items() if report.denoising else ()
    return environment.from_string(source).render(
        report=report,
        vocabulary={token: _visible(text) for token, text in texts},
        charts=[chart for chart in (loss, *others) if chart is not None],
        samples=[_split_prompt(sample) for sample in report.samples],
    )


def _visible(text: str) -> str:
    return text.translate(_CONTROL_PICTURES)


def _split_prompt(sample: dict[str, Any]) -> dict[str, Any]:
    """Adds `given`, the front of the text that the prompt is, and `generated`, the rest.

    A tokenizer that normalises (lower-cases, say) gives another text back than the prompt: then
    nothing is known to be given, and the page shows the prompt apart. So it does with a question in
    a chat, and beside it the answer alone: the template's words stand around the question.
    """
    prompt, text = sample["prompt"] or "", sample["text"]
    given = prompt if text.startswith(prompt) else ""
    if not given and prompt in text and not sample.get("gaps"):
        text = sample.get("completion", text)
    return {**sample, "given": given, "generated": text[len(given) :]}


def _format(value: Any, digits: int = 6) -> str:
    """A number for people: thousands separated, NaN and infinity in words."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "" if value is None else str(value)
    number = float(value)
    if math.isnan(number):
        return "not a number"
    if math.isinf(number):
        return "infinite" if number > 0 else "minus infinite"
    is_whole = number.is_integer() or abs(number) >= 1e4
    return f"{number:,.0f}" if is_whole and abs(number) < 1e15 else f"{number:,.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class _Series:
    """A curve with at most _MAX_DRAWN_POINTS points; each stands for one or more neighbours."""

    step: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray
    note: str
    is_grouped: bool
    first_step: float
    last_step: float


def _series(points: Points) -> _Series | None:
    """The finite points in the order of their steps, averaged in groups where they are too many."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    finite = table[np.isfinite(table).all(axis=1)]
    if len(finite) == 0:
        return None
    step, value = finite[np.argsort(finite[:, 0], kind="stable")].T
    num_groups = min(len(step), _MAX_DRAWN_POINTS)
    starts = np.arange(num_groups) * len(step) // num_groups
    sizes = np.diff(starts, append=len(step))
    lowest = int(value.argmin())
    note = (
        f"From {_format(value[0], 4)} at step {step[0]:,.0f} to {_format(value[-1], 4)} at step "
        f"{step[-1]:,.0f}; lowest {_format(value[lowest], 4)} at step {step[lowest]:,.0f}."
    )
    is_grouped = len(step) > num_groups
    if is_grouped:
        note += (
            f" {len(step):,} points in {num_groups} groups of neighbours: the line is the mean "
            "of each group, the band reaches from its least to its greatest."
        )
    if num_lost := len(table) - len(finite):
        note += f" Not drawn: {num_lost:,} not finite."
    return _Series(
        step=np.add.reduceat(step, starts) / sizes,
        mean=np.add.reduceat(value, starts) / sizes,
        low=np.minimum.reduceat(value, starts),
        high=np.maximum.reduceat(value, starts),
        note=note,
        is_grouped=is_grouped,
        first_step=step[0],
        last_step=step[-1],
    )


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """A curve as the template draws it: paths in a square of 1000 by 1000, labels in percent.

    Attributes:
        heldout: line and dots of a second curve, beside the first; empty where there is none.
    """

    label: str
    note: str
    line: str
    band: str
    dots: str
    heldout: tuple[str, str] | None
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    reference: tuple[float, str] | None


def _chart(
    label: str,
    points: Points,
    reference: tuple[str, float] | None = None,
    *,
    heldout: Points = (),
    names: tuple[str, str] = _CURVE_NAMES,
) -> _Chart | None:
    series, beside = _series(points), _series(heldout)
    if series is None:
        return None
    drawn = [series] if beside is None else [series, beside]
    first, last = min(s.first_step for s in drawn), max(s.last_step for s in drawn)
    x_low, x_high = _widened(first, last, margin=0.0)
    levels = [level for s in drawn for level in (s.low.min(), s.high.max())]
    levels += [reference[1]] if reference else []
    y_low, y_high = _widened(min(levels), max(levels), margin=0.06)

    def across(step: Any) -> Any:
        return 1000 * (step - x_low) / (x_high - x_low)

    def down(value: Any) -> Any:
        return 1000 * (y_high - value) / (y_high - y_low)

    def path(steps: NDArray, values: NDArray) -> str:
        pairs = zip(across(steps), down(values), strict=True)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pairs)

    def dots(curve: _Series) -> str:
        if len(curve.step) > 60:
            return ""
        pairs = zip(across(curve.step), down(curve.mean), strict=True)
        return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in pairs)

    there_and_back = np.concatenate([series.step, series.step[::-1]])
    edge = np.concatenate([series.high, series.low[::-1]])
    level = (down(reference[1]) / 10, f"{reference[0]}: {reference[1]:.3f}") if reference else None
    return _Chart(
        label=label,
        note=_note(series, beside, names),
        line=path(series.step, series.mean),
        band=path(there_and_back, edge) + "Z" if series.is_grouped else "",
        dots=dots(series),
        heldout=None if beside is None else (path(beside.step, beside.mean), dots(beside)),
        x_ticks=[(across(x) / 10, f"{x:,.10g}") for x in _ticks(x_low, x_high, 5, whole=True)],
        y_ticks=[(down(y) / 10, f"{y:,.10g}") for y in _ticks(y_low, y_high, 7)],
        reference=level,
    )


def _note(series: _Series, beside: _Series | None, names: tuple[str, str]) -> str:
    if beside is None:
        return series.note
    if names == _CURVE_NAMES:
        return f"{series.note} Held out: {beside.note}"
    return f"{names[0]}: {series.note} {names[1]}: {beside.note}"


def _widened(low: float, high: float, *, margin: float) -> tuple[float, float]:
    """The range with a margin at both ends; never empty, so that a single point has a place."""
    reach = margin * (high - low) if high > low else abs(high) / 10 or 1.0
    return low - reach, high + reach


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    return [float(tick) + 0.0 for tick in ticks if low <= tick <= high]  # + 0.0 turns -0.0 to 0.0


def _loss_png(report: Report) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    # Not pyplot, which holds state; and a "$" in a title is a dollar, not a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot(title=report.title, xlabel="step", ylabel=report.loss_label)
        if series := _series(report.loss_curve):
            axes.plot(series.step, series.mean, marker="o" if len(series.step) <= 60 else None)
            axes.fill_between(series.step, series.low, series.high, alpha=0.25, linewidth=0)
        if beside := _series(report.heldout_curve):
            marker = "o" if len(beside.step) <= 60 else None
            axes.plot(
                beside.step,
                beside.mean,
                marker=marker,
                color="tab:green",
                label=report.curve_names[1],
            )
            axes.legend()
        if report.loss_reference is not None:
            label, value = report.loss_reference
            axes.axhline(value, color="tab:red", linestyle="--", label=f"{label}: {value:.3f}")
            axes.legend()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        png = BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()
