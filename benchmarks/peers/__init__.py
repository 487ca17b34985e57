"""Ferrum and other engines behind one interface (`interface.py`). Each is optional; `select` says why one is left out.

`pip install -r benchmarks/peers/requirements.txt` installs those for a CPU; on a GPU `humming-kernels`, `gemlite` and
`vllm` are found where they are installed.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers import (
    ferrum,
    ferrum_marlin,
    gemlite,
    humming,
    llama_cpp,
    onnx_runtime,
    torch_grouped,
    torch_int4,
    torch_int4_cuda,
    transformers_dense,
    vllm_marlin,
)
from benchmarks.peers.interface import Peer

PEERS: tuple[Peer, ...] = (
    *ferrum.PEERS,
    *onnx_runtime.PEERS,
    *llama_cpp.PEERS,
    *torch_int4.PEERS,
    *transformers_dense.PEERS,
)

#: Those that compute on a GPU.
GPU_PEERS: tuple[Peer, ...] = (
    *ferrum_marlin.PEERS,
    *humming.PEERS,
    *vllm_marlin.PEERS,
    *gemlite.PEERS,
    *torch_int4_cuda.PEERS,
    *torch_grouped.PEERS,
)


def select(names: Sequence[str] | None = None, peers: tuple[Peer, ...] = PEERS) -> tuple[list[Peer], dict[str, str]]:
    """The peers that run here, and why each of the others does not. `names` are beginnings of names; None takes all.

    Raises ValueError for a name that no peer begins with.
    """
    for name in names or ():
        if not any(peer.name.startswith(name) for peer in peers):
            raise ValueError(f"no peer begins with {name!r}: there are {', '.join(peer.name for peer in peers)}")
    wanted = [p for p in peers if names is None or any(p.name.startswith(name) for name in names)]
    reasons = {peer.name: peer.available() for peer in wanted}
    return [p for p in wanted if reasons[p.name] is None], {n: r for n, r in reasons.items() if r is not None}
