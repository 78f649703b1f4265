"""What every optimizer of this package keeps as torch users know it, run over the registry."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import tracemalloc

import pytest
import torch
from battery import (
    EXAMPLES,
    STEPS,
    Entry,
    Kwargs,
    advance,
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    assert_unchanged,
    every_backend,
    every_entry,
    every_variant,
    make_params,
    max_ulp,
    oracle,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
    widest,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysmooth

# ---- numbers ------------------------------------------------------------------------------------


def check_against_oracle(
    entry: Entry,
    kwargs: Kwargs,
    params: list[torch.nn.Parameter],
    rows: list[list[Tensor]],
    backend: str,
) -> None:
    """Errors grow with the steps: the bound is `entry.ulp` units in the last place for each."""
    exact = oracle(entry, kwargs, params, rows)
    optimizer = entry.make(params, backend=backend, **kwargs)
    advance(optimizer, params, rows)
    for i, p in enumerate(params):
        error = max_ulp(p, exact.params[i], exact.sizes[i])
        assert error <= entry.ulp * len(rows), f"parameter {i}: {error} ULP"
        for key in entry.state_keys(kwargs):
            state = optimizer.state[p][key]
            if state.numel() == 0:
                continue
            # A state's error is relative to what went into it: itself, gradients, decayed weights
            # (which, in 16 bits, carry the parameter's rounding).
            inputs = max(exact.peaks[i][key], *(float(row[i].abs().max()) for row in rows))
            decayed = kwargs.get("weight_decay", 0.0) * float(exact.sizes[i].max())
            bound = torch.finfo(state.dtype).eps * inputs + torch.finfo(p.dtype).eps * decayed
            error = float((state.to(widest(state.dtype)) - exact.states[i][key]).abs().max())
            assert error <= entry.ulp * len(rows) * bound, f"{key} of parameter {i}: {error}"


@every_backend
@every_variant
def test_agrees_with_float64_reference(entry: Entry, kwargs: Kwargs, backend: str) -> None:
    params = make_params()
    check_against_oracle(entry, kwargs, params, record_grads(params, STEPS), backend)


@every_backend
@every_entry
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_every_dtype(entry: Entry, dtype: torch.dtype, backend: str) -> None:
    if dtype not in entry.dtypes and dtype != torch.complex128:
        pytest.skip(f"{entry.name} does not take {dtype}")
    params = make_params(dtype=dtype)
    check_against_oracle(entry, entry.main, params, record_grads(params, STEPS), backend)


@every_backend
@every_entry
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_float32_parameters(
    entry: Entry, grad_dtype: torch.dtype, backend: str
) -> None:
    params = make_params()
    for p in params:
        p.grad_dtype = grad_dtype
    rows = record_grads(params, STEPS, dtype=grad_dtype)
    check_against_oracle(entry, entry.main, params, rows, backend)
    assert all(p.grad.dtype == grad_dtype for p in params)


@every_backend
@every_entry
@settings(max_examples=EXAMPLES)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_lists_of_any_shapes(
    entry: Entry, backend: str, shapes: list[tuple[int, ...]], seed: int
) -> None:
    params = make_params(shapes, seed=seed)
    check_against_oracle(entry, entry.main, params, record_grads(params, 3, seed), backend)


@every_backend
@every_entry
def test_maximize_is_descent_on_the_negated_gradient(entry: Entry, backend: str) -> None:
    up, down = make_params(), make_params()
    rows = record_grads(up, 5)
    ascent = entry.build(up, backend, maximize=True)
    descent = entry.build(down, backend)
    advance(ascent, up, rows)
    advance(descent, down, [[-g for g in row] for row in rows])
    assert_same_bits(up, down)
    assert not same_bits(up[0], make_params()[0])


# ---- groups, schedulers, closures, hooks --------------------------------------------------------


@every_backend
@every_entry
def test_closure_is_called_with_grad_and_its_loss_returned(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    start = p.detach().clone()
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    p.grad = torch.full_like(p, 1e3)  # stale: the closure has to replace it before the update
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss is calls[0]
    assert len(calls) == 1

    (q,) = make_params([(4,)])
    other = entry.build([q], backend)
    q.grad = 2 * start
    assert other.step() is None
    assert_same_bits([p], [q])


@every_backend
@every_entry
def test_each_group_has_its_own_hyper_parameters(entry: Entry, backend: str) -> None:
    """With a clip per group, groups do not see each other: apart and together are the same."""
    kwargs = {"scope": "group"} if entry.tensors else {}
    overrides = ({"lr": 0.03, "momentum": 0.5}, {"lr": 0.2, "weight_decay": 0.3, "maximize": True})
    together = make_params()
    groups = [{"params": together[:3], **overrides[0]}, {"params": together[3:], **overrides[1]}]
    optimizer = entry.build(groups, backend, **kwargs)
    rows = record_grads(together, 5)
    advance(optimizer, together, rows)

    apart = make_params()
    for part, columns, own in (
        (apart[:3], slice(0, 3), overrides[0]),
        (apart[3:], slice(3, None), overrides[1]),
    ):
        alone = entry.build([{"params": part, **own}], backend, **kwargs)
        advance(alone, part, [row[columns] for row in rows])
    assert_same_bits(together, apart)
    assert not same_bits(together[0], make_params()[0])


@every_backend
@every_entry
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_step_lr_scheduler(entry: Entry, backend: str, kind: str) -> None:
    params, by_hand = make_params(), make_params()
    rows = record_grads(params, 6)
    optimizer, manual = entry.build(params, backend), entry.build(by_hand, backend)
    if kind == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        manual.param_groups[0]["lr"] = 0.25
    lr = float(manual.param_groups[0]["lr"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for i, row in enumerate(rows):
        manual.param_groups[0]["lr"] = lr * 0.5 ** (i // 2)
        advance(manual, by_hand, [row])
        advance(optimizer, params, [row])
        schedule.step()
    assert_same_bits(params, by_hand)
    assert float(optimizer.param_groups[0]["lr"]) == lr / 8


@every_backend
@every_entry
def test_one_cycle_moves_lr_and_momentum(entry: Entry, backend: str) -> None:
    if "momentum" not in entry.build(make_params(), backend).defaults:
        pytest.skip("no momentum to cycle")
    params, by_hand = make_params(), make_params()
    rows = record_grads(params, 8)
    optimizer, manual = entry.build(params, backend), entry.build(by_hand, backend)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    seen = set()
    for row in rows:
        for name in ("lr", "momentum"):
            manual.param_groups[0][name] = optimizer.param_groups[0][name]
        seen.add(optimizer.param_groups[0]["momentum"])
        advance(optimizer, params, [row])
        advance(manual, by_hand, [row])
        schedule.step()
    assert_same_bits(params, by_hand)
    assert len(seen) == len(rows)  # it did cycle


@every_backend
@every_entry
def test_one_element_tensor_lr(entry: Entry, backend: str) -> None:
    first, second = make_params(), make_params()
    rows = record_grads(first, 4)
    plain, tensor = entry.build(first, backend), entry.build(second, backend)
    plain.param_groups[0]["lr"] = 0.125
    lr = torch.tensor([0.125])
    tensor.param_groups[0]["lr"] = lr
    advance(plain, first, rows[:2])
    advance(tensor, second, rows[:2])
    assert_same_bits(first, second)
    lr.fill_(0.5)  # changed in place, as schedulers do
    plain.param_groups[0]["lr"] = 0.5
    advance(plain, first, rows[2:])
    advance(tensor, second, rows[2:])
    assert_same_bits(first, second)


@every_backend
@every_entry
def test_add_param_group_in_mid_training(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 6)
    kwargs = {**entry.tensors}  # so that the late group does not change the others' norm
    optimizer = entry.build(params[:2], backend, **kwargs)
    advance(optimizer, params[:2], [row[:2] for row in rows[:3]])
    optimizer.add_param_group({"params": params[2:], "lr": 0.03})
    advance(optimizer, params, rows[3:])

    advance(entry.build(expected[:2], backend, **kwargs), expected[:2], [row[:2] for row in rows])
    late = entry.build([{"params": expected[2:], "lr": 0.03}], backend, **kwargs)
    advance(late, expected[2:], [row[2:] for row in rows[3:]])
    assert_same_bits(params, expected)


@every_backend
@every_entry
def test_step_hooks_run_around_the_update(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    start = p.detach().clone()
    seen: dict[str, Tensor] = {}
    pre = optimizer.register_step_pre_hook(lambda o, a, k: seen.update(pre=p.detach().clone()))
    post = optimizer.register_step_post_hook(lambda o, a, k: seen.update(post=p.detach().clone()))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert_same_bits([seen["pre"], seen["post"]], [start, p])
    assert not same_bits(start, p)
    pre.remove()
    post.remove()
    seen.clear()
    optimizer.step()
    assert not seen


# ---- copies and checkpoints ---------------------------------------------------------------------


def continues_alike(
    optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer, rows: list[list[Tensor]]
) -> None:
    """Both go on, and end at the same bits without having shared anything."""
    for row in rows:
        advance(optimizer, all_params(optimizer), [row])
        advance(other, all_params(other), [row])
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


@every_backend
@every_variant
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_copy_in_mid_training_continues_with_the_same_bits(
    entry: Entry, kwargs: Kwargs, backend: str, how: str
) -> None:
    params = make_params()
    rows = record_grads(params, 8)
    optimizer = entry.make(params, backend=backend, **kwargs)
    advance(optimizer, params, rows[:4])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = entry.make(twins, backend=backend, **kwargs)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other) is type(optimizer)
    assert all(p is not q for p, q in zip(all_params(other), params, strict=True))
    continues_alike(optimizer, other, rows[4:])


@every_backend
@every_entry
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_checkpoint_keeps_the_precision_of_states(
    entry: Entry, dtype: torch.dtype, backend: str
) -> None:
    if dtype not in entry.dtypes:
        pytest.skip(f"{entry.name} does not take {dtype}")
    params = make_params(dtype=dtype)
    rows = record_grads(params, 6)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:3])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = entry.build(twins, backend)
    other.load_state_dict(optimizer.state_dict())
    continues_alike(optimizer, other, rows[3:])


@every_backend
@every_entry
def test_deepcopy_of_a_fresh_optimizer(entry: Entry, backend: str) -> None:
    params = make_params()
    optimizer = entry.build(params, backend)
    continues_alike(optimizer, copy.deepcopy(optimizer), record_grads(params, 3))


# ---- gradients that come and go -----------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(entry: Entry, backend: str, set_to_none: bool) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    for row in rows:
        optimizer.zero_grad(set_to_none=set_to_none)
        for p, g in zip(params, row, strict=True):
            # Accumulates into the old tensor, or moves to a new one.
            (p * g.to(p.dtype)).sum().backward()
        optimizer.step()
    advance(entry.build(expected, backend), expected, rows)
    assert_same_bits(params, expected)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in params)


@every_backend
@every_entry
def test_parameters_without_gradient_stay_as_they_are(entry: Entry, backend: str) -> None:
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 3)
    for row in rows:
        set_grads(params, [g if i % 2 else None for i, g in enumerate(row)])
        optimizer.step()
    for i, (p, s) in enumerate(zip(params, start, strict=True)):
        assert same_bits(p, s) == (i % 2 == 0 or p.numel() == 0)
        assert bool(optimizer.state.get(p)) == bool(i % 2)


@every_backend
@every_entry
def test_no_gradient_at_all_changes_nothing(entry: Entry, backend: str) -> None:
    params = make_params()
    optimizer = entry.build(params, backend)
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)
    assert not any(before[1])


@every_backend
@every_entry
def test_gradients_that_appear_late_and_vanish(entry: Entry, backend: str) -> None:
    """A parameter's first step is the first with a gradient; pauses leave its state alone."""
    present = ((True, False), (True, True), (False, True), (True, True))
    params, expected = make_params([(5,), (40,)]), make_params([(5,), (40,)])
    rows = record_grads(params, len(present))
    optimizer = entry.build(params, backend, **entry.tensors)
    for row, here in zip(rows, present, strict=True):
        set_grads(params, [g if h else None for g, h in zip(row, here, strict=True)])
        optimizer.step()
    for i, p in enumerate(expected):
        own = [[row[i]] for row, here in zip(rows, present, strict=True) if here[i]]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)


# ---- layouts ------------------------------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("case", ["channels_last", "transposed", "expanded", "sliced", "offset"])
def test_layout_of_a_gradient_does_not_matter(entry: Entry, backend: str, case: str) -> None:
    params, expected = make_params([(4, 3, 5, 5), (6,)]), make_params([(4, 3, 5, 5), (6,)])
    if case == "channels_last":
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    for row in record_grads(params, 4):
        g = row[0].float()
        if case == "transposed":
            used = g.transpose(0, 3).contiguous().transpose(0, 3)
            assert not used.is_contiguous()
        elif case == "expanded":
            used = g[:, :1, :1].expand_as(g)
            g = used.contiguous()
        elif case == "sliced":
            used = torch.stack([g, torch.full_like(g, float("nan"))], dim=-1)[..., 0]
        elif case == "offset":
            used = torch.cat([torch.zeros(1), g.reshape(-1)])[1:].view_as(g)
        else:
            used = g
        set_grads(expected, [g, row[1]])
        set_grads(params, [None, row[1]])
        params[0].grad = used
        optimizer.step()
        plain.step()
        for p, q in zip(params, expected, strict=True):
            # Another order of summation: the norm, hence the step, may differ in the last place.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


# ---- autograd and torch.compile -----------------------------------------------------------------


@every_backend
@every_entry
def test_autograd_notices_the_update(entry: Entry, backend: str) -> None:
    params = make_params([(4,), (3, 3)])
    optimizer = entry.build(params, backend)
    for _ in range(2):  # the first step, which allocates states, and one that reuses them
        versions = [p._version for p in params]
        losses = [(p**2).sum() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@every_backend
@every_entry
def test_autograd_notices_that_states_changed(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for key in entry.state_keys(entry.main):
        version = optimizer.state[p][key]._version
        optimizer.step()
        assert optimizer.state[p][key]._version > version


@every_backend
@every_entry
def test_compiled_training_step(entry: Entry, backend: str) -> None:
    """Graph breaks are allowed; other numbers are not."""

    def train(compiled: bool) -> list[Tensor]:
        params = make_params([(6, 4), (6,)])
        optimizer = entry.build(params, backend)

        def body(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = torch.tanh(x @ params[0].T + params[1]).sum()
            value = loss.detach()
            loss.backward()
            optimizer.step()
            return value

        fn = torch.compile(body, backend="eager") if compiled else body
        gen = torch.Generator().manual_seed(5)
        losses = [fn(torch.randn(3, 4, generator=gen)) for _ in range(4)]
        return [*losses, *params]

    torch.compiler.reset()
    assert_same_bits(train(compiled=True), train(compiled=False))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.many_steps
@every_backend
@every_entry
def test_no_leak_over_many_steps(entry: Entry, backend: str) -> None:
    params = make_params([(3,), (2, 2)])
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 1)
    steps = 10_000 if backend == "cpu" else 1_500  # the eager steps are plain torch, and slow
    advance(optimizer, params, rows * 100)
    gc.collect()
    objects = len(gc.get_objects())
    growth: list[int] = []
    tracemalloc.start()
    try:
        advance(optimizer, params, rows * (steps // 5))
        # A leak grows in every stretch; the interpreter's free lists, once.
        while len(growth) < 3 and (not growth or growth[-1] >= 32 * 1024):
            gc.collect()
            early, _ = tracemalloc.get_traced_memory()
            advance(optimizer, params, rows * steps)
            gc.collect()
            late, _ = tracemalloc.get_traced_memory()
            growth.append(late - early)
    finally:
        tracemalloc.stop()
    assert abs(len(gc.get_objects()) - objects) < 200  # less than one in 50 steps
    assert growth[-1] < 32 * 1024  # not one small object per step


@pytest.mark.many_steps
@every_backend
@every_entry
def test_native_memory_does_not_grow(entry: Entry, backend: str) -> None:
    """Gradients of a megabyte, new in each step: one kept alive in five would be seen."""
    import resource

    params = make_params([(512, 512)])
    optimizer = entry.build(params, backend)

    def steps(n: int) -> int:
        for _ in range(n):
            params[0].grad = torch.full_like(params[0], 0.01)
            optimizer.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    early = steps(10)
    assert steps(200) - early < 40 * 1024  # KiB


# ---- things moved under the optimizer's feet ----------------------------------------------------


@every_backend
@every_entry
def test_parameter_replaced_in_its_group(entry: Entry, backend: str) -> None:
    params, expected = make_params([(5,), (7,)]), make_params([(5,), (7,)])
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend, **entry.tensors)
    advance(optimizer, params, rows[:2])
    old = params[0].detach().clone()
    new = torch.nn.Parameter(torch.linspace(0, 1, 5))
    replaced, optimizer.param_groups[0]["params"][0] = params[0], new
    advance(optimizer, [new, params[1]], rows[2:])

    assert same_bits(replaced, old)
    fresh = torch.nn.Parameter(torch.linspace(0, 1, 5))
    advance(entry.build([fresh], backend, **entry.tensors), [fresh], [row[:1] for row in rows[2:]])
    advance(
        entry.build(expected[1:], backend, **entry.tensors), expected[1:], [r[1:] for r in rows]
    )
    assert_same_bits([new, params[1]], [fresh, expected[1]])


@every_backend
@every_entry
@pytest.mark.parametrize("change", ["append", "delete"])
def test_list_of_parameters_changed_in_its_group(entry: Entry, backend: str, change: str) -> None:
    """torch never stops anyone from editing group["params"]."""
    params, expected = make_params([(5,), (7,), (3,)]), make_params([(5,), (7,), (3,)])
    rows = record_grads(params, 4)
    before, after = (2, 3) if change == "append" else (3, 2)
    optimizer = entry.build(params[:before], backend, **entry.tensors)
    advance(optimizer, params[:before], [row[:before] for row in rows[:2]])
    if change == "append":
        optimizer.param_groups[0]["params"].append(params[2])
    else:
        del optimizer.param_groups[0]["params"][2]
    advance(optimizer, params[:after], [row[:after] for row in rows[2:]])

    for i, p in enumerate(expected):
        own = [[row[i]] for s, row in enumerate(rows) if i < (before if s < 2 else after)]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)


@every_backend
@every_entry
def test_moved_storage(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:2])
    old = [p.data for p in params]
    kept = [t.clone() for t in old]
    for p in params:
        p.data = p.data.clone()
    advance(optimizer, params, rows[2:])
    advance(entry.build(expected, backend), expected, rows)
    assert_same_bits(params, expected)
    assert_same_bits(old, kept)  # nothing was written to the memory left behind


@every_backend
@every_entry
def test_states_replaced_by_the_user(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    advance(optimizer, params, rows[:2])
    advance(plain, expected, rows[:2])
    old = []
    for p, q in zip(params, expected, strict=True):
        for key in entry.state_keys(entry.main):
            old.append(optimizer.state[p][key])
            optimizer.state[p][key] = torch.full_like(p, 0.25).detach()
            plain.state[q][key].fill_(0.25)
    kept = [t.clone() for t in old]
    advance(optimizer, params, rows[2:])
    advance(plain, expected, rows[2:])
    assert_same_snapshot(snapshot(optimizer), snapshot(plain))
    assert_same_bits(old, kept)


@every_backend
@every_entry
def test_states_cleared_by_the_user_start_afresh(entry: Entry, backend: str) -> None:
    params = make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:2])
    optimizer.state.clear()
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    continues_alike(optimizer, entry.build(fresh, backend), rows[2:])


# ---- non-finite gradients -----------------------------------------------------------------------

BAD = [float("inf"), float("-inf"), float("nan")]


def spoil(params: list[torch.nn.Parameter], which: int, value: float) -> None:
    params[which].grad.view(-1)[-1] = value


@every_backend
@every_variant
@pytest.mark.parametrize("value", BAD)
def test_skip_leaves_everything_as_it_was(
    entry: Entry, kwargs: Kwargs, backend: str, value: float
) -> None:
    params = make_params()
    rows = record_grads(params, 3)
    optimizer = entry.make(params, backend=backend, **{**kwargs, "nonfinite": "skip"})
    for count, row in enumerate(rows):  # in the very first step and in later ones
        before = snapshot(optimizer)
        set_grads(params, row)
        spoil(params, 4, value)
        optimizer.step()
        assert_unchanged(optimizer, before)
        assert optimizer.skipped_steps() == count + 1
        advance(optimizer, params, [row])
        assert optimizer.skipped_steps() == count + 1
    clean = make_params()
    advance(entry.make(clean, backend=backend, **kwargs), clean, rows)
    assert_same_bits(params, clean)


@every_backend
@every_entry
def test_skipped_steps_outlive_a_new_group_and_a_load(entry: Entry, backend: str) -> None:
    """The counter counts since construction."""
    params = make_params([(4,), (3,)])
    optimizer = entry.build(params[:1], backend, nonfinite="skip")
    params[0].grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.skipped_steps() == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps() == 1
    optimizer.step()
    assert optimizer.skipped_steps() == 2


@every_backend
@every_variant
def test_raise_names_the_parameter_and_changes_nothing(
    entry: Entry, kwargs: Kwargs, backend: str
) -> None:
    params = make_params()
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    optimizer = entry.make(named, backend=backend, **{**kwargs, "nonfinite": "raise"})
    rows = record_grads(params, 2)
    for row in rows:
        before = snapshot(optimizer)
        set_grads(params, row)
        spoil(params, 2, float("nan"))
        spoil(params, 5, float("inf"))
        with pytest.raises(pysmooth.NonFiniteGradientError) as error:
            optimizer.step()
        assert "layer2.weight" in str(error.value)
        assert "layer5.weight" in str(error.value)
        assert "layer4.weight" not in str(error.value)
        assert_unchanged(optimizer, before)
        advance(optimizer, params, [row])
    clean = make_params()
    advance(entry.make(clean, backend=backend, **kwargs), clean, rows)
    assert_same_bits(params, clean)


@every_backend
@every_entry
def test_unnamed_parameters_are_told_by_their_place(entry: Entry, backend: str) -> None:
    params = make_params([(2,), (3,), (4,)])
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = entry.build(groups, backend, nonfinite="raise")
    set_grads(params, record_grads(params, 1)[0])
    spoil(params, 2, float("nan"))
    with pytest.raises(pysmooth.NonFiniteGradientError, match="group 1, parameter 1"):
        optimizer.step()


@every_backend
@every_entry
@pytest.mark.parametrize("value", BAD)
def test_propagate_lets_a_nan_through(entry: Entry, backend: str, value: float) -> None:
    """With one norm over all, as with torch's clip_grad_norm_, a NaN reaches every parameter."""
    params = make_params([(4,), (3,)])
    if not entry.clips:  # what keeps a residual
        with pytest.raises(ValueError, match="nonfinite must be one of skip, raise, zero"):
            entry.build(params, backend, nonfinite="propagate")
        return
    optimizer = entry.build(params, backend, nonfinite="propagate")
    set_grads(params, record_grads(params, 1)[0])
    spoil(params, 0, value)
    optimizer.step()
    assert not params[0][-1].isfinite()
    # An infinite norm clips the rest to 0; what divides by a norm of all of it is NaN then.
    assert params[1].isfinite().all() == (value == value and not entry.joint)
    assert optimizer.skipped_steps() == 0


# ---- mixed precision ----------------------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(entry: Entry, backend: str, unscale: bool) -> None:
    """Scaled gradients, the clip still in the units of the unscaled ones."""
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, row in enumerate(rows):
        before = snapshot(optimizer)
        scale = scaler.get_scale()
        optimizer.zero_grad()
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(params, row, strict=True))
        scaler.scale(loss).backward()
        if i == 2:
            spoil(params, 4, float("inf"))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            assert_unchanged(optimizer, before)
            assert scaler.get_scale() < scale
        else:
            advance(plain, expected, [row])  # a power of two: unscaling is exact
    assert_same_bits(params, expected)


# ---- the torch twin -----------------------------------------------------------------------------


@every_backend
@every_entry
def test_equals_its_torch_twin(entry: Entry, backend: str) -> None:
    if entry.twin is None:
        pytest.skip("torch has no such optimizer")
    params, expected = make_params(), make_params()
    rows = record_grads(params, STEPS)
    advance(entry.make(params, backend=backend, **entry.twin_kwargs), params, rows)
    advance(entry.twin(expected, **entry.twin_kwargs), expected, rows)
    sizes = oracle(entry, entry.twin_kwargs, make_params(), rows).sizes
    for p, q, size in zip(params, expected, sizes, strict=True):
        assert max_ulp(p, q.detach().to(widest(q.dtype)), size) <= STEPS
