"""In the tests of models a call into the forward pass with a wrong shape is refused, wherever it comes from."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from rlhf_ray.models.forward import attention
from rlhf_ray.models.forward.attention import segment_attention
from rlhf_ray.models.forward.segments import Segments


def test_a_wrong_shape_is_refused_before_the_function_runs() -> None:
    queries, segments = torch.zeros(3, 2, 4), Segments.of(torch.tensor([0, 3]))
    for function in (segment_attention, attention.segment_attention):
        with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'query'"):
            function(queries[0], queries, queries, segments, scaling=1.0, window=None, softcap=None)
