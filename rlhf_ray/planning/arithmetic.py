"""The batch arithmetic of a job as a table: steps, updates, sequences per rank, micro-batches; and the weight of checkpoints.

Invariant: the table holds what the job states about itself, line by line.
"""

from __future__ import annotations

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.console import table
from rlhf_ray.planning.checkpoints import checkpoint_sizes


def batch_table(config: Job, rows: int | None = None) -> str:
    """The batch arithmetic of a job as text; ``rows`` is the number of training rows where it is known."""
    lines = [(size.what, size.value, size.follows) for size in (*config.sizes(rows), *checkpoint_sizes(config))]
    return table("sizes", ("what", "size", "from"), lines)
