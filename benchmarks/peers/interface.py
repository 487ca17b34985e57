"""What a peer offers: the same three things to time as Ferrum, each from the same weights.

A peer converts the weights into its own format, says what they became (`expert`, `dense`), and binds inputs to a call
that does nothing but the work to be timed. The check therefore holds every peer to the numbers it really holds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

#: Distinct experts of a random layer, the others being copies: prime, so that an id taken modulo a power of two shows.
DISTINCT_EXPERTS = 7

#: The router's share of a row is compared at this many rows of a batch.
CHECKED_ROWS = 3

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Int4Matrix:
    """Symmetric int4 `[N, K]`: `weight[n, k] = (codes[n, k] - 8) * scales[n, k // group_size]`."""

    codes: torch.Tensor  # uint8 [N, K], 0..15
    scales: torch.Tensor  # float16 [N, G]

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return (self.codes.to(dtype) - 8) * self.scales.to(dtype).repeat_interleave(self.group_size, dim=1)

    def with_scales(self, dtype: torch.dtype) -> Int4Matrix:
        """The same with rounded scales, for engines that hold them so."""
        return Int4Matrix(self.codes, self.scales.to(dtype))

    def two_per_byte(self) -> torch.Tensor:
        """uint8 `[N, K/2]`, the even channel in the low nibble."""
        return self.codes[:, 0::2] | self.codes[:, 1::2] << 4


def random_int4(out_features: int, in_features: int, group_size: int, generator: torch.Generator) -> Int4Matrix:
    """Bell-shaped codes; outputs have about the variance of the inputs."""
    codes = torch.randn(out_features, in_features, generator=generator).mul_(2.7).round_().clamp_(-8, 7).add_(8)
    scales = torch.rand(out_features, in_features // group_size, generator=generator).mul_(0.5).add_(0.75)
    return Int4Matrix(codes.to(torch.uint8), (scales / (2.7 * in_features**0.5)).half())


@dataclass(frozen=True)
class MoeShape:
    """One routed block; the defaults are Qwen3-30B-A3B's."""

    hidden: int = 2048
    width: int = 768
    experts: int = 128
    top_k: int = 8
    group_size: int = 128


@dataclass(frozen=True)
class MoeWeights:
    """`DISTINCT_EXPERTS` experts, or fewer: expert e of the layer has the matrices at `e % len(gate)`."""

    shape: MoeShape
    gate: list[Int4Matrix]  # [I, H]
    up: list[Int4Matrix]  # [I, H]
    down: list[Int4Matrix]  # [H, I]

    def stack(self, per_expert: list[torch.Tensor]) -> torch.Tensor:
        """One tensor per distinct expert -> one for the layer, `[E, ...]`."""
        return torch.stack(per_expert)[torch.arange(self.shape.experts) % len(per_expert)]

    def with_scales(self, dtype: torch.dtype) -> MoeWeights:
        """The same with rounded scales."""
        gate, up, down = ([m.with_scales(dtype) for m in matrices] for matrices in (self.gate, self.up, self.down))
        return MoeWeights(self.shape, gate, up, down)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up `[I, H]` and down `[H, I]` of one expert, in float64."""
        index %= len(self.gate)
        return self.gate[index].dense(), self.up[index].dense(), self.down[index].dense()


def random_experts(shape: MoeShape, seed: int = 0) -> MoeWeights:
    generator = torch.Generator().manual_seed(seed)
    distinct = range(min(DISTINCT_EXPERTS, shape.experts))

    def matrices(out_features: int, in_features: int) -> list[Int4Matrix]:
        return [random_int4(out_features, in_features, shape.group_size, generator) for _ in distinct]

    gate, up = (matrices(shape.width, shape.hidden) for _ in range(2))
    return MoeWeights(shape, gate, up, matrices(shape.hidden, shape.width))


class MoeBlock(Protocol):
    """The routed experts of one layer in a peer's format."""

    expert_nbytes: int  # of one expert's weights and scales

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        """hidden float32 `[M, H]`, ids int32 and weights float32 `[M, K]` that add up to 1 -> a call giving `[M, H]`.

        Conversions of the arguments that a model would not make per layer belong here, not in the call.
        """

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What gate, up `[I, H]` and down `[H, I]` of one expert have become, in float64."""


class Linear(Protocol):
    """One quantised matrix in a peer's format."""

    nbytes: int

    def bind(self, x: torch.Tensor) -> Call:
        """x float32 `[M, K]` -> a call giving `[M, N]`."""

    def dense(self) -> torch.Tensor:
        """What the weights `[N, K]` have become, in float64."""


class Peer(Protocol):
    """An engine at one setting. A method it lacks is None."""

    name: str
    bound: float  # relative error allowed against float64 on the peer's own weights

    def available(self) -> str | None:
        """Why it cannot run here, or None."""

    moe_block: Callable[[MoeWeights], MoeBlock] | None
    linear: Callable[[Int4Matrix], Linear] | None


def needs(*modules: str, cuda: bool = False) -> str | None:
    """Why a peer that needs these modules, and maybe a GPU, cannot run here, or None."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "no CUDA device" if cuda and not torch.cuda.is_available() else None


class WrongResult(AssertionError):
    """A peer's result is not that of its weights: it is not timed."""


def check_block(peer: Peer, block: MoeBlock, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """Relative error of a few rows against float64. Raises WrongResult when it exceeds the peer's bound."""
    got = block.bind(hidden, ids, weights)()
    rows = torch.linspace(0, hidden.shape[0] - 1, CHECKED_ROWS).long().unique().tolist()
    expected = torch.zeros(len(rows), hidden.shape[1], dtype=torch.float64)
    for i, row in enumerate(rows):
        x = hidden[row].double()
        for index, weight in zip(ids[row].tolist(), weights[row].double()):
            gate, up, down = block.expert(index)
            expected[i] += weight * (down @ (F.silu(gate @ x) * (up @ x)))
    return _check(peer, got[rows].cpu(), expected)


def check_linear(peer: Peer, linear: Linear, x: torch.Tensor) -> float:
    """As `check_block`."""
    rows = torch.linspace(0, x.shape[0] - 1, CHECKED_ROWS).long().unique()
    return _check(peer, linear.bind(x)()[rows.tolist()].cpu(), x[rows].double() @ linear.dense().T)


def _check(peer: Peer, got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        raise WrongResult(f"{peer.name}: expected a result {tuple(expected.shape)}, got {tuple(got.shape)}")
    error = float((got.double() - expected).norm() / expected.norm())
    if not error <= peer.bound:
        raise WrongResult(f"{peer.name}: relative error {error:.3g} against float64, expected at most {peer.bound}")
    return error
