"""The one list of all metrics: the name, unit, kind, group, meaning and alarm of each.

Invariants: a metric that is not listed here cannot be logged. Every exporter, the report and the dashboard take names,
units and titles from here. No two metrics have the same name in Prometheus. Every metric that an alarm asks for is listed too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.monitoring.alarms.alarm import Alarm, in_order
from rlhf_ray.monitoring.alarms.catalogue import ALARMS

Kind = Literal["gauge", "counter"]
RAY_PREFIX = "ray_"

PHASES = ("start", "rollout", "scoring", "log_probs", "update", "weights", "checkpoint", "evaluation")
"""What a run can be doing, the values of the phase gauge. All but ``start`` are timed as ``time/<phase>``."""


_HIGHER = re.compile(
    r"gold/(mean|win_rate)|reward/(mean|learned)|accuracy|explained_variance|(rollout/)?tokens_per_second|matmul/share|useful_time"
    r"|evaluation/(reward|gold|reward_win_rate|gold_win_rate|accuracy|pass_at_\d+)(/\w+)?"
)
_LOWER = re.compile(r"loss/(sft|rm|dpo|kto)|evaluation/(loss|calibration_error)(/\w+)?")
"""Metrics of which every run wants a high value, or a low one."""


class UnknownMetricError(RlhfRayError):
    """A trainer logged a metric that the registry does not hold."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    A name that ends in ``/*`` is a family: it stands for every name with that beginning. The value of a gauge is a state;
    the value of a counter is what was added since the last line.
    """

    name: str
    unit: str
    help: str
    group: str
    kind: Kind = "gauge"
    alarm: Alarm | None = None

    @property
    def better(self) -> Literal["higher", "lower"] | None:
        """Which of two values is the better one; None where that depends on the run."""
        if _HIGHER.fullmatch(self.name):
            return "higher"
        return "lower" if _LOWER.fullmatch(self.name) else None

    @property
    def exported_name(self) -> str:
        """The name in Ray's metrics, which Prometheus sees with Ray's prefix ``ray_``."""
        return f"rlhf_{re.sub('[^a-zA-Z0-9_]', '_', self.name)}"

    @property
    def series(self) -> str:
        """The name of its series in Prometheus; of a family the beginning of their names."""
        return f"{RAY_PREFIX}{self.exported_name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def is_family(self) -> bool:
        """Whether this stands for every name with its beginning."""
        return self.name.endswith("/*")


class Registry:
    """The metrics by name; a name of a family is found too."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics: dict[str, Metric] = {}
        for metric in metrics:
            if metric.exported_name in {other.exported_name for other in self}:
                raise ValueError(f"metric {metric.name} is registered twice, or reads as another one in Prometheus")
            self._metrics[metric.name] = metric

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> Metric:
        metric = self._find(name)
        if metric is None:
            near = difflib.get_close_matches(name, self._metrics, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UnknownMetricError(
                f"metric {name} is not registered{hint}: add it, with its unit, to rlhf_ray/monitoring/registry.py"
            )
        return metric

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms, each after those that explain it."""
        return in_order([metric.alarm for metric in self if metric.alarm is not None])

    def groups(self) -> dict[str, list[Metric]]:
        """Metrics by group, in the order of registration."""
        groups: dict[str, list[Metric]] = {}
        for metric in self:
            groups.setdefault(metric.group, []).append(metric)
        return groups

    def _find(self, name: str) -> Metric | None:
        if name in self._metrics and not name.endswith("/*"):
            return self._metrics[name]
        beginning, _, rest = name.partition("/")
        family = self._metrics.get(f"{beginning}/*")
        if family is not None and re.fullmatch(r"\w+(/\w+)*", rest):
            return replace(family, name=name)
        return None


STATE = "State of the run"
"""The group of metrics that are read every few seconds, and not once a step: they are not in ``metrics.jsonl``."""
RANKS = "Ranks"
"""The group of metrics that each rank sends by itself every few seconds; they are not in ``metrics.jsonl`` either."""
_COUNTERS = {
    "updates/skipped", "updates/stood_out", "prompts/dropped", "rollout/engine_deaths", "groups/lost", "reward/failed_tries",
    "judge/requests", "judge/tokens", "judge/cost", "judge/refusals", "judge/unanswered",
}  # fmt: skip

_METRICS = {
    STATE: [
        (
            "run/started",
            "s",
            "When this attempt began, in seconds since 1970; the negative of it once it ended in order",
        ),
        ("age/step", "s", "Time since the last step ended"),
        (
            "limit/step",
            "s",
            "How long that may be: six times the median of steps, and what an evaluation or commit takes",
        ),
        ("age/phase", "s", "Time for which the run has been doing what it does; of nested things the most overdue"),
        ("limit/phase", "s", "How long that may be: six times its median, and at least half of run.stall_floor_s"),
        ("age/commit", "s", "Time since the last commit, or since the start"),
        (
            "limit/commit",
            "s",
            "How long that may be: two intervals of commits, and longer while an evaluation goes on",
        ),
        (
            "age/reward_call",
            "s",
            "How long the oldest call to a reward source has been under way; 0 while there is none",
        ),
        (
            "limit/reward_call",
            "s",
            "How long that may be: six times its median, and at least half of run.stall_floor_s",
        ),
        ("reward/failed_tries", "tries", "Tries of a reward source that failed and may be made again"),
        ("rollout/engines_down", "engines", "Rollout engines that are dead or being started again"),
        ("rollout/engine_deaths", "engines", "Deaths of rollout engines, also of those that came back at once"),
        ("groups/lost", "groups", "Losses of groups of ranks that were started again"),
        ("disk/free_gb", "GB", "Free space on the disk of the run directory"),
        ("disk/needed_gb", "GB", "What must be free there: twice the last commit, and at least 100 MB"),
        ("memory/used_share", "share", "Memory in use on the driver's machine, or of the limit of its container"),
    ],
    "Progress": [
        ("step", "steps", "Steps done: PPO steps, or optimizer updates in supervised and reward training"),
        ("update", "updates", "Optimizer updates done"),
        ("updates/skipped", "updates", "Updates skipped because a number was not finite or stood out"),
        ("updates/stood_out", "updates", "Those of them that a guard skipped: loss, gradient norm or KL stood out"),
        ("useful_time", "share", "Share of the time of the run so far that became committed steps"),
        ("weights/version", "versions", "Publications of the policy's weights to the rollout engines"),
        (
            "weights/sent_share",
            "share",
            "Bytes that an engine read of the last publication, over those of all weights, if it held the one before",
        ),
    ],
    "Reward": [
        ("reward/mean", "score", "Mean score that the step trained on: shaped, before KL"),
        ("reward/std", "score", "Standard deviation of the scores that the step trained on"),
        ("reward/after_kl", "score", "Mean over sequences of the sum of token rewards: score and KL penalty together"),
        ("reward/learned", "score", "Mean score of the reward model, as it comes from the model"),
        (
            "reward_term/*",
            "score",
            "Mean reward of a term of the mixture, before its weight, or of a model of an ensemble; `spread`: how these differ",
        ),
        (
            "judge/requests",
            "requests",
            "Requests to judges since the step before, evaluations and repeated tries included",
        ),
        (
            "judge/tokens",
            "tokens",
            "Tokens of these, as the endpoint counts them; of a lost request the most it can have had",
        ),
        ("judge/cost", "money", "Their price by `prompt_price` and `reply_price`, in the currency of these"),
        ("judge/refusals", "replies", "Replies of judges that hold no score; their answers have no reward"),
        ("judge/unanswered", "questions", "Questions to judges that have no reply after all tries"),
        (
            "judge/first_better",
            "share",
            "Comparisons that the answer won which was shown first, ties half; far from one half where its place counts",
        ),
        ("gold/mean", "score", "Mean gold score, 0 to 1: what the reward model was made to predict; never trained on"),
        ("gold/win_rate", "share", "Share of prompts whose answer beats the starting policy's by gold; ties half"),
    ],
    "Distance from the reference": [
        ("kl/k1", "nats/sequence", "KL from the reference, summed over a sequence: mean log-ratio (k1)"),
        ("kl/k3", "nats/sequence", "The same by the estimator that is never negative (k3)"),
        (
            "kl/baseline",
            "nats/sequence",
            "Reference point of KTO: mean log-ratio of answers to other prompts, at least 0",
        ),
        ("kl/coefficient", "", "Weight of the KL, in the token rewards or in the loss"),
    ],
    "Losses": [
        ("loss/policy", "", "Policy loss, without KL and entropy"),
        ("loss/kl", "nats/token", "KL term of the policy loss, before its coefficient"),
        ("loss/value", "score²", "Clipped value loss"),
        ("loss/sft", "nats/token", "Negative log-likelihood of the demonstrations"),
        ("loss/distill", "nats/token", "The loss of a distillation: divergence and likelihood in their shares"),
        ("divergence/teacher", "nats/token", "How far the policy's distribution of a token is from the teacher's"),
        ("loss/rm", "nats/pair", "Ranking loss of the preference pairs, label smoothing included"),
        ("loss/dpo", "", "Loss of preference pairs in a policy's own training: DPO, IPO or SimPO"),
        ("loss/kto", "", "Loss of single answers with labels: KTO"),
        ("loss/centering", "score²", "Square of the sum of both scores of a pair; its weight is loss.centering"),
        ("loss/router_balance", "", "How unevenly tokens went to experts; its weight is loss.router_balance"),
    ],
    "Updates": [
        ("entropy", "nats/token", "Entropy of the policy"),
        ("ratio/mean", "", "Mean ratio of new to old token probabilities"),
        ("clip_fraction", "share", "Share of tokens whose ratio the policy loss clips"),
        ("approximate_kl", "nats/token", "KL of the updated policy from the one that sampled (k3)"),
        ("grad_norm", "", "Norm of the gradient before clipping"),
        ("grad_norm/policy", "", "Norm of the policy's gradient before clipping"),
        ("grad_norm/critic", "", "Norm of the critic's gradient before clipping"),
        ("learning_rate", "", "Learning rate of the last update"),
        ("learning_rate/policy", "", "Learning rate of the policy's last update"),
        ("learning_rate/critic", "", "Learning rate of the critic's last update"),
    ],
    "Advantages and critic": [
        ("advantages/mean", "score", "Mean advantage before whitening"),
        ("advantages/std", "score", "Standard deviation of the advantages before whitening"),
        ("groups/without_signal", "share", "Share of answers whose prompt's answers all score the same"),
        ("returns/mean", "score", "Mean return"),
        ("values/mean", "score", "Mean value that the critic predicted"),
        ("explained_variance", "", "Share of the variance of returns that the values explain; 0 is the mean's"),
        ("clip_fraction/value", "share", "Share of tokens whose value the value loss clips"),
    ],
    "Preferences": [
        ("accuracy", "share", "Share of pairs whose chosen answer scores higher; ties half"),
        ("margin", "score", "Mean score of chosen minus rejected answers"),
        ("reward/chosen", "score", "Mean score of the chosen answers; of a policy their implicit reward"),
        ("reward/rejected", "score", "Mean score of the rejected answers; of a policy their implicit reward"),
        ("log_prob/chosen", "nats/sequence", "Mean log-probability of the chosen answers under the policy"),
        ("log_prob/rejected", "nats/sequence", "Mean log-probability of the rejected answers under the policy"),
    ],
    "Sequences": [
        ("length/response", "tokens", "Mean length of the answers"),
        ("length/prompt", "tokens", "Mean length of the prompts"),
        ("length/turns", "answers", "Mean answers of an episode, where there is an environment"),
        ("prompts/sampled", "prompts", "Prompts sampled for the step; more than its own with dynamic sampling"),
        ("prompts/dropped", "prompts", "Prompts dropped with all their samples because one of them has no reward"),
        ("truncated/share", "share", "Share of answers cut off at the longest allowed length"),
        ("round_trip/failed_share", "share", "Share of samples whose ids do not survive decoding and encoding"),
        ("padding/share", "share", "Share of computed tokens that no loss needs"),
        ("shared_prefix/share", "share", "Share of the sequences' tokens that were computed once for several of them"),
    ],
    "Rollout": [
        ("rollout/log_prob_difference", "nats", "Largest difference of one token's log-prob, rollout to trainer"),
        ("rollout/log_prob_difference_mean", "nats", "Mean absolute difference of log-probs, rollout to trainer"),
        *(
            (
                f"rollout/log_prob_difference_part_{part}",
                "nats",
                f"The same mean over positions in part {part} of 8 of `rollout.max_new_tokens`",
            )
            for part in range(1, 9)
        ),
        ("rollout/kl", "nats/token", "KL of the rollout engine's policy from the trainer's, same weights (k3)"),
        ("importance/mean", "", "Mean importance weight of the actions, after its bounds"),
        ("importance/largest", "", "Largest importance weight before its bounds"),
        ("importance/limited_share", "share", "Share of actions whose importance weight is cut or masked"),
        ("importance/effective_share", "share", "Effective sample size of the importance weights, over the actions"),
        ("rollout/engines_healthy", "engines", "Rollout engines that may generate, at the end of the step's rollout"),
        ("rollout/restarts", "restarts", "Restarts of rollout engines since the run was started or resumed"),
        (
            "prompts/set_aside",
            "prompts",
            "Prompts of the run that are answered no more, because three engines died with each",
        ),
        ("rollout/staleness", "versions", "Age of the oldest weights that sampled a token of the step"),
        ("rollout/staleness_mean", "versions", "Mean age of the oldest weights that sampled a token of an answer"),
        ("rollout/tokens_per_second", "tokens/s", "Tokens sampled in a second of rollout"),
        ("rollout/seconds", "s", "Time in which engines sampled in the background, since the last step's answers"),
        ("rollout/in_flight", "answers", "Answers that were begun and not finished when the step took its own"),
        ("rollout/buffered", "answers", "Finished answers of later steps when the step took its own"),
        (
            "rollout/engines_idle",
            "share",
            "Share of the time since the last step's answers in which engines had no work",
        ),
    ],
    "Time": [
        ("time/step", "s", "Whole step"),
        ("time/rollout", "s", "Sampling answers"),
        ("time/scoring", "s", "Scoring answers"),
        ("time/log_probs", "s", "Log-probs of policy and reference, and values"),
        ("time/update", "s", "Optimizer updates"),
        ("time/weights", "s", "Sending weights to the rollout engines"),
        ("time/checkpoint", "s", "Waiting for checkpoints"),
        ("time/evaluation", "s", "Evaluating"),
        ("critical_path/*", "s", "Part of the step's critical path that ran through one role, or the driver"),
        ("idle/*", "share", "Share of the step in which the ranks of a role had no call to answer"),
    ],
    "Throughput and memory": [
        ("tokens_per_second", "tokens/s", "Training tokens in a second of the whole step"),
        (
            "matmul/share",
            "share",
            "Training FLOPs of the sequences over the machine's measured rate of matrix products",
        ),
        ("seconds_left", "s", "What is left of the training at the pace so far"),
        ("memory/pss_gb", "GB", "Memory of all processes of the run (PSS) and of the object store, on all nodes"),
        ("memory/gpu_allocated_gb", "GB", "Peak of the tensors on the fullest GPU since the last update"),
        ("memory/gpu_allocated_gb/policy", "GB", "Peak of the policy's tensors on its fullest GPU in the step"),
        ("memory/gpu_allocated_gb/critic", "GB", "Peak of the critic's tensors on its fullest GPU in the step"),
        ("memory/gpu_reserved_gb", "GB", "Peak of what torch holds of the fullest GPU since the last update"),
        ("memory/gpu_reserved_gb/policy", "GB", "Peak of what the policy's torch holds of its fullest GPU in the step"),
        ("memory/gpu_reserved_gb/critic", "GB", "Peak of what the critic's torch holds of its fullest GPU in the step"),
    ],
    RANKS: [
        ("rank/resident_gb", "GB", "Resident memory of a rank and of what it started; shared pages count in each rank"),
        ("rank/pss_gb", "GB", "Its proportional memory (PSS): shared pages are divided among those that share them"),
        ("rank/busy_share", "share", "Share of the last seconds that the rank spent on calls; else it waited for one"),
        ("rank/gpu_held_gb", "GB", "What torch holds of the rank's GPUs"),
        ("rank/gpu_peak_gb", "GB", "The most that it held of them since the rank was started"),
    ],
    "Evaluation": [
        ("evaluation/reward", "score", "Mean reward of the answers to held-out prompts"),
        ("evaluation/reward_start", "score", "The same of the starting policy"),
        ("evaluation/reward_win_rate", "share", "Share of held-out answers that beat the start's by reward; ties half"),
        ("evaluation/gold", "score", "Mean gold score of the answers to held-out prompts"),
        ("evaluation/gold_start", "score", "The same of the starting policy"),
        ("evaluation/gold_win_rate", "share", "Share of held-out answers that beat the start's by gold; ties half"),
        ("evaluation/kl", "nats/sequence", "KL from the reference (k1), summed over held-out samples, mean of them"),
        (
            "evaluation/kl_start",
            "nats/sequence",
            "The same of the starting policy, where the reference is another model",
        ),
        ("evaluation/length", "tokens", "Mean length of the answers to held-out prompts"),
        ("evaluation/length_start", "tokens", "The same of the starting policy"),
        ("evaluation/truncated", "share", "Share of held-out answers cut off at the longest allowed length"),
        ("evaluation/prompts_dropped", "prompts", "Held-out prompts left out because an answer to them has no reward"),
        (
            "evaluation/habit_rate",
            "share",
            "Generated world: share of held-out answers with the planted habit, worth nothing in gold",
        ),
        ("evaluation/habit_rate_start", "share", "The same of the starting policy"),
        (
            "evaluation/habits_per_answer",
            "",
            "Generated world: mean number of times the planted habit appears in a held-out answer",
        ),
        ("evaluation/habits_per_answer_start", "", "The same of the starting policy"),
        ("evaluation/*", "", "Another figure on held-out rows: pass@k, of one source, or of pairs"),
    ],
}

REGISTRY = Registry(
    Metric(name, unit, text, group, "counter" if name in _COUNTERS else "gauge", ALARMS.get(name))
    for group, rows in _METRICS.items()
    for name, unit, text in rows
)
