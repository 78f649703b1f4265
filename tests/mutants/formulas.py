"""Which formulas of the native core go wrong, and how: chosen by hand."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """The first `formula` that comes after the text `after` becomes `fault`."""

    what: str
    header: str
    formula: str
    fault: str
    after: str = ""


MUTANTS = [
    Mutant(
        "SGD: wrong sign",
        "math/sgd.h",
        "x.param * h.shrink - g * h.lr",
        "x.param * h.shrink + g * h.lr",
    ),
    Mutant(
        "SGD: dampening in the first step",
        "math/sgd.h",
        "s.first ? 1.0 : 1.0 - dampening",
        "1.0 - dampening",
    ),
    Mutant(
        "SGD: Nesterov without decay",
        "math/sgd.h",
        "V(g + x.state[0] * h.look)",
        "V(x.grad + x.state[0] * h.look)",
    ),
    Mutant(
        "Adam: eps inside the correction",
        "math/adam.h",
        "ops<V>::sqrt(top) * h.root + h.eps",
        "(ops<V>::sqrt(top) + h.eps) * h.root",
    ),
    Mutant(
        "Adam: no decoupled decay",
        "math/adam.h",
        "decoupled ? 1.0 - lr * weight_decay : 1.0",
        "1.0",
    ),
    Mutant(
        "Adam: betas swapped",
        "math/adam.h",
        "x.state[0] * h.beta1 + g * h.admit1",
        "x.state[0] * h.beta2 + g * h.admit2",
    ),
    Mutant(
        "Adam: corrected for a step too many",
        "math/adam.h",
        "std::pow(h[1], step)",
        "std::pow(h[1], step + 1.0)",
    ),
    Mutant(
        "AMSGrad: a NaN does not win",
        "math/adam.h",
        "ops<V>::select(x.state[2] != x.state[2], x.state[2], top)",
        "top",
    ),
    Mutant(
        "Adagrad: decay of lr a step early", "math/adagrad.h", "(step - 1.0) * h[1]", "step * h[1]"
    ),
    Mutant(
        "Adagrad: eps inside the root",
        "math/adagrad.h",
        "(ops<V>::sqrt(x.state[0]) + h.eps)",
        "ops<V>::sqrt(x.state[0] + h.eps)",
    ),
    Mutant(
        "clip: eps missing",
        "math/clip.h",
        "clip.max_norm / (norm + clip.eps)",
        "clip.max_norm / norm",
        "case ClipMode::hard",
    ),
    Mutant(
        "clip: a short gradient is scaled up",
        "math/clip.h",
        "coef > 1.0 ? 1.0 : coef",
        "coef",
        "case ClipMode::hard",
    ),
    Mutant(
        "clip: smooth, upside down",
        "math/clip.h",
        "1.0 / (1.0 + norm / clip.max_norm)",
        "1.0 / (1.0 + clip.max_norm / norm)",
    ),
    Mutant(
        "AGC: floor is a ceiling", "math/clip.h", "param_norm < clip.eps", "param_norm > clip.eps"
    ),
    Mutant("Clip21: a NaN norm clips nothing", "math/clip21.h", "norm == norm", "true"),
    Mutant(
        "Clip21: h moves by all of u",
        "math/clip21.h",
        "x.state[0] + u * h.beta_hat",
        "x.state[0] + u",
    ),
    Mutant(
        "Lion: betas swapped",
        "math/sign.h",
        "x.state[0] * h.keep2 + x.grad * h.admit2",
        "x.state[0] * h.keep1 + x.grad * h.admit1",
    ),
    Mutant(
        "sign of 0 is 1",
        "rule.h",
        "ops<V>::select(x > V{}, one, ops<V>::select(x < V{}, -one, x))",
        "ops<V>::select(x >= V{}, one, V(-one))",
    ),
    Mutant("EF21: steps along the old h alone", "math/ef21.h", "x.param - c * h.lr", "x.param"),
    Mutant(
        "EF-SGD: the residual keeps what was sent",
        "math/ef_sgd.h",
        "x.state[0] - scaled_sign<V, T>(x.state[0], h.last) + g * h.lr",
        "x.state[0] + g * h.lr",
    ),
    Mutant(
        "NormalizedSGD: 0 / 0 at a zero gradient",
        "math/normalized_sgd.h",
        "norm == 0.0 ? 0.0 : h[0] / (norm + h[2])",
        "h[0] / (norm + h[2])",
    ),
    Mutant(
        "accumulator: not delayed",
        "math/accumulator.h",
        "h[4] != 0.0 ? s.norm_sq_before : s.norm_sq",
        "s.norm_sq",
    ),
    Mutant(
        "STM: weights swapped",
        "math/stm.h",
        "x.state[0] * h.near + x.state[1] * h.ahead",
        "x.state[0] * h.ahead + x.state[1] * h.near",
    ),
    Mutant(
        "AdGD: x / 0 where nothing changed",
        "math/adgd.h",
        "changed == 0.0 ? h[2] : h[1] / changed",
        "h[1] / changed",
    ),
    Mutant(
        "chunks: one element too few",
        "chunks.h",
        "numel - begin < kChunk ? numel - begin : kChunk",
        "numel - begin < kChunk ? numel - begin - (begin > 0) : kChunk",
    ),
    Mutant(
        "top-k: rounded down",
        "step.h",
        "std::ceil(ratio * static_cast<double>(elements))",
        "std::floor(ratio * static_cast<double>(elements))",
    ),
    Mutant(
        "bfloat16: ties away from even",
        "half.h",
        "(x + 0x7fffu + ((x >> 16) & 1u)) >> 16",
        "(x + 0x8000u) >> 16",
    ),
    Mutant(
        "bfloat16: a NaN may become infinite",
        "half.h",
        "(x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded",
        "rounded",
    ),
    Mutant(
        "QSGD: no more than all levels forgotten", "compress.h", "O::select(y > top, top, y)", "y"
    ),
    Mutant(
        "natural compression: overflows",
        "compress.h",
        "O::select((out & kExponent) == kExponent, down, out)",
        "out",
    ),
]
