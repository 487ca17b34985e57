"""`from_pretrained`: find the files, plan, hand transformers a state dict that is read and packed as it loads."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, Qwen3MoeConfig
from transformers.utils import cached_file

import ferrum_ops
from ferrum_models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError
from ferrum_models.quantization.layout import LAYOUTS
from ferrum_models.quantization.settings import GptqSettings
from ferrum_models.qwen3_moe.gguf import find_gguf_file
from ferrum_models.qwen3_moe.gguf_config import generation_config, qwen3_moe_config
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint
from ferrum_models.qwen3_moe.gguf_planner import GgufPlanner
from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM
from ferrum_models.qwen3_moe.planner import Plan, Planner
from ferrum_models.report import PeakMemory
from ferrum_ops.config import RuntimeConfig

#: Arguments that find files on a hub; transformers' names.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
QUANTIZE = (None, "int4")
LM_HEAD = (None, "int8", "int4")


def load_pretrained(
    build: Callable[..., Any],
    name_or_path: str | Path,
    *model_args: Any,
    moe_implementation: str,
    activation: str,
    quantize: str | None,
    lm_head: str | None,
    layout: str | None,
    gguf_repack: bool | None,
    runtime_config: RuntimeConfig,
    **kwargs: Any,
) -> Qwen3MoeForCausalLM:
    """`Qwen3MoeForCausalLM.from_pretrained`; its docstring has the arguments.

    `build` is transformers' `from_pretrained` of the same class.
    """
    if quantize not in QUANTIZE:
        raise ValueError(f"[quantize] expected one of {QUANTIZE}, got {quantize!r}")
    if lm_head not in LM_HEAD:
        raise ValueError(f"[lm_head] expected one of {LM_HEAD}, got {lm_head!r}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"[layout] expected None or one of {LAYOUTS}, got {layout!r}")
    start = time.perf_counter()
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    # The dtype is settled first: a configuration would take it for its own attribute.
    torch_dtype, dtype_argument = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    config = copy.deepcopy(kwargs.pop("config", None))
    device = target_device(kwargs.get("device_map"))
    runtime_config.warn_without_effect(device)
    gguf_file = find_gguf_file(name_or_path, kwargs.pop("gguf_file", None), hub)
    with PeakMemory() as memory:
        settings: dict[str, Any] = {"device": device, "activation": activation, "quantize": quantize}
        dtypes = (torch_dtype, dtype_argument)
        if gguf_file is not None:
            for name, value in (("lm_head", lm_head), ("layout", layout)):
                if value is not None:
                    raise ValueError(f"[{name}] expected None for a GGUF file, got {value!r}")
            planned = plan_gguf(gguf_file, config, kwargs, dtypes, repack=gguf_repack, **settings)
        else:
            if gguf_repack is not None:
                raise ValueError(f"[gguf_repack] expected None for a checkpoint that is not GGUF, got {gguf_repack!r}")
            directory = find_directory(name_or_path, hub)
            settings |= {"lm_head": lm_head, "layout": layout, "runtime": runtime_config}
            planned = plan_safetensors(directory, config, kwargs, dtypes, **settings)
        for message in planned.plan.report.warnings:
            warnings.warn(message, stacklevel=4)
        planned.config.quantization_config = {
            "quant_method": "ferrum",
            "plans": planned.plan.modules,
            "original": planned.original,
        }
        output_loading_info = planned.arguments.pop("output_loading_info", False)
        model, info = build(
            None,
            *model_args,
            config=planned.config,
            state_dict=planned.plan.tensors,
            dtype=planned.dtype,
            output_loading_info=True,
            moe_implementation=moe_implementation,
            runtime_config=runtime_config,
            **planned.arguments,
        )
    problems = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if problems:
        raise RuntimeError(f"[load] the plan and the model disagree: {problems}")
    model.requires_grad_(False)  # an inference model: calling it needs no torch.no_grad()
    if planned.original is None:
        model.hf_quantizer.remove_quantization_config(model)
    model.name_or_path = model.config.name_or_path = str(name_or_path)
    if "generation_config" not in planned.arguments and planned.generation_config is not None:
        model.generation_config = planned.generation_config
    report = planned.plan.report
    report.seconds = time.perf_counter() - start
    report.model_nbytes = model.memory_footprint()
    report.peak_nbytes, report.baseline_nbytes = memory.peak, memory.baseline
    model.load_report = report
    return (model, info) if output_loading_info else model  # type: ignore[return-value]


@dataclass(frozen=True)
class Planned:
    """A checkpoint of either format, ready to be handed to transformers."""

    config: Qwen3MoeConfig
    plan: Plan
    dtype: torch.dtype
    arguments: dict[str, Any]  # of from_pretrained, without those that changed the configuration
    original: dict[str, Any] | None  # config.json's quantization_config when saved; None: saved dense
    generation_config: GenerationConfig | None


def plan_safetensors(
    directory: Path,
    config: Any,
    arguments: dict[str, Any],
    dtypes: tuple[Any, Any],
    *,
    device: torch.device,
    activation: str,
    quantize: str | None,
    lm_head: str | None,
    layout: str | None,
    runtime: RuntimeConfig,
) -> Planned:
    if config is None:  # as in transformers, names of its attributes among the arguments change it
        config, arguments = AutoConfig.from_pretrained(directory, return_unused_kwargs=True, **arguments)
    if not isinstance(config, Qwen3MoeConfig):
        raise CheckpointError(directory / "config.json", None, "model_type 'qwen3_moe'", repr(config.model_type))
    dtype = resolve_dtype(*dtypes, config)
    settings = GptqSettings.find(directory, config)
    if settings is not None:
        refuse_quantize(quantize)
    plan = Planner(
        config,
        Checkpoint(directory),
        settings,
        dtype=dtype,
        device=device,
        activation=activation,
        quantize=quantize,
        lm_head=lm_head,
        layout=layout,
        runtime=runtime,
    ).plan()
    generation = None
    if (directory / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(directory)
    original = saved_quantization_config(settings, plan) if plan.packed else None
    return Planned(config, plan, dtype, arguments, original, generation)


def plan_gguf(
    file: Path,
    config: Any,
    arguments: dict[str, Any],
    dtypes: tuple[Any, Any],
    *,
    device: torch.device,
    activation: str,
    quantize: str | None,
    repack: bool | None,
) -> Planned:
    refuse_quantize(quantize)
    checkpoint = GgufCheckpoint(file)
    if config is None:
        config = qwen3_moe_config(checkpoint)
        changed = {name: arguments[name] for name in arguments if hasattr(config, name)}
        arguments = {name: value for name, value in arguments.items() if name not in changed}
        for name, value in changed.items():
            setattr(config, name, value)
    dtype = resolve_dtype(*dtypes, config)
    if repack is None:
        repack = device.type == "cpu" and ferrum_ops.cpu_isa() == "avx512"
    plan = GgufPlanner(config, checkpoint, dtype=dtype, device=device, activation=activation, repack=repack).plan()
    return Planned(config, plan, dtype, arguments, None, generation_config(checkpoint))


def refuse_quantize(quantize: str | None) -> None:
    if quantize is not None:
        raise ValueError(f"[quantize] expected None for a checkpoint that is quantised already, got {quantize!r}")


def find_directory(name_or_path: str | Path, hub: dict[str, Any]) -> Path:
    """The local directory of a safetensors checkpoint; a model id is looked up and downloaded as transformers does.

    Raises CheckpointError for a directory without a config.json.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / hub.get("subfolder", "")
        if not (path / "config.json").exists():
            raise CheckpointError(path, None, "a config.json", "none")
        return path
    if path.exists() or path.is_absolute():
        raise CheckpointError(path, None, "a directory", "a file" if path.exists() else "nothing")
    config_file = cached_file(str(name_or_path), "config.json", **hub)
    single = cached_file(str(name_or_path), SINGLE_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if single is None:
        from transformers.utils.hub import get_checkpoint_shard_files

        index = cached_file(str(name_or_path), INDEX_FILE, **hub)
        get_checkpoint_shard_files(str(name_or_path), index, **hub)
    for name in ("quantize_config.json", "generation_config.json"):
        cached_file(str(name_or_path), name, _raise_exceptions_for_missing_entries=False, **hub)
    return Path(config_file).parent


def resolve_dtype(torch_dtype: Any, dtype: Any, config: Qwen3MoeConfig) -> torch.dtype:
    """The activation dtype: the argument, else the configuration's, else float32."""
    chosen = torch_dtype if dtype is None else dtype
    if chosen is None or chosen == "auto":
        chosen = config.dtype or torch.float32
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"[dtype] expected float32, float16 or bfloat16, got {dtype or torch_dtype}")
    return chosen


def target_device(device_map: Any) -> torch.device:
    """The kind of device the packed weights must suit: the CPU only if nothing goes elsewhere."""
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, dict):
        devices = {torch.device(d) if d not in ("cpu", "disk") else torch.device("cpu") for d in device_map.values()}
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    return torch.device(device_map)


def saved_quantization_config(settings: GptqSettings | None, plan: Plan) -> dict[str, Any]:
    """What config.json says of the quantisation when the model is saved again.

    Modules that were dequantised are saved dense and named as skipped.
    """
    if settings is None:
        # Rounded while loading: saved as GPTQ that any reader understands.
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    original = dict(settings.original)
    original.setdefault("quant_method", "gptq")
    if plan.dequantized:
        skipped: dict[str, Any] = {f"-:^{re.escape(source.name)}$": {} for source in plan.dequantized}
        original["dynamic"] = skipped | settings.dynamic
    return original
