"""What of a model belongs on disk: its parameters and its persistent buffers.

Invariant: each comes exactly once (a tied one under its first name), in the order of the modules, whether or not its module
has parameters of its own.
"""

from __future__ import annotations

from torch import Tensor, nn


def held_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and persistent buffers of ``module`` with their names in memory."""
    persistent, seen = module.state_dict().keys(), set[int]()
    named: list[tuple[str, Tensor]] = []
    for path, owner in module.named_modules():
        start = f"{path}." if path else ""
        buffers = [(name, buffer) for name, buffer in owner.named_buffers(recurse=False) if start + name in persistent]
        for name, tensor in (*owner.named_parameters(recurse=False), *buffers):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named.append((start + name, tensor))
    return named
