"""A picture of a sample on its way from noise to text, as an SVG without scripts or fonts.

    python -m docs.tools.denoising CHECKPOINT docs/images/denoising.svg

Each line is the sample after some steps of sampler `ancestral`; a grey square is a mask, and bold
tokens are those that are new since the line above. The same checkpoint and seed draw the same file.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import AncestralConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.models.sampling import SamplingModel

WIDTH, LINE, LEFT, TOP, CELL = 960, 34, 96, 64, 13.2
STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:15px;fill:#57606a}"
    ".new{fill:#0b57d0;font-weight:700}.label{font-size:13px}"
    ".title{font-family:system-ui,sans-serif;font-size:16px;fill:#24292f}"
)


def drawn(
    frames: Sequence[Sequence[int]],
    times: Sequence[float],
    texts: dict[int, str],
    mask_token_id: int,
    *,
    num_lines: int = 8,
) -> str:
    """The SVG.

    Args:
        frames: token ids after each step, all of one length, noise first.
        times: t of each frame, from 1 to 0.
        texts: what each id is written as.
        num_lines: frames that are shown, evenly apart, the first and the last among them.
    """
    last = len(frames) - 1
    chosen = [round(line * last / (num_lines - 1)) for line in range(num_lines)]
    height = TOP + LINE * num_lines + 8
    title = "One sample of the quickstart's model, from all masks (t = 1) to text (t = 0)"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#f6f8fa"/>',
        '<defs><rect id="mask" width="10.5" height="16" rx="2" fill="#d0d7de"/></defs>',
        f'<text class="title" x="20" y="32">{title}</text>',
    ]
    before: Sequence[int] = frames[0]
    for line, at in enumerate(chosen):
        y = TOP + LINE * line + 16
        lines.append(f'<text class="label" x="20" y="{y}">t = {times[at]:.2f}</text>')
        for place, token in enumerate(frames[at]):
            x = LEFT + CELL * place
            if token == mask_token_id:
                lines.append(f'<use href="#mask" x="{x:.1f}" y="{y - 13}"/>')
                continue
            text = texts[token].replace(" ", "\u00b7").replace("\n", "\u21b5")
            kind = ' class="new"' if before[place] != token else ""
            lines.append(f'<text{kind} x="{x:.1f}" y="{y}">{escape(text)}</text>')
        before = frames[at]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sampling = GenerateConfig(
        sampler=AncestralConfig(num_inference_steps=64, temperature=0.7),
        seq_len=64,
        seed=options.seed,
    )
    model = SamplingModel(options.checkpoint, sampling, device="cpu")
    frames: list[list[int]] = []
    times: list[float] = []

    def keep(time: float, x_t: object) -> None:
        frames.append(x_t[0].tolist())  # type: ignore[index]
        times.append(time)

    model.sample([GenerationRow(id=0, prompt=None)], on_step=keep)
    ids = {token for frame in frames for token in frame}
    texts = {token: model.tokenizer.decode([token]) for token in ids}
    options.svg.write_text(drawn(frames, times, texts, model.process.mask_token_id))


if __name__ == "__main__":
    main()
