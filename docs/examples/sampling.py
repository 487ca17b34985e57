"""The greedy choice after a repetition penalty, on two rows of logits."""

import torch

import ferrum_ops

logits = torch.tensor([[2.0, 5.0, 4.0, -1.0], [torch.nan, 1.0, 1.0, -torch.inf]])
print(ferrum_ops.argmax_rows(logits).tolist())  # [1, 1]

# The tokens so far, row after row: 1 and 3 in the first, none in the second. They may repeat.
ids, offsets = torch.tensor([1, 3, 1]), torch.tensor([0, 3, 3])
ferrum_ops.repetition_penalty_(logits, ids, offsets, torch.tensor([2.0, 2.0]))
print(logits[0].tolist())  # [2.0, 2.5, 4.0, -2.0]
print(ferrum_ops.argmax_rows(logits).tolist())  # [2, 1]

# Only what a grammar allows, say.
mask = torch.tensor([True, False, False, True])
print(ferrum_ops.argmax_rows(logits, mask).tolist())  # [0, 0]
print(ferrum_ops.argmax_rows(logits, torch.zeros(4, dtype=torch.bool)).tolist())  # [-1, -1]
