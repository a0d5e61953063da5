"""A picture of a sample on its way from noise to text, as an SVG without scripts or fonts.

    python -m docs.tools.denoising CHECKPOINT DATA docs/images/denoising.svg

Each line is the sample after some of the steps; a grey box is a mask, and bold tokens are those
that are new since the line above. The same checkpoint, data and seed draw the same file.
"""

import argparse
from html import escape
from pathlib import Path

from tokendiff.data.rows import TokenData
from tokendiff.evaluation.evaluator import evaluation_rows
from tokendiff.models.tracing import Trace, trace_sample

WIDTH, LINE, LEFT, TOP, LETTER, GAP = 960, 34, 96, 64, 9.0, 4.0
STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:15px;fill:#57606a}"
    ".new{fill:#0b57d0;font-weight:700}.label{font-size:13px}rect.mask{fill:#d0d7de}"
    ".title{font-family:system-ui,sans-serif;font-size:16px;fill:#24292f}"
)
TITLE = "One sample of the quickstart's model, from masks to text"


def written(text: str) -> str:
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5")


def places(trace: Trace) -> list[tuple[float, float]]:
    """Where each token begins, and how wide it is; those that the picture has room for."""
    found: list[tuple[float, float]] = []
    x = float(LEFT)
    for tokens in zip(*trace.frames, strict=True):
        seen = {token for token in tokens if token != trace.mask_token_id}
        width = LETTER * max((len(trace.vocabulary[token]) for token in seen), default=1)
        if x + width > WIDTH - 16:
            break
        found.append((x, width))
        x += width + GAP
    return found


def drawn(trace: Trace, *, num_lines: int = 8) -> str:
    """The SVG.

    Args:
        num_lines: frames that are shown, evenly apart, the first and the last among them.
    """
    shown = places(trace)
    frames = [frame[: len(shown)] for frame in trace.frames]
    # Behind the last of the tokens that are shown nothing happens in the picture.
    last = next(at for at, frame in enumerate(frames) if frame == frames[-1])
    chosen = [round(line * last / (num_lines - 1)) for line in range(num_lines)]
    height = TOP + LINE * num_lines + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{TITLE}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#f6f8fa"/>',
        f'<text class="title" x="20" y="32">{TITLE}</text>',
    ]
    before = frames[0]
    for line, at in enumerate(chosen):
        y = TOP + LINE * line + 16
        lines.append(f'<text class="label" x="20" y="{y}">pass {at}</text>')
        for (x, width), token, old in zip(shown, frames[at], before, strict=True):
            if token == trace.mask_token_id:
                box = f'x="{x:g}" y="{y - 13}" width="{width:g}" height="16" rx="2"'
                lines.append(f'<rect class="mask" {box}/>')
                continue
            kind = ' class="new"' if old != token else ""
            text = escape(written(trace.vocabulary[token]))
            lines.append(f'<text{kind} x="{x:g}" y="{y}">{text}</text>')
        before = frames[at]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = TokenData.open(options.data, split="heldout")
    row = data.read(*evaluation_rows(data, seed=options.seed, max_rows=1)).tokens[0].tolist()
    trace = trace_sample(options.checkpoint, row=row, seed=options.seed, temperature=0.7)
    options.svg.write_text(drawn(trace))


if __name__ == "__main__":
    main()
