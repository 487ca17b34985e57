"""Hugging Face's quantizer interface: swaps modules on the meta device and writes the original format back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class ModulePlans(dict[str, Any]):
    """Module path -> a function that builds the module on the meta device.

    Travels inside a configuration that transformers copies; a copy is the same object.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ModulePlans:
        return self


@register_quantization_config("ferrum")
class FerrumConfig(QuantizationConfigMixin):
    """Holds the plan while loading; written to config.json as the checkpoint's own quantization_config (`original`)."""

    def __init__(self, plans: ModulePlans | None = None, original: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method = "ferrum"
        self.plans = ModulePlans() if plans is None else plans
        self.original = original or {}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.original)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer("ferrum")
class FerrumQuantizer(HfQuantizer):
    """Replaces modules by their packed forms before the weights arrive; the weights arrive packed (LazyTensor)."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for path, build in self.quantization_config.plans.items():
            model.set_submodule(path, build())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.quantization_config.plans.clear()  # it holds the checkpoint's files open, and copies share it
        for module in model.modules():
            if hasattr(module, "prepare"):
                module.prepare()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return model.state_dict_to_save(), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
