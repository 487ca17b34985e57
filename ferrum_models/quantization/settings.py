"""The quantisation settings of a checkpoint: GPTQ's configuration with its per-module overrides."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ferrum_models.checkpoint import CheckpointError
from ferrum_ops.formats.gptq import SUPPORTED_BITS, ZERO_OFFSETS


@dataclass(frozen=True)
class ModuleSettings:
    bits: int
    group_size: int  # -1: one group over all input features
    checkpoint_format: str


@dataclass(frozen=True)
class GptqSettings:
    """Bits and groups of a checkpoint.

    `dynamic` maps regular expressions to overrides, first match wins: "-:re" leaves a module unquantised, "+:re" or a
    bare "re" overrides bits and group_size (source: GPTQModel's documentation of `dynamic`).
    """

    bits: int
    group_size: int
    checkpoint_format: str
    dynamic: dict[str, dict[str, Any]] = field(default_factory=dict)
    file: Path = Path("config.json")
    original: dict[str, Any] = field(default_factory=dict)  # as found, to be written back

    def for_module(self, name: str) -> ModuleSettings:
        """Bits and group size of the module `name`, overrides applied."""
        overrides: dict[str, Any] = {}
        for pattern, values in self.dynamic.items():
            sign, expression = (pattern[:2], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+:", pattern)
            if re.match(expression, name):
                overrides = values or {} if sign == "+:" else {}
                break
        bits, group_size = overrides.get("bits", self.bits), overrides.get("group_size", self.group_size)
        _check_numbers(self.file, name, bits, group_size)
        return ModuleSettings(bits, group_size, self.checkpoint_format)

    @classmethod
    def find(cls, directory: Path, config: Any) -> GptqSettings | None:
        """From `config.quantization_config`, else from quantize_config.json; None for an unquantised checkpoint.

        Raises CheckpointError for a method, format, bits or group size that is not supported.
        """
        found = getattr(config, "quantization_config", None)
        file = directory / "config.json"
        if found is None:
            file = directory / "quantize_config.json"
            if not file.exists():
                return None
            try:
                found = json.loads(file.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise CheckpointError(file, None, "JSON", repr(error)) from error
        if not isinstance(found, dict):
            found = found.to_dict()
        return cls.from_dict(found, file)

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path) -> GptqSettings:
        method = values.get("quant_method", values.get("method", "gptq"))
        method = getattr(method, "value", method)
        if method != "gptq":
            raise CheckpointError(file, None, "quant_method 'gptq'", repr(method))
        checkpoint_format = values.get("checkpoint_format", values.get("format", "gptq")) or "gptq"
        checkpoint_format = getattr(checkpoint_format, "value", checkpoint_format)
        if checkpoint_format not in ZERO_OFFSETS:
            raise CheckpointError(
                file, None, f"checkpoint_format among {', '.join(ZERO_OFFSETS)}", repr(checkpoint_format)
            )
        bits: Any = values.get("bits")
        group_size: Any = values.get("group_size", 128)
        _check_numbers(file, None, bits, group_size)
        return cls(bits, group_size, checkpoint_format, dict(values.get("dynamic") or {}), file, dict(values))


def _check_numbers(file: Path, name: str | None, bits: Any, group_size: Any) -> None:
    if bits not in SUPPORTED_BITS or isinstance(bits, bool):
        raise CheckpointError(file, name, f"bits among {', '.join(map(str, SUPPORTED_BITS))}", repr(bits))
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1):
        raise CheckpointError(file, name, "group_size of -1 or at least 1", repr(group_size))
