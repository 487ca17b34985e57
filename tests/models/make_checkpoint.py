"""Writes tiny random Qwen3-MoE checkpoints in every form the loader must read, with transformers' model as the oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as HfQwen3MoeForCausalLM

from ferrum_ops.formats import gptq


@dataclass
class Recipe:
    """What to write. The defaults are a plain 4-bit, symmetric GPTQ checkpoint in one file."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    act_order: str = (
        "none"  # "none", "attention" or "all": each projection its own order; "shared": gate and up share one
    )
    checkpoint_format: str = "gptq"
    write_g_idx: bool = True
    quantized: bool = True
    lm_head: bool = False
    shards: int = 1
    settings_file: str = "config.json"  # or "quantize_config.json"
    dynamic: dict[str, dict[str, Any]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()  # substrings of module names that stay dense
    overrides: dict[str, tuple[int, int]] = field(default_factory=dict)  # substring -> (bits, group_size)
    zero_bias: bool = False
    dtype: torch.dtype = torch.float32  # of dense tensors
    config: dict[str, Any] = field(default_factory=dict)


def tiny_config(**changes: Any) -> Qwen3MoeConfig:
    values: dict[str, Any] = dict(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=40,  # neither a multiple of the group nor of the kernel's 16 columns
        intermediate_size=96,
        max_position_embeddings=128,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen3MoeConfig(**(values | changes))


def random_linear(generator: torch.Generator, name: str, in_features: int, out_features: int, recipe: Recipe):
    """On-disk tensors of one quantised linear, and its dense weight `[N, K]` in float32."""
    bits, group_size = next(
        (value for key, value in recipe.overrides.items() if key in name), (recipe.bits, recipe.group_size)
    )
    group_size = in_features if group_size == -1 else group_size
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=generator).to(torch.uint8)
    if recipe.sym:
        zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.uint8)
    else:
        zeros = torch.randint(0, 2**bits, (groups, out_features), generator=generator).to(torch.uint8)
    spread = (2**bits) ** -1 * in_features**-0.5 * 4
    scales = (torch.rand(groups, out_features, generator=generator) * 0.5 + 0.75).mul(spread).half()
    g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
    expert = ".experts." in name
    if recipe.act_order in ("all", "shared") or (recipe.act_order == "attention" and not expert):
        order = generator
        if recipe.act_order == "shared" or not expert:  # one order for the projections of one input
            site = name.rpartition(".")[0] if "down_proj" not in name and "o_proj" not in name else name
            order = torch.Generator().manual_seed(sum(map(ord, site)))
        g_idx = g_idx[torch.randperm(in_features, generator=order)]
    tensors = {
        f"{name}.qweight": gptq.pack_rows(codes, bits),
        f"{name}.qzeros": gptq.encode_zeros(zeros, bits, recipe.checkpoint_format),
        f"{name}.scales": scales,
    }
    if recipe.write_g_idx:
        tensors[f"{name}.g_idx"] = g_idx
    if recipe.zero_bias:
        tensors[f"{name}.bias"] = torch.zeros(out_features, dtype=torch.float16)
    rows = g_idx.long()
    return tensors, ((codes.float() - zeros.float()[rows]) * scales.float()[rows]).T.contiguous()


def make_checkpoint(directory: Path, recipe: Recipe, seed: int = 0) -> HfQwen3MoeForCausalLM:
    """Write the checkpoint into `directory`; returns transformers' model in float32 with the same weights."""
    config = tiny_config(**recipe.config)
    torch.manual_seed(seed)
    oracle = HfQwen3MoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    disk: dict[str, torch.Tensor] = {}

    def write(name: str, weight: torch.Tensor) -> torch.Tensor:
        """Store the linear `name`, quantised or dense, and return the weight the oracle must hold."""
        if recipe.quantized and not any(part in name for part in recipe.skip):
            tensors, dense = random_linear(generator, name, weight.shape[1], weight.shape[0], recipe)
            disk.update(tensors)
            return dense
        disk[f"{name}.weight"] = weight.detach().to(recipe.dtype)
        return disk[f"{name}.weight"].float()

    with torch.no_grad():
        for name, module in oracle.named_modules():
            if name.endswith(".experts"):
                width = module.down_proj.shape[2]
                for e in range(module.gate_up_proj.shape[0]):
                    module.gate_up_proj[e, :width] = write(f"{name}.{e}.gate_proj", module.gate_up_proj[e, :width])
                    module.gate_up_proj[e, width:] = write(f"{name}.{e}.up_proj", module.gate_up_proj[e, width:])
                    module.down_proj[e] = write(f"{name}.{e}.down_proj", module.down_proj[e])
            elif isinstance(module, torch.nn.Linear) and (name != "lm_head" or recipe.lm_head):
                module.weight.copy_(write(name, module.weight))
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                    disk[f"{name}.bias"] = module.bias.to(recipe.dtype)
            else:
                for key, value in module.named_parameters(recurse=False):
                    if name == "lm_head" and config.tie_word_embeddings:
                        continue
                    if key == "weight" and "norm" in name:
                        value.copy_(1 + 0.1 * torch.randn(value.shape, generator=generator))
                    disk[f"{name}.{key}"] = value.detach().to(recipe.dtype)
                    value.copy_(disk[f"{name}.{key}"].float())
    _write_files(directory, recipe, config, disk)
    return oracle


def _write_files(directory: Path, recipe: Recipe, config: Qwen3MoeConfig, disk: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    disk = {name: tensor.contiguous() for name, tensor in disk.items()}
    names = sorted(disk)
    if recipe.shards == 1:
        save_file(disk, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for shard in range(recipe.shards):
            file = f"model-{shard + 1:05d}-of-{recipe.shards:05d}.safetensors"
            mine = names[shard :: recipe.shards]
            save_file({name: disk[name] for name in mine}, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    values = config.to_dict()
    values["architectures"] = ["Qwen3MoeForCausalLM"]
    if recipe.quantized:
        settings = {
            "quant_method": "gptq",
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "desc_act": recipe.act_order != "none",
            "sym": recipe.sym,
            "lm_head": recipe.lm_head,
            "checkpoint_format": recipe.checkpoint_format,
            "dynamic": recipe.dynamic,
        }
        if recipe.settings_file == "config.json":
            values["quantization_config"] = settings
        else:
            (directory / recipe.settings_file).write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(values, default=str))


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in `directory`."""
    from safetensors.torch import load_file

    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
