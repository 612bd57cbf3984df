"""DeepSpeed reads its own files without running what may be written in them.

Invariant: a file that would import anything but the classes of :data:`PLAIN` is refused before anything in it is made.

DeepSpeed 0.19 reads with ``torch.load(weights_only=False)``, which runs whatever a pickle says, and has no switch for it. Its
files need no more than tensors, plain values and the classes below, so for the time of a load the engine's
``checkpoint_engine``, which is an interface of DeepSpeed's, is one that reads with ``weights_only=True``.
"""

from __future__ import annotations

import copyreg
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf_ray.errors import IntegrityError

PLAIN = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed writes beside tensors and plain values: classes that hold numbers and do nothing when they are made."""
torch.serialization.add_safe_globals(PLAIN)


def _by_value(stage: ZeroStageEnum) -> tuple[type[ZeroStageEnum], tuple[int]]:
    return ZeroStageEnum, (stage.value,)


# Python 3.11 before 3.11.4 writes a member of an enumeration as a call of getattr, which no reader here may make.
copyreg.pickle(ZeroStageEnum, _by_value)


class WeightsOnlyReader(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Reads tensors, plain values and the classes of :data:`PLAIN`."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file; raises :class:`IntegrityError` for one that holds anything else."""
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except UnpicklingError as error:
            raise refusal(error, path) from error


def refusal(error: UnpicklingError, path: str) -> IntegrityError:
    """What torch refused to read from ``path``, in a sentence with the way out."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return IntegrityError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}")
    return IntegrityError(
        f"{path} would run code when it is read ({named[1]}), which no checkpoint written here does: somebody has "
        "changed it. Remove this checkpoint, and go on from the one before it"
    )


@contextmanager
def weights_only(engine: Any) -> Iterator[None]:
    """Let a DeepSpeed engine read with ``weights_only=True`` in the ``with`` block."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = WeightsOnlyReader()
    try:
        yield
    finally:
        engine.checkpoint_engine = own
