"""From the names of Mixtral's published weights to ours, and only to test one against the other.

`transformers` has one tensor for all experts of a layer since version 5 (gate and up rows together), and had three
matrices an expert before (w1 = gate, w3 = up, w2 = down). Ours has `gate_up` and `down` for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def from_mixtral(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one `MixtralSparseMoeBlock`, of either version, as the state of `Experts`."""
    if "gate.weight" not in tensors:
        raise ValueError(f"tensors must hold the router, gate.weight, and hold {', '.join(tensors) or 'nothing'}")
    router = tensors["gate.weight"]  # E W
    ours = {"router.weight": router}
    for e in range(len(router)):
        if "experts.gate_up_proj" in tensors:
            gate_up, down = tensors["experts.gate_up_proj"][e], tensors["experts.down_proj"][e]  # 2F W, W F
        else:
            gate, up, down = (tensors[f"experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2"))
            gate_up = torch.cat((gate, up))
        ours[f"experts.{e}.gate_up.weight"], ours[f"experts.{e}.down.weight"] = gate_up, down
    return ours
