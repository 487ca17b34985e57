import torch

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe import profile

model = Qwen3MoeForCausalLM.from_pretrained("examples/tiny-qwen3-moe", dtype=torch.float32)
report = model.load_report
print(report.model_nbytes < report.dense_nbytes, report.warnings)  # True []
print(sorted({module.layout for module in report.modules}))  # ['int4_cpu']

prompt = torch.tensor([[1, 2, 3]])
logits = {}
for name in ("fused", "bucketed", "per_pair"):
    model.set_moe_implementation(name)
    logits[name] = model(prompt).logits
print(torch.allclose(logits["fused"], logits["per_pair"], atol=1e-2))  # True

# Where the time of the expert blocks goes.
model.set_moe_implementation("bucketed")
with profile() as times:
    model(prompt)
print([phase for phase, calls in times.calls.items() if calls][:2])  # ['route', 'plan']
