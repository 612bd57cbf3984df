"""How the driver gives the policy's weights to the rollout engines: through the object store, or from GPU to GPU.

Invariants: the way follows from where policy and engines were placed, once, and is logged. From GPU to GPU the connection is
made anew whenever the processes that are alive have changed: another engine, or the same one restarted. An update that fails
there fails as a whole, because all engines take part in the same broadcast; then none counts as updated, and the policy
counts as failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ranks import Ranks
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.rollout.transport import choose_transport
from rlhf_ray.rollout.weights.deadline import Taken, UpdateDeadline
from rlhf_ray.rollout.wire import Content

WAYS = {
    "object_store": "through the object store",
    "nccl": "from GPU to GPU by NCCL",
    "ipc": "through the memory of the GPUs that policy and engines share",
}


class Publisher:
    """The way from one policy group to the engines of a fleet."""

    def __init__(self, policy: PolicyGroup, fleet: Fleet, engines: Sequence[Ranks], config: RolloutConfig) -> None:
        self._policy, self._fleet, self._engines = policy, fleet, engines
        self._workers = config.tensor_parallel
        self._content: Content = (
            "adapter" if config.lora == "adapter" else "changes" if config.weight_delta else "weights"
        )
        self._connected: list[tuple[int, int]] = []
        """The engines that weights go to from GPU to GPU, and their incarnations."""
        self._floor_s = config.update_timeout_s
        self._updates = UpdateDeadline(self._floor_s)
        self._sent: Taken | None = None
        """The last update over the present connection from GPU to GPU; those have deadlines of their own."""
        self.figures: dict[str, float] = {}
        """Metrics of the last publication."""
        whole = self._content == "weights"
        on_gpus = config.weight_transport == "auto" and whole and config.resources.device == "cuda"
        gpus = [engine.call("gpus", [()]) for engine in engines] if on_gpus else []
        self.transport = choose_transport(policy.gpus() if gpus else [], [pending.result()[0] for pending in gpus])
        get_logger().info("weights go to the rollout engines %s", WAYS[self.transport])

    def forget(self) -> None:
        """The processes of the policy are others: connect them anew, where weights go from GPU to GPU."""
        self._connected = []

    def publish(self, version: int) -> None:
        """Give every live engine the policy's weights as ``version``."""
        if self.transport == "object_store":
            self._fleet.forget_weights()
            published = self._policy.publish_weights(version, self._content).result()
            self._fleet.update_weights(version, published)
            if self._content != "weights":
                self.figures = {"weights/sent_share": published.share_to_send}
        else:
            self._fleet.update_by(version, lambda engines: self._send(version, engines))

    def _send(self, version: int, engines: tuple[int, ...]) -> Execution:
        try:
            processes = [(one, self._fleet.health[one].incarnation) for one in engines]
            if processes != self._connected:
                self._policy.connect_engines(self.transport, [self._engines[one] for one in engines], self._workers)
                self._connected, self._sent, self._updates = processes, None, UpdateDeadline(self._floor_s)
            limit = None if self._sent is None else self._updates.limit({True: self._sent.nbytes})
            record, self._sent = self._policy.send_weights(version, limit).result()
            self._updates.took(self._sent)
            return record
        except GroupError as error:
            # Ranks of the policy may still wait for one another, so it is the policy that failed: it saves nothing any more.
            ours = error.role == self._policy.role
            if not ours and error.role != ROLE:
                raise  # a role that shares the GPUs has not made room: nothing was sent yet
            cause = error.cause if ours else str(error)
            hint = f"{cause}\nWeights went {WAYS[self.transport]}; rollout.weight_transport=object_store avoids that"
            raise type(error)(self._policy.role, error.rank if ours else None, error.phase, hint) from error
