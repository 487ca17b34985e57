"""Run-time configuration: one typed object, and the only reader of FERRUM_* variables.

python -m ferrum_ops.config    # print the knobs with the values they have here
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

import torch

PREFIX = "FERRUM_"
#: Variables of the build (setup.py), which are no knobs.
BUILD_VARIABLES = ("FERRUM_CUDA", "FERRUM_CUDA_ARCHS", "FERRUM_NATIVE_DEBUG")
MOE_BLOCK_SIZES = (8, 16, 32, 48, 64)


class Values(ABC):
    """What a knob accepts, as an argument and as the text of a variable."""

    accepted: str

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The value; ValueError for text that is none."""

    @abstractmethod
    def contains(self, value: Any) -> bool: ...


class Switch(Values):
    accepted = "1, true, on, 0, false or off"

    def parse(self, text: str) -> bool:
        word = text.lower()
        if word in ("1", "true", "on"):
            return True
        if word in ("0", "false", "off"):
            return False
        raise ValueError(text)

    def contains(self, value: Any) -> bool:
        return isinstance(value, bool)


class Integer(Values):
    """From `lowest` up, or one of `choices`."""

    def __init__(self, lowest: int = 0, choices: tuple[int, ...] | None = None) -> None:
        self.lowest, self.choices = lowest, choices
        self.accepted = f"an integer of at least {lowest}" if choices is None else f"one of {choices}"

    def parse(self, text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() else None
        if not self.contains(value):
            raise ValueError(text)
        assert value is not None
        return value

    def contains(self, value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return value >= self.lowest if self.choices is None else value in self.choices


class Name(Values):
    def __init__(self, *names: str) -> None:
        self.names = names
        self.accepted = f"one of {names}"

    def parse(self, text: str) -> str:
        if text not in self.names:
            raise ValueError(text)
        return text

    def contains(self, value: Any) -> bool:
        return value in self.names


@dataclass(frozen=True)
class Knob:
    """One field of `RuntimeConfig`. `devices` are the types of device it changes anything on; None is all of them."""

    name: str
    values: Values
    default: Any  # None: unset
    devices: tuple[str, ...] | None
    effect: str

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def from_environment(self) -> Any:
        """The variable's value, or the default. ValueError naming the variable for text that it does not accept."""
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        try:
            return self.values.parse(text)
        except ValueError:
            raise ValueError(
                f"[RuntimeConfig] {self.variable}: expected {self.values.accepted}, got {text!r}"
            ) from None

    def accepts(self, value: Any) -> bool:
        return self.values.contains(value) or (self.default is None and value is None)


def _knob(name: str, values: Values, default: Any, effect: str, *, devices: tuple[str, ...] | None = ("cuda",)) -> Any:
    knob = Knob(name, values, default, devices, effect)
    read: Callable[[], Any] = knob.from_environment
    return field(default_factory=read, metadata={"knob": knob})


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The knobs of a model or an op. Defaults come from the variable `FERRUM_<KNOB>` at the moment one is made.

    An argument beats its variable. Nothing is kept between calls, so two configurations in one process can differ.
    Switches are True and False as arguments and `1`, `true`, `on`, `0`, `false`, `off` as variables; integers are
    decimal; names are listed. Knobs for CUDA are carried for its kernels and change nothing elsewhere, which
    `warn_without_effect` says.

    Raises:
        ValueError: a variable or an argument with a value that its knob does not accept (the message says what it
            does), or a FERRUM_* variable that is no knob (the message lists them).
    """

    triton_int4: bool = _knob(
        "triton_int4",
        Switch(),
        False,
        'quantised weights stay as they are on disk, for the Triton kernels: what layout="gptq" does for one model',
    )
    vllm_marlin: bool = _knob(
        "vllm_marlin", Switch(), False, "nothing: dense linears and experts have one Marlin kernel", devices=()
    )
    vllm_marlin_sms: int | None = _knob(
        "vllm_marlin_sms",
        Integer(1),
        None,
        "multiprocessors that Marlin spreads its work over; unset: the device's own",
    )
    vllm_atomic_add: bool = _knob(
        "vllm_atomic_add",
        Switch(),
        False,
        "Marlin adds partial sums with atomics: faster for few rows, but results differ from run to run",
    )
    vllm_fp32_reduce: bool = _knob(
        "vllm_fp32_reduce", Switch(), True, "Marlin adds partial sums in float32 instead of the output's dtype"
    )
    vllm_moe: bool = _knob(
        "vllm_moe",
        Switch(),
        True,
        "experts are grouped products of packed weights over aligned blocks; off: they are dequantised at every call "
        "and multiplied by PyTorch's grouped product",
    )
    vllm_moe_pair_ids: bool = _knob(
        "vllm_moe_pair_ids",
        Switch(),
        True,
        "blocks hold pair ids, which saves gathering the rows first; off: they hold packed rows",
    )
    vllm_moe_zero_ws: bool = _knob(
        "vllm_moe_zero_ws", Switch(), False, "the workspace of locks is zeroed before every grouped product"
    )
    moe_fused: bool = _knob(
        "moe_fused", Switch(), True, "one launch for all experts; off: `fused` runs as `bucketed` does"
    )
    moe_streams: int = _knob("moe_streams", Integer(1), 4, "streams that the launches of `bucketed` take turns on")
    moe_block_size: int | None = _knob(
        "moe_block_size",
        Integer(choices=MOE_BLOCK_SIZES),
        None,
        "rows per tile of the grouped products; unset: `pick_fused_config` and `pick_moe_block_size` decide",
        devices=None,
    )
    moe_large_m_block_size: int | None = _knob(
        "moe_large_m_block_size",
        Integer(choices=MOE_BLOCK_SIZES),
        None,
        "rows per tile from moe_large_m_min_pairs pairs on; unset: picked as below that",
        devices=None,
    )
    moe_large_m_min_pairs: int = _knob(
        "moe_large_m_min_pairs", Integer(), 1024, "pairs from which moe_large_m_block_size holds", devices=None
    )
    moe_host_route: bool = _knob(
        "moe_host_route",
        Switch(),
        False,
        "`bucketed` makes its plan on the host, which reads the ids back and launches no idle bucket; it cannot be "
        "captured then",
    )
    moe_profile: bool = _knob(
        "moe_profile",
        Switch(),
        False,
        "`generate` prints where the time of the MoE blocks went (to stderr)",
        devices=None,
    )
    decode_op_profile: bool = _knob(
        "decode_op_profile", Switch(), False, "every op of a decode step is timed by events"
    )
    moe_load_trace: bool = _knob(
        "moe_load_trace",
        Switch(),
        False,
        "loading prints a line for every module as it is packed (to stderr)",
        devices=None,
    )
    cuda_max_kv: int | None = _knob(
        "cuda_max_kv", Integer(1), None, "longest sequence that decode reserves shared memory for; unset: the model's"
    )
    cuda_device: int = _knob("cuda_device", Integer(), 0, "index of the device")
    cuda_graph: bool = _knob("cuda_graph", Switch(), False, "decode steps are captured as a graph and replayed")
    kv_dtype: str = _knob(
        "kv_dtype", Name("auto", "int8"), "auto", "dtype of the paged key and value pools; auto: the activations'"
    )
    paged_block_size: int = _knob("paged_block_size", Integer(1), 16, "tokens per page of the paged pools")

    def __post_init__(self) -> None:
        check_variables()
        for knob in knobs():
            value = getattr(self, knob.name)
            if not knob.accepts(value):
                accepted = "True or False" if isinstance(knob.values, Switch) else knob.values.accepted
                unset = " or None" if knob.default is None else ""
                raise ValueError(f"[RuntimeConfig] {knob.name}: expected {accepted}{unset}, got {value!r}")

    def moe_block_size_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `pick_moe_block_size`, the policy of the MoE blocks."""
        return {
            "override": self.moe_block_size,
            "large_m": self.moe_large_m_block_size,
            "large_m_min_pairs": self.moe_large_m_min_pairs,
        }

    @property
    def marlin_reduction(self) -> str:
        """`reduction` of the Marlin products."""
        if self.vllm_atomic_add:
            return "atomic"
        return "fp32" if self.vllm_fp32_reduce else "rounded"

    def without_effect(self, device: str | torch.device) -> list[str]:
        """Names of the knobs that are not at their built-in default and change nothing on this kind of device."""
        kind = torch.device(device).type
        idle = [knob for knob in knobs() if knob.devices is not None and kind not in knob.devices]
        return [knob.name for knob in idle if getattr(self, knob.name) != knob.default]

    def warn_without_effect(self, device: str | torch.device) -> None:
        """One warning that names the knobs of `without_effect`, if any. A model calls it once, when it is loaded."""
        names = self.without_effect(device)
        if names:
            kind = torch.device(device).type
            warnings.warn(f"[RuntimeConfig] without effect on {kind}: {', '.join(names)}", stacklevel=2)


def knobs() -> list[Knob]:
    """All knobs in the order of the fields."""

    def knob_of(f: Field[Any]) -> Knob:
        return f.metadata["knob"]

    return [knob_of(f) for f in fields(RuntimeConfig)]


def check_variables() -> None:
    """Raise ValueError for a FERRUM_* variable that is neither a knob nor one of the build's."""
    known = [knob.variable for knob in knobs()]
    unknown = sorted(v for v in os.environ if v.startswith(PREFIX) and v not in known and v not in BUILD_VARIABLES)
    if unknown:
        raise ValueError(f"[RuntimeConfig] {', '.join(unknown)}: expected one of {', '.join(known)}")


def table(config: RuntimeConfig) -> str:
    """Markdown: a row per knob with its variable, what that accepts, default, value in `config` and effect."""
    rows = [("variable", "accepts", "default", "value", "changes something on", "effect"), ("---",) * 6]
    for knob in knobs():
        default, value = ("unset" if v is None else str(v) for v in (knob.default, getattr(config, knob.name)))
        devices = "every device" if knob.devices is None else ", ".join(knob.devices) or "no device"
        rows.append((f"`{knob.variable}`", knob.values.accepted, default, value, devices, knob.effect))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _described() -> str:
    """The knobs as the last section of the class's docstring."""
    lines = []
    for knob in knobs():
        default = "unset" if knob.default is None else knob.default
        devices = "every device" if knob.devices is None else ", ".join(knob.devices) or "no device"
        lines.append(
            f"        {knob.name}: {knob.effect}. `{knob.variable}` [{default}]: {knob.values.accepted}; {devices}."
        )
    return "\n".join(["", "    Attributes:", *lines, "    "])


RuntimeConfig.__doc__ = f"{(RuntimeConfig.__doc__ or '').rstrip()}\n{_described()}"
