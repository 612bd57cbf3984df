"""Mixtures of experts: where they are in a model.

Always true: experts are found by what they are (3-D parameters; a module called ``experts``), not by a list of
architectures.
"""

from __future__ import annotations

from torch import nn


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold all experts of a layer in one 3-D tensor."""
    return [name for name, parameter in model.named_parameters() if _dimensions(parameter) == 3]


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that route tokens to experts: router and experts together.

    Which experts a rank calls depends on its tokens, so under ZeRO-3 the parameters of a block are gathered as one (a
    leaf module): otherwise ranks would wait for each other in other orders.
    """
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def _dimensions(parameter: nn.Parameter) -> int:
    shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return len(shape)
