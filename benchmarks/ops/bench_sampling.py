"""Greedy choice and repetition penalty at Qwen3's vocabulary.

`python benchmarks/ops/bench_sampling.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch

from ferrum_ops.testing.timing import Case, bytes_of, main

VOCABULARY = 151936
TOKENS = (1, 8, 64)
HISTORY = 1000


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        logits = torch.randn(tokens, VOCABULARY).to(dtype)
        mask = torch.rand(VOCABULARY) < 0.5
        label = f"T={tokens} n={VOCABULARY}"
        yield Case("argmax_rows", label, (logits,), bytes_of(logits), lambda logits=logits: logits.argmax(-1))

        def masked(logits=logits, mask=mask):
            return torch.where(mask, logits, -torch.inf).argmax(-1)

        yield Case("argmax_rows", f"{label} mask", (logits, mask), bytes_of(logits, mask), masked)

        # Zeros stay zeros however often they are penalised.
        scores = torch.zeros(tokens, VOCABULARY).to(dtype)
        history = torch.randint(0, VOCABULARY, (tokens, HISTORY))
        offsets = torch.arange(0, tokens * HISTORY + 1, HISTORY)

        def penalise(scores=scores, history=history):
            chosen = scores.gather(1, history)
            scores.scatter_(1, history, torch.where(chosen < 0, chosen * 1.2, chosen / 1.2))

        arguments = (scores, history.flatten(), offsets, torch.full((tokens,), 1.2))
        moved = bytes_of(history) + 2 * history.numel() * scores.element_size()
        yield Case("repetition_penalty_", f"T={tokens} listed={HISTORY}", arguments, moved, penalise)


if __name__ == "__main__":
    main(cases, __doc__)
