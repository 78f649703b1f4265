"""EF21+ on one worker: the better of two estimates. Twin of csrc/core/math/ef21_plus.h.

Pass 0 looks at w - h and pass 1 at w, for a scale or for a selection that marks what it chooses;
passes 2 and 3 take the two errors; pass 4 changes h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl

from ..compress import MARKED, compress, compress_draw, compress_sum, scales
from ..draw import MARKS
from ..rule import GRAD, NOTHING, PARAM, PICKED, SQUARES, STAGE, STATE, WIDE, Rule, Streams
from .ef21 import HYPER, constants, source, source_m, update


@triton.jit
def prepare(h, x):
    """EF21's constants, the scales for w itself, whether C(w) is closer."""
    kind, level = h[4], h[5]
    through = tl.where(kind == MARKED, x[PICKED], x[STAGE])
    direct = tl.where(kind == MARKED, x[PICKED], x[STAGE + 1])
    scale, inverse = scales(kind, level, direct, x[WIDE])
    closer = tl.where(x[STAGE + 3] < x[STAGE + 2], 1.0, 0.0)
    return constants(h, through, x[STAGE + 4], x[WIDE]) + (scale, inverse, closer)


@triton.jit
def coded(x, h, scale, inverse, drawn, BIT: tl.constexpr):
    """C(x); of marks the one of this bit counts."""
    if drawn is None:
        return compress(x, h[4], h[5], scale, inverse, None)
    elif drawn.dtype.is_floating():
        mark = ((drawn.to(tl.int32) >> BIT) & 1).to(x.dtype)
        return compress(x, h[4], h[5], scale, inverse, mark)
    else:
        return compress(x, h[4], h[5], scale, inverse, drawn)


@triton.jit
def through(w, s, h, drawn):
    """h + C(w - h)."""
    return s[0] + coded(w - s[0], h, h[6], h[7], drawn, 0)


@triton.jit
def direct(w, h, drawn):
    """C(w)."""
    return coded(w, h, h[9], h[10], drawn, 1)


@triton.jit
def better(w, s, h, drawn):
    """Of equals the first."""
    return tl.where(h[11] != 0, direct(w, h, drawn), through(w, s, h, drawn))


# ---- w is the gradient ---------------------------------------------------------------------------


@triton.jit
def whole(p, g, s, h):
    """W."""
    return g, p, s


@triton.jit
def error_through(p, g, s, h, drawn=None):
    """What EF21's estimate misses of w."""
    return g - through(g, s, h, drawn), p, s


@triton.jit
def error_direct(p, g, s, h, drawn=None):
    """What C(w) misses."""
    return g - direct(g, h, drawn), p, s


@triton.jit
def change(p, g, s, h, drawn=None):
    """The new h, of which the norm is taken."""
    moved = better(g, s, h, drawn)
    return moved, p, (moved,)


@triton.jit
def source_marked(p, g, s, h):
    """Before anything is marked."""
    return g - s[0], p, (s[0], s[1] * 0.0)


@triton.jit
def mark_first(p, s, c, h):
    """Chosen of w - h."""
    return p, (s[0], s[1] + 1.0)


@triton.jit
def mark_second(p, s, c, h):
    """Chosen of w."""
    return p, (s[0], s[1] + 2.0)


@triton.jit
def again(g, s):
    """W - h once more."""
    return g - s[0]


@triton.jit
def again_whole(g, s):
    """W once more."""
    return g


# ---- w is v, which follows the gradient ----------------------------------------------------------


@triton.jit
def whole_m(p, g, s, h):
    """W."""
    return s[1], p, s


@triton.jit
def error_through_m(p, g, s, h, drawn=None):
    """What EF21's estimate misses of w."""
    return s[1] - through(s[1], s, h, drawn), p, s


@triton.jit
def error_direct_m(p, g, s, h, drawn=None):
    """What C(w) misses."""
    return s[1] - direct(s[1], h, drawn), p, s


@triton.jit
def change_m(p, g, s, h, drawn=None):
    """The new h, of which the norm is taken."""
    moved = better(s[1], s, h, drawn)
    return moved, p, (moved, s[1])


@triton.jit
def source_marked_m(p, g, s, h):
    """Before anything is marked."""
    v = s[1] * h[0] + g * h[1]
    return v - s[0], p, (s[0], v, s[2] * 0.0)


@triton.jit
def mark_first_m(p, s, c, h):
    """Chosen of w - h."""
    return p, (s[0], s[1], s[2] + 1.0)


@triton.jit
def mark_second_m(p, s, c, h):
    """Chosen of w."""
    return p, (s[0], s[1], s[2] + 2.0)


@triton.jit
def again_m(g, s):
    """W - h once more."""
    return s[1] - s[0]


@triton.jit
def again_whole_m(g, s):
    """W once more."""
    return s[1]


def sums(h: Sequence[float]) -> tuple[int, ...]:
    """The compressor's scales, the errors, the norm where steps are normalised."""
    compressor = compress_sum(h[4])
    return compressor, compressor, SQUARES, SQUARES, SQUARES if h[3] != 0 else NOTHING


FORMS = (
    (
        ("", source, source_marked),
        (whole, error_through, error_direct, change),
        (again, again_whole),
        (mark_first, mark_second),
    ),
    (
        ("_m", source_m, source_marked_m),
        (whole_m, error_through_m, error_direct_m, change_m),
        (again_m, again_whole_m),
        (mark_first_m, mark_second_m),
    ),
)


def rules() -> Iterator[Rule]:
    """For dense compressors, and for those that select: with marks for a last state."""
    for k, ((name, dense, marking), passes, agains, marked) in enumerate(FORMS):
        of_grad = GRAD if k == 0 else 0
        target = STATE << k if k else 0
        for marks in (False, True):
            bits = STATE << 1 + k if marks else 0
            yield Rule(
                f"ef21_plus{'_marked' if marks else ''}{name}",
                HYPER,
                1 + k + marks,
                prepare,
                update,
                12,
                counts_steps=True,
                sources=(marking if marks else dense, *passes),
                passes=(
                    Streams(GRAD | STATE | target, target | bits),
                    Streams(of_grad | target, 0),
                    Streams(of_grad | STATE | target | bits, 0, draws=True),
                    Streams(of_grad | target | bits, 0, draws=True),
                    Streams(of_grad | STATE | target | bits, STATE, draws=True),
                ),
                applies=Streams(PARAM | STATE, PARAM),
                sums=(lambda h: (NOTHING, NOTHING, *sums(h)[2:])) if marks else sums,
                draws=(lambda _: MARKS.value) if marks else (lambda h: compress_draw(h[4:])),
                again=agains,
                taken=marked if marks else (),
                looks=(Streams(of_grad | STATE | target, 0), Streams(of_grad | target, 0)),
                takes=(Streams(of_grad | STATE | target | bits, bits),) * 2 if marks else (),
                scales=() if marks else (6, 9),
                marking="" if marks else f"ef21_plus_marked{name}",
                marks=marks,
            )


RULES = tuple(rules())
