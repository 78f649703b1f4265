"""Every bad input of ClipSGD: the right exception, a message that says which, nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    assert_unchanged,
    every_backend,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from torch import Tensor, nn

import pysmooth
from pysmooth import ClipSGD

NAN, INF = float("nan"), float("inf")

BAD_GROUP_VALUES = [
    ("lr", -0.1, ValueError),
    ("lr", NAN, ValueError),
    ("lr", INF, ValueError),
    ("lr", "0.1", TypeError),
    ("lr", None, TypeError),
    ("lr", True, TypeError),
    ("lr", torch.ones(2), ValueError),
    ("lr", torch.tensor(-1.0), ValueError),
    ("lr", torch.tensor(NAN), ValueError),
    ("momentum", -0.1, ValueError),
    ("momentum", NAN, ValueError),
    ("momentum", "0.9", TypeError),
    ("dampening", NAN, ValueError),
    ("dampening", -INF, ValueError),
    ("dampening", None, TypeError),
    ("weight_decay", -1e-3, ValueError),
    ("weight_decay", NAN, ValueError),
    ("weight_decay", INF, ValueError),
    ("weight_decay", [0.1], TypeError),
    ("clip_eps", -1e-6, ValueError),
    ("clip_eps", NAN, ValueError),
    ("clip_eps", None, TypeError),
    ("max_norm", 0.0, ValueError),
    ("max_norm", -1.0, ValueError),
    ("max_norm", NAN, ValueError),
    ("max_norm", "1", TypeError),
    ("clip", "soft", ValueError),
    ("clip", None, ValueError),
    ("nesterov", True, ValueError),  # without momentum
    ("nesterov", 1, TypeError),
    ("decoupled_weight_decay", 1, TypeError),
    ("maximize", "yes", TypeError),
]
BAD_GLOBAL_VALUES = [
    ("scope", "layer", ValueError),
    ("scope", 0, ValueError),
    ("nonfinite", "ignore", ValueError),
    ("nonfinite", None, ValueError),
    ("norm_type", 0.0, ValueError),
    ("norm_type", -2.0, ValueError),
    ("norm_type", NAN, ValueError),
    ("norm_type", "two", (TypeError, ValueError)),
    ("norm_type", None, (TypeError, ValueError)),
    ("backend", "cuda0", ValueError),
    ("backend", None, ValueError),
    ("differentiable", True, ValueError),
]


def ids(case: Any) -> str | None:
    return str(case) if isinstance(case, str | float | bool | None) else None


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "error"), BAD_GROUP_VALUES + BAD_GLOBAL_VALUES, ids=ids)
def test_constructor_refuses(name: str, value: Any, error: Any) -> None:
    (p,) = make_params([(3,)])
    with pytest.raises(error, match=name):
        ClipSGD([p], **{"lr": 0.1, name: value})


@every_backend
@pytest.mark.parametrize(("name", "value", "error"), BAD_GROUP_VALUES, ids=ids)
def test_add_param_group_refuses_and_adds_nothing(
    name: str, value: Any, error: Any, backend: str
) -> None:
    first, second = make_params([(3,), (4,)])
    optimizer = ClipSGD([first], lr=0.1, momentum=0.0, backend=backend)
    with pytest.raises(error, match=name):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["params"] == [first]
    first.grad = torch.ones(3)
    start = first.detach().clone()
    optimizer.step()
    torch.testing.assert_close(first.detach(), start - 0.1)


def test_nesterov_with_dampening_is_refused() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        ClipSGD(make_params([(3,)]), momentum=0.9, dampening=0.1, nesterov=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"L0": 0.0, "L1": 0.0}, ValueError, "L0 and L1"),
        ({"L0": -1.0, "L1": 1.0}, ValueError, "L0"),
        ({"L0": 1.0, "L1": -1.0}, ValueError, "L1"),
        ({"L0": NAN, "L1": 1.0}, ValueError, "L0"),
        ({"L0": 1.0, "L1": "1"}, TypeError, "L1"),
        ({"L0": 1.0, "L1": 1.0, "max_norm": 1.0}, TypeError, "max_norm"),
        ({"L0": 1.0, "L1": 1.0, "clip": "hard"}, TypeError, "clip"),
        ({"L0": 1.0, "L1": 1.0, "clip_eps": 0.0}, TypeError, "clip_eps"),
        ({"L0": 1.0, "L1": 1.0, "lr": 0.1}, TypeError, "lr"),
        ({"L0": 1.0, "L1": 1.0, "eta": -1.0}, ValueError, "lr|eta"),
    ],
)
def test_from_smoothness_refuses(kwargs: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        ClipSGD.from_smoothness(make_params([(3,)]), **kwargs)


def complex_param() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: [p],
        lambda p: [("name", p)],
        lambda p: [{"params": p}],
        lambda p: [{"params": [p]}],
        lambda p: [{"params": (q for q in [p])}],
        lambda p: [{"params": nn.ParameterList([p])}],
    ],
    ids=["list", "named", "tensor", "group", "generator", "parameter_list"],
)
def test_value_clip_of_complex_parameters_is_refused(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"clip='value'.*complex"):
        ClipSGD(wrap(complex_param()), clip="value", max_norm=1.0)


def test_what_torch_refuses_is_refused() -> None:
    (p,) = make_params([(3,)])
    with pytest.raises(ValueError, match="empty parameter list"):
        ClipSGD([])
    with pytest.raises(TypeError, match="params argument"):
        ClipSGD(p)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        ClipSGD([[1.0]])
    with pytest.raises(ValueError, match="non-leaf"):
        ClipSGD([p * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        ClipSGD([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        ClipSGD([p]).add_param_group([p])


@every_backend
def test_empty_group_is_fine(backend: str) -> None:
    for scope in ("global", "group", "tensor"):
        optimizer = ClipSGD([{"params": []}], max_norm=1.0, scope=scope, backend=backend)
        optimizer.step()


@every_backend
def test_hyper_parameter_spoiled_between_steps(backend: str) -> None:
    """Whatever a scheduler puts into a group: what is no number stops the step before it acts."""
    params = make_params([(3,), (4,)])
    optimizer = ClipSGD(
        [{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9, backend=backend
    )
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    before = snapshot(optimizer)
    optimizer.param_groups[1]["lr"] = "fast"
    set_grads(params, rows[1])
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert_unchanged(optimizer, before)


# ---- parameters that share memory ---------------------------------------------------------------


def construct_and_step(params: list[Tensor], backend: str, **kwargs: Any) -> ClipSGD:
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = ClipSGD(named, lr=0.5, backend=backend, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def leaf(view: Tensor) -> Tensor:
    return view.detach().requires_grad_()


ALIASES = {
    "view": lambda x: [x, x.view(-1)],
    "same_data": lambda x: [x, x.detach()],
    "overlapping_rows": lambda x: [x[0:4], x[3:6]],
    "slice_and_whole": lambda x: [x[..., 0], x],
    "transposed": lambda x: [x, x.t()],
    "strided_columns": lambda x: [x[:, ::2], x[:, 2:3]],
}


@every_backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("case", ALIASES)
def test_parameters_that_share_memory_are_refused(case: str, momentum: float, backend: str) -> None:
    x = torch.randn(6, 6)
    start = x.clone()
    params = [leaf(v) for v in ALIASES[case](x)]
    with pytest.raises(ValueError, match=r"p0.*p1.*share memory"):
        construct_and_step(params, backend, momentum=momentum)
    assert_same_bits([x], [start])


@every_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda x: [x[..., 0], x[..., 1]],
        lambda x: [x[:3], x[3:]],
        lambda x: [x[:, ::2], x[:, 1::2]],
        lambda x: [x[:3, :3], x[:3, 3:], x[3:, :3]],
    ],
    ids=["columns", "rows", "interleaved", "blocks"],
)
def test_disjoint_slices_of_one_tensor_are_taken(make: Any, backend: str) -> None:
    x = torch.randn(6, 6)
    want = x.clone()
    for view in make(want):
        view -= 0.5
    construct_and_step([leaf(v) for v in make(x)], backend, momentum=0.9)
    assert_same_bits([x], [want])


@every_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.ones(()).expand(5),
        lambda: torch.arange(6.0).as_strided((3, 3), (1, 1)),
    ],
    ids=["expanded", "scalar", "hankel"],
)
def test_parameter_that_overlaps_itself_is_refused(make: Any, backend: str) -> None:
    value = make()
    start = value.clone()
    with pytest.raises(ValueError, match=r"p0.*overlaps itself"):
        construct_and_step([leaf(value)], backend)
    assert_same_bits([value], [start])


# ---- gradients ----------------------------------------------------------------------------------


def assert_step_refused(
    optimizer: ClipSGD, error: type[Exception] | tuple[type[Exception], ...], match: str
) -> None:
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_backend
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_sparse_gradients_are_refused(
    steps_before: int, max_norm: float | None, backend: str
) -> None:
    params = make_params([(3, 2), (5, 2), (4,)])
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    optimizer = ClipSGD(named, lr=0.1, momentum=0.9, max_norm=max_norm, backend=backend)
    advance(optimizer, params, record_grads(params, steps_before))
    set_grads(params, record_grads(params, 1)[0])
    index = torch.tensor([[0, 2]])
    params[1].grad = torch.sparse_coo_tensor(index, torch.ones(2, 2), (5, 2), check_invariants=True)
    assert_step_refused(optimizer, ValueError, r"layer1.*sparse")
    advance(optimizer, params, record_grads(params, 1))  # and it goes on afterwards


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_gradient_of_a_dtype_that_the_kernels_lack(param: torch.dtype, grad: torch.dtype) -> None:
    params = make_params([(3,), (4,)], dtype=param)
    params[1].grad_dtype = grad
    optimizer = ClipSGD(
        [("first", params[0]), ("second", params[1])], lr=0.1, momentum=0.9, backend="cpu"
    )
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = torch.ones(4, dtype=grad)
    assert_step_refused(optimizer, TypeError, r"second.*dtype")


@every_backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_of_another_shape(momentum: float, backend: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer = ClipSGD(
        [("first", params[0]), ("second", params[1])], momentum=momentum, backend=backend
    )
    set_grads(params, record_grads(params, 1)[0])
    params[1].data = torch.zeros(2, 4)  # broadcasts with the gradient that is already there
    assert_step_refused(optimizer, ValueError, r"second.*shape")


def test_meta_parameters_are_not_for_the_cpu_backend() -> None:
    p = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(pysmooth.BackendError, match="meta"):
        ClipSGD([p], backend="cpu")
    (q,) = make_params([(3,)])
    optimizer = ClipSGD([q], backend="cpu")
    with pytest.raises(pysmooth.BackendError, match="meta"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
    assert ClipSGD([p]).resolved_backend == "eager"


def test_fake_parameters_are_refused_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.ones(3)
    optimizer = ClipSGD([("ghost", p)], backend="cpu")
    with pytest.raises(TypeError, match=r"ghost.*FakeTensor"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_parameters_of_unsupported_dtype(dtype: torch.dtype) -> None:
    real = nn.Parameter(torch.ones(3))
    odd = torch.zeros(3).to(dtype)
    optimizer = ClipSGD([("real", real), ("odd", odd)], momentum=0.9, backend="cpu")
    real.grad = torch.ones(3)
    assert_step_refused(optimizer, TypeError, r"odd.*dtype")


# ---- states -------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    ("state", "match"),
    [
        (lambda: torch.zeros(2, 4), "shape"),
        (lambda: torch.zeros(1), "shape"),
        (lambda: torch.zeros(4, dtype=torch.float64), "dtype"),
        (lambda: torch.zeros(4, dtype=torch.bfloat16), "dtype"),
        (lambda: torch.zeros(1).expand(4), "overlaps itself"),
    ],
    ids=["larger", "smaller", "float64", "bfloat16", "expanded"],
)
def test_state_that_does_not_fit(state: Any, match: str, backend: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer = ClipSGD(
        [("first", params[0]), ("second", params[1])], lr=0.1, momentum=0.9, backend=backend
    )
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.state[params[1]]["momentum_buffer"] = state()
    set_grads(params, rows[1])
    assert_step_refused(optimizer, ValueError, rf"momentum_buffer.*second.*{match}")


@every_backend
def test_state_that_shares_memory_with_a_parameter(backend: str) -> None:
    params = make_params([(4,), (4,)])
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.state[params[0]]["momentum_buffer"] = params[1].detach()
    set_grads(params, rows[1])
    assert_step_refused(optimizer, ValueError, "share memory")


@every_backend
def test_state_that_is_not_a_tensor(backend: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer = ClipSGD(
        [("first", params[0]), ("second", params[1])], lr=0.1, momentum=0.9, backend=backend
    )
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.state[params[1]]["momentum_buffer"] = [0.0] * 4
    set_grads(params, rows[1])
    assert_step_refused(optimizer, TypeError, r"momentum_buffer.*second")


# ---- closures -----------------------------------------------------------------------------------


@every_backend
def test_error_in_the_closure_is_passed_on(backend: str) -> None:
    params = make_params([(3,)])
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    set_grads(params, record_grads(params, 1)[0])
    before = snapshot(optimizer)

    def closure() -> float:
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)
