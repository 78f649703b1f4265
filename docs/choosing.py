"""Draws docs/choosing.svg. Boxes bring their own background: the picture is read on any page."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

# A question, what answers it, and what a yes leads to.
ROWS = [
    (
        ["Do processes wait", "for the network?"],
        "will_it_help",
        ["A hook for DistributedDataParallel:", "TwoWaySign, EF14, EF21 with TopK"],
    ),
    (
        ["Is memory short?"],
        "bytes per parameter",
        ["AdamW with bfloat16 states (4), Lion (4),", "SignSGD (0), EFSGD(absorb=True)"],
    ),
    (
        ["Are gradients", "heavy-tailed?"],
        "estimate_tail: index < 2",
        ["A clip: ClipSGD or AdamW with max_norm;", "or SignSGD, Signum, NormalizedSGD"],
    ),
    (
        ["Does curvature grow", "with the gradient?"],
        "estimate_smoothness: L1 norm > L0",
        ["ClipSGD.from_smoothness(L0, L1),", 'or clip="smooth"'],
    ),
    (
        ["Is the step size", "a guess?"],
        "nobody tuned it",
        [
            "PolyakSGD (the least loss is known), AdGD (exact",
            "gradients), AdagradNorm, ClipRAdaGradD",
        ],
    ),
]
LAST = ["Momentum SGD or AdamW without a clip:", "ClipSGD, AdamW (max_norm=None) are torch's"]
STEP, HEIGHT, LEFT, RIGHT = 104, 70, (10, 270), (350, 410)


def box(x: int, y: int, width: int, lines: list[str], fill: str, small: str = "") -> str:
    """A box with lines of text, the last one small."""
    rows = [(line, "") for line in lines] + ([(small, ' class="small"')] if small else [])
    middle, top = x + width / 2, y + HEIGHT / 2 - 9 * (len(rows) - 1) + 5
    text = "".join(
        f'<text x="{middle}" y="{top + 18 * i}"{kind}>{escape(line)}</text>'
        for i, (line, kind) in enumerate(rows)
    )
    return f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="8" fill="{fill}"/>{text}'


def picture() -> str:
    """The whole SVG."""
    (x, width), (x_yes, width_yes) = LEFT, RIGHT
    out, middle = [], x + width // 2
    for i, (question, by, answer) in enumerate(ROWS):
        y = 10 + STEP * i
        out += [
            box(x, y, width, question, "#dbeafe", by),
            box(x_yes, y, width_yes, answer, "#dcfce7"),
        ]
        across, below = y + HEIGHT // 2, y + HEIGHT
        out.append(f'<path d="M{x + width} {across}H{x_yes - 6}"/>')
        out.append(
            f'<text class="way" x="{(x + width + x_yes) // 2 - 3}" y="{across - 6}">yes</text>'
        )
        out.append(f'<path d="M{middle} {below}V{y + STEP - 6}"/>')
        out.append(f'<text class="way" x="{middle + 16}" y="{below + 21}">no</text>')
    y = 10 + STEP * len(ROWS)
    out.append(box(x, y, x_yes + width_yes - x, LAST, "#dcfce7"))
    size = (x_yes + width_yes + 10, y + HEIGHT + 10)
    return f"""<svg xmlns="http://www.w3.org/2000/svg"
 viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" role="img">
<title>Which optimizer: questions, and where a yes leads</title>
<style>
text {{ font: 15px system-ui, sans-serif; text-anchor: middle; fill: #111827 }}
.small {{ font-size: 13px; fill: #374151 }}
.way {{ font-size: 13px; fill: #808080 }}
rect {{ stroke: #6b7280 }}
path {{ stroke: #808080; stroke-width: 1.5; fill: none; marker-end: url(#tip) }}
.tip {{ fill: #808080; stroke: none; marker-end: none }}
</style>
<marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">
<path class="tip" d="M0 0L8 4L0 8Z"/>
</marker>
{chr(10).join(out)}
</svg>
"""


if __name__ == "__main__":
    (Path(__file__).parent / "choosing.svg").write_text(picture())
