"""Loading holds the packed model and one layer of work, not a second copy."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ferrum_models import report
from tests.models.make_checkpoint import tiny_config

STATUS = Path("/proc/self/status")
needs_status = pytest.mark.skipif(
    not STATUS.exists() or not {"VmHWM:", "RssAnon:"} <= set(STATUS.read_text().split()),
    reason="needs the memory figures of /proc/self/status",
)

LAYERS, EXPERTS, HIDDEN, WIDTH, GROUP = 12, 16, 512, 512, 128


def write_checkpoint(directory):
    """About 100 MB of packed experts; the values do not matter."""
    config = tiny_config(num_hidden_layers=LAYERS, num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH)
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}
    config.save_pretrained(directory)
    tensors = {"model.embed_tokens.weight": torch.zeros(96, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    tensors["lm_head.weight"] = torch.zeros(96, HIDDEN)

    def linear(name, in_features, out_features):
        groups = in_features // GROUP
        tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31, (in_features // 8, out_features)).to(torch.int32)
        tensors[f"{name}.qzeros"] = torch.full((groups, out_features // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(groups, out_features, dtype=torch.float16)
        tensors[f"{name}.g_idx"] = (torch.arange(in_features) // GROUP).to(torch.int32)

    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, width in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            linear(f"{layer}.self_attn.{name}", HIDDEN, width)
        linear(f"{layer}.self_attn.o_proj", 128, HIDDEN)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = torch.ones(32)
        tensors[f"{layer}.mlp.gate.weight"] = torch.zeros(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            linear(f"{layer}.mlp.experts.{e}.gate_proj", HIDDEN, WIDTH)
            linear(f"{layer}.mlp.experts.{e}.up_proj", HIDDEN, WIDTH)
            linear(f"{layer}.mlp.experts.{e}.down_proj", WIDTH, HIDDEN)
    save_file(tensors, directory / "model.safetensors")


#: Looks at the process's memory without a file behind it, in memory or swapped out. (Pages of files, the libraries' own
#: among them, come and go as the machine needs memory, and are part of VmRSS and VmHWM.)
MEASURE = """
import gc, sys, threading
from ferrum_models import Qwen3MoeForCausalLM

def anonymous_bytes():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":") for line in status)
    return sum(1024 * int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "VmSwap"))

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

# What the libraries themselves need on first use is not the checkpoint's: touch it before measuring.
Qwen3MoeForCausalLM.from_pretrained(sys.argv[1])
gc.collect()
baseline = peak = anonymous_bytes()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = Qwen3MoeForCausalLM.from_pretrained(sys.argv[2])
done.set()
watcher.join()
print(max(peak, anonymous_bytes()) - baseline, model.load_report.model_nbytes)
"""


@needs_status
@pytest.mark.slow
def test_peak_memory_while_loading(tmp_path):
    from tests.models.make_checkpoint import Recipe, make_checkpoint

    make_checkpoint(tmp_path / "tiny", Recipe())
    (tmp_path / "big").mkdir()
    write_checkpoint(tmp_path / "big")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "big")]
    peak, packed = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:])
    one_layer = packed / LAYERS
    assert packed > 60e6
    assert packed < 1.15 * peak  # it was looked at
    assert peak <= 1.15 * packed + one_layer, f"peak {peak / 1e6:.0f} MB for {packed / 1e6:.0f} MB packed"


@needs_status
def test_peak_memory_of_a_block():
    with report.PeakMemory() as memory:
        torch.ones(32 << 20)  # 128 MiB, freed at once
    # Far less than that: the machine may take back pages of files meanwhile.
    assert memory.peak - memory.baseline > 32 << 20


@needs_status
def test_peak_memory_is_at_least_the_baseline(monkeypatch):
    resident = {"VmRSS": 4096, "VmHWM": 4000}  # something was freed before the block began
    monkeypatch.setattr(report, "_status_bytes", resident.__getitem__)
    with report.PeakMemory() as memory:
        pass
    assert memory.peak == memory.baseline == 4096
