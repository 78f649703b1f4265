"""codec: everything that messages are made of and made into, and what is compiled for it."""

from __future__ import annotations

from .codec import SPECS as _SIGNS
from .codec import code_signs, pack_bits, subtract_signs, sum_signs, unpack_bits, vote
from .codec_rounded import SPECS as _ROUNDED
from .codec_rounded import code_levels, code_natural, sum_levels, sum_natural
from .codec_sparse import SPECS as _SPARSE
from .codec_sparse import add_rand_k, code_rand_k, code_top_k, sum_top_k

__all__ = [
    "add_rand_k",
    "code_levels",
    "code_natural",
    "code_rand_k",
    "code_signs",
    "code_top_k",
    "pack_bits",
    "subtract_signs",
    "sum_levels",
    "sum_natural",
    "sum_signs",
    "sum_top_k",
    "unpack_bits",
    "vote",
]

SPECS = {**_SIGNS, **_ROUNDED, **_SPARSE}
# What the arguments of these kernels are, for who compiles them ahead of time.
TYPES = {
    **dict.fromkeys(("g", "e", "x", "out", "base", "scale", "scales"), "*fp32"),
    **dict.fromkeys(("units", "inverses"), "*fp32"),
    **dict.fromkeys(("bits", "message", "messages", "signs", "packed"), "*u8"),
    **dict.fromkeys(("numbers", "index", "state", "histogram", "counts", "ends"), "*i64"),
    **dict.fromkeys(("n", "k", "stride", "size", "room", "count"), "i64"),
    **dict.fromkeys(("ranks", "width", "shift", "levels", "pieces"), "i32"),
    **dict.fromkeys(("low", "high", "step", "tensor"), "i32"),
    **dict.fromkeys(("a", "b", "factor"), "fp32"),
    "partials": "*fp64",
}
