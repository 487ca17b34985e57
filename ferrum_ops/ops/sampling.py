"""What happens to logits before a token is chosen, and the greedy choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_float32, check_rows_apart, check_shape, compute_dtype, expect
from ferrum_ops._library import refuse_grad, register


def argmax_rows(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The greedy choice of every row: the lowest index of its largest finite value.

    NaN and the infinities never win. A row that has no finite value gives 0; with a mask, its first allowed index, and
    -1 when the mask allows none.

    Args:
        logits: `[T, n]` with n >= 1, float32, float16 or bfloat16; last dimension contiguous, any row stride.
        mask: bool `[n]` for all rows or `[T, n]`, last dimension contiguous: True where an index may be chosen. None
            allows all.

    Returns:
        int64 `[T]`.

    Raises:
        RuntimeError: other dtypes, shapes or strides; on CUDA also n above 2^31 - 1.
    """
    return torch.ops.ferrum.argmax_rows(logits, mask)


def _check_logits(op: str, logits: torch.Tensor, expected: str, *, columns: int) -> None:
    check_activation(op, "logits", logits)
    expect(logits.dim() == 2 and logits.shape[1] >= columns, op, "logits", expected, tuple(logits.shape))
    _check_last_contiguous(op, "logits", logits)


def _check_last_contiguous(op: str, argument: str, t: torch.Tensor) -> None:
    rows = t.numel() == 0 or t.shape[-1] == 1 or t.stride(-1) == 1
    expect(rows, op, argument, "a contiguous last dimension", f"strides {tuple(t.stride())}")


def _check_argmax(logits: torch.Tensor, mask: torch.Tensor | None) -> None:
    op = "argmax_rows"
    _check_logits(op, logits, "shape (tokens, vocabulary) with at least 1 column", columns=1)
    if mask is not None:
        expect(mask.dtype == torch.bool, op, "mask", "bool", mask.dtype)
        tokens, size = logits.shape
        matches = tuple(mask.shape) in ((size,), (tokens, size))
        expect(matches, op, "mask", f"shape ({size},) or ({tokens}, {size})", tuple(mask.shape))
        _check_last_contiguous(op, "mask", mask)


def argmax_rows_ref(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    _check_argmax(logits, mask)
    size = logits.shape[1]
    allowed = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand(logits.shape)
    finite = torch.isfinite(logits) & allowed
    largest = torch.where(finite, logits, -torch.inf).amax(-1, keepdim=True)
    winners = torch.where(finite.any(-1, keepdim=True), finite & (logits == largest), allowed)
    index = torch.where(winners, torch.arange(size, device=logits.device), size).amin(-1)
    return torch.where(index == size, -1, index)


def argmax_rows_fake(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    _check_argmax(logits, mask)
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def argmax_rows_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for shape in ((0, 8), (1, 1), (3, 63), (5, 1000), (2, 70001)):
        yield randn(*shape), None
        yield randn(*shape), torch.rand(*shape, device=device) < 0.3
    yield randn(6, 300)[:, 20:147], torch.rand(127, device=device) < 0.1
    yield torch.randint(-2, 3, (9, 64), device=device).to(dtype), None  # many ties
    odd = randn(7, 100)
    odd[0], odd[1], odd[2] = torch.nan, torch.inf, -torch.inf
    odd[3, ::2], odd[4, 1::2], odd[5, 3:] = torch.nan, torch.inf, -torch.inf
    yield odd, None
    mask = torch.rand(7, 200, device=device)[:, 50:150] < 0.2
    mask[6] = False
    yield odd, mask


def repetition_penalty_(logits: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, penalty: torch.Tensor) -> None:
    """Lower in place the logits of ids that occurred already (Keskar et al. 2019, arXiv:1909.05858).

    `v = v / p if v > 0 else v * p` for row t's penalty p and every id in `ids[offsets[t]:offsets[t + 1]]`. An id counts
    once however often it is listed, as in transformers' `RepetitionPenaltyLogitsProcessor`, so that the tokens so far
    can be passed as they are. Left alone: ids outside `[0, n)` (padding), values that are not finite, and rows whose
    penalty is 1 or not finite.

    Args:
        logits: `[T, n]`, float32, float16 or bfloat16; last dimension contiguous, rows apart. Evaluated in float32.
        ids: int32 or int64 `[L]`, contiguous.
        offsets: int32 or int64 `[T + 1]`, contiguous: starts at 0, never falls, stays within L.
        penalty: float32 `[T]`, contiguous, positive; above 1 makes repetition less likely.

    Raises:
        RuntimeError: other dtypes, shapes or strides, or logits that require grad while autograd is on; on CPU also
            offsets and penalties that break the rules above.

    On other devices the host cannot see values: offsets are cut to `[0, L]` there, a row whose list ends before it
    starts has none, and one whose penalty is not positive is left alone.
    """
    refuse_grad("repetition_penalty_", logits)
    torch.ops.ferrum.repetition_penalty_(logits, ids, offsets, penalty)


def _check_penalty(logits: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, penalty: torch.Tensor) -> None:
    op = "repetition_penalty_"
    _check_logits(op, logits, "shape (tokens, vocabulary)", columns=0)
    check_rows_apart(op, "logits", logits)
    tokens = logits.shape[0]
    for name, integers in (("ids", ids), ("offsets", offsets)):
        expect(integers.dtype in (torch.int32, torch.int64), op, name, "int32 or int64", integers.dtype)
        expect(integers.dim() == 1, op, name, "1 dimension", integers.dim())
        expect(integers.is_contiguous(), op, name, "a contiguous tensor", f"strides {tuple(integers.stride())}")
    check_shape(op, "offsets", offsets, (tokens + 1,))
    check_float32(op, "penalty", penalty, logits)
    check_shape(op, "penalty", penalty, (tokens,))
    expect(penalty.is_contiguous(), op, "penalty", "a contiguous tensor", f"strides {tuple(penalty.stride())}")


def _check_penalty_values(ids: torch.Tensor, offsets: torch.Tensor, penalty: torch.Tensor) -> None:
    op, listed = "repetition_penalty_", ids.numel()
    before = 0
    for i, offset in enumerate(offsets.tolist()):
        inside = before <= offset <= (listed if i > 0 else 0)
        rule = f"a list that starts at 0, never falls and stays within {listed}"
        expect(inside, op, "offsets", rule, f"{offset} at index {i}")
        before = offset
    for i, value in enumerate(penalty.tolist()):
        expect(not value <= 0, op, "penalty", "positive values", f"{value:g} at index {i}")


def repetition_penalty__ref(
    logits: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, penalty: torch.Tensor
) -> None:
    _check_penalty(logits, ids, offsets, penalty)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_penalty_values(ids, offsets, penalty)
    tokens, size = logits.shape
    entries = torch.arange(ids.numel(), device=ids.device)
    owned = (entries >= offsets[:-1, None]) & (entries < offsets[1:, None])
    # Entries that count for nothing go to a column behind the last one.
    columns = torch.where(owned & (ids >= 0) & (ids < size), ids, size).long()
    listed = torch.zeros(tokens, size + 1, dtype=torch.bool, device=ids.device).scatter(1, columns, True)[:, :size]
    value = logits.to(compute_dtype(logits.dtype))
    factor = penalty[:, None].to(value.dtype)
    penalized = torch.where(value > 0, value / factor, value * factor).to(logits.dtype)
    changed = listed & torch.isfinite(value) & torch.isfinite(factor) & (factor > 0) & (factor != 1)
    logits.copy_(torch.where(changed, penalized, logits))


def repetition_penalty__fake(
    logits: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, penalty: torch.Tensor
) -> None:
    _check_penalty(logits, ids, offsets, penalty)


def repetition_penalty__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def arguments(lengths: list[int], size: int, wide: bool = False) -> tuple[torch.Tensor, ...]:
        integers = torch.int64 if wide else torch.int32
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, integers)
        ids = torch.randint(-3, size + 3, (sum(lengths),), device=device).to(integers)
        logits = 3 * torch.randn(len(lengths), size, device=device)
        return logits.to(dtype), ids, offsets, 0.5 + torch.rand(len(lengths), device=device)

    yield arguments([], 50)
    yield arguments([0, 0], 8)
    yield arguments([5, 0, 200, 1], 63)  # more ids than the vocabulary: they repeat
    yield arguments([300], 1000, wide=True)
    yield (torch.empty(2, 0, dtype=dtype, device=device), *arguments([3, 4], 8)[1:])
    logits, ids, offsets, penalty = arguments([40, 40, 40, 40], 60)
    logits[0, ::2], logits[1, ::3], logits[2, 1::2] = torch.nan, torch.inf, -torch.inf
    penalty[3] = 1.0
    yield logits, ids, offsets, penalty
    _, ids, offsets, penalty = arguments([20, 20, 20], 127)
    penalty[0], penalty[1] = torch.inf, torch.nan
    yield torch.randn(3, 300, device=device).to(dtype)[:, 20:147], ids, offsets, penalty


register("argmax_rows", ref=argmax_rows_ref, fake=argmax_rows_fake, inputs=argmax_rows_inputs)
register(
    "repetition_penalty_",
    ref=repetition_penalty__ref,
    fake=repetition_penalty__fake,
    inputs=repetition_penalty__inputs,
)
