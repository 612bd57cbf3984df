"""Under pytest every call in the mathematics checks shapes and types against its annotations; outside, nothing does."""

from __future__ import annotations

import subprocess
import sys

import jaxtyping
import pytest
import torch

from rlhf_ray.algorithms.kl import token_kl
from rlhf_ray.trajectories.packing import Packed

MASK = torch.tensor([False, True, True])


def test_a_wrong_shape_is_refused_before_the_function_runs() -> None:
    with pytest.raises(
        jaxtyping.TypeCheckError, match=r"token_kl(.|\n)*parameter 'reference'(.|\n)*Float\[Tensor, 'N'\]"
    ):
        token_kl(torch.zeros(3), torch.zeros(2), MASK)


def test_a_wrong_dtype_and_a_wrong_word_are_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'action_mask'"):
        token_kl(torch.zeros(3), torch.zeros(3), MASK.long())
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'estimator'"):
        token_kl(torch.zeros(3), torch.zeros(3), MASK, "k4")  # type: ignore[arg-type]


def test_the_fields_of_a_dataclass_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'position_ids'"):
        Packed(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), torch.arange(2))


@pytest.mark.usefixtures("outside_pytest")
def test_outside_pytest_the_package_refuses_a_wrong_shape_itself() -> None:
    with pytest.raises(ValueError, match=r"reference log_probs has shape \(2,\), but \(3,\) is needed"):
        token_kl(torch.zeros(3), torch.zeros(2), MASK)


def test_a_program_that_imports_the_package_does_not_import_beartype() -> None:
    program = (
        "import sys, rlhf_ray.algorithms.preparation, rlhf_ray.algorithms.policy_loss, rlhf_ray.evaluation.baseline, "
        "rlhf_ray.trajectories.packing; print('beartype' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
