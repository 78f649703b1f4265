"""Parameter shapes of well-known models, from their formulas: real sizes, in real proportions."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def resnet20() -> list[Shape]:
    """ResNet-20 for CIFAR-10 with option A shortcuts (no parameters in them)."""
    shapes: list[Shape] = [(16, 3, 3, 3), (16,), (16,)]
    width = 16
    for out in (16, 32, 64):
        for _ in range(3):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            width = out
    return [*shapes, (10, 64), (10,)]


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet: bottlenecks of 1x1, 3x3, 1x1 convolutions."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for mid, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * mid
            for s in ((mid, width, 1, 1), (mid, mid, 3, 3), (out, mid, 1, 1)):
                shapes += [s, (s[0],), (s[0],)]
            if block == 0:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


def bert_base() -> list[Shape]:
    """BERT-base, uncased, with pooler and without heads."""
    d, f = 768, 3072
    shapes: list[Shape] = [(30522, d), (512, d), (2, d), (d,), (d,)]
    for _ in range(12):
        shapes += [(d, d), (d,)] * 4 + [(d,), (d,), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    return [*shapes, (d, d), (d,)]


def gpt2_124m() -> list[Shape]:
    """GPT-2 small, output embedding tied."""
    d = 768
    shapes: list[Shape] = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, (d,), (d,)]


def _llama(
    layers: int, width: int, hidden: int, kv_width: int, vocabulary: int, tied: bool
) -> list[Shape]:
    shapes: list[Shape] = [(vocabulary, width)]
    for _ in range(layers):
        shapes += [(width, width), (kv_width, width), (kv_width, width), (width, width)]
        shapes += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [*shapes, (width,)] + ([] if tied else [(vocabulary, width)])


def llama_1b() -> list[Shape]:
    """Llama-3.2-1B: 16 layers, grouped queries, embeddings tied."""
    return _llama(16, 2048, 8192, 512, 128256, tied=True)


def llama_8b() -> list[Shape]:
    """Llama-3-8B: 32 layers, grouped queries."""
    return _llama(32, 4096, 14336, 1024, 128256, tied=False)


def many_tiny() -> list[Shape]:
    """2,000 tensors of 16: nothing but host cost."""
    return [(16,)] * 2000


MODELS = {
    "resnet20": resnet20,
    "resnet50": resnet50,
    "bert-base": bert_base,
    "gpt2-124m": gpt2_124m,
    "llama-3.2-1b": llama_1b,
    "llama-3-8b": llama_8b,
    "many-tiny": many_tiny,
}


def numel(shapes: list[Shape]) -> int:
    """Elements of all shapes together."""
    return sum(math.prod(s) for s in shapes)
