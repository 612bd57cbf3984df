"""Find the experts in a mixture-of-experts model.

Invariant: experts are recognised by their form (3-D parameters; a module called ``experts``), not by a list of
architectures.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def text_part(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text: its decoder, beside which there may be a vision tower."""
    return cast(nn.Module, model.get_decoder()) if isinstance(model, PreTrainedModel) else model


def expert_parameters(model: nn.Module) -> list[str]:
    """Return the names, within the text part, of parameters that hold all experts of a layer in one 3-D tensor."""
    return [name for name, parameter in text_part(model).named_parameters() if _dimensions(parameter) == 3]


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold a router and its experts.

    Which experts a rank calls depends on its tokens. So under ZeRO-3 the parameters of a block are gathered as one (a leaf
    module of DeepSpeed): otherwise ranks would gather experts in different orders and wait for each other forever.
    """
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def _dimensions(parameter: nn.Parameter) -> int:
    shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return len(shape)
