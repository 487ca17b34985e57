"""Row orders of experts that are packed into one stack."""

from __future__ import annotations

from typing import Any

import torch

from ferrum_models.quantization.sources import QuantizedSource


def same_rows(sources: list[Any]) -> bool:
    """Whether all row orders are equally long, counting an order of its own as the rows themselves."""
    lengths = {source.perm.shape[0] for source in sources if source.perm is not None}
    return len(lengths) <= 1 and all(source.in_features <= min(lengths, default=1 << 62) for source in sources)


def stack_perms(projections: list[list[QuantizedSource]]) -> torch.Tensor | None:
    """int32 `[E, P, rows]`, or None when every projection is in its own order. P is 1 if all projections agree."""
    lengths = {s.perm.shape[0] for sources in projections for s in sources if s.perm is not None}
    if not lengths:
        return None
    (rows,) = lengths

    def order(source: QuantizedSource) -> torch.Tensor:
        if source.perm is not None:
            return source.perm
        identity = torch.arange(rows, dtype=torch.int32)
        return identity.masked_fill(identity >= source.in_features, -1)

    perms = torch.stack([torch.stack([order(s) for s in experts]) for experts in zip(*projections)])
    agree = all(torch.equal(perms[:, 0], perms[:, p]) for p in range(1, perms.shape[1]))
    return perms[:, :1].contiguous() if agree else perms
