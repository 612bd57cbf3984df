"""The alarms of a run, each with the metric that carries it: the one text of rules, dashboard, status, report and log.

Invariants: no alarm of liveness holds before the first step has ended, but for those of events, of the disk and of memory. A
condition that is about tuning must have held for ``TUNING_S`` and is advice.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.monitoring.alarms.alarm import Alarm
from rlhf_ray.monitoring.alarms.conditions import Above, Below, Changed, Counted, Either, Silent

RECENT_S = 600
"""An event is reported for so long."""
TUNING_S = 300
DRIFT_S = 3600
SILENT_S = 60
FULL = 0.94
"""Of the memory: Ray ends processes from 0.95 on."""

_WAITS = ("DiskFull", "RunSilent", "RewardFailing", "RewardStalled")
"""What explains that nothing goes on."""

ALARMS: Mapping[str, Alarm] = {
    "run/started": Alarm(
        "RunSilent", "critical", Silent("run/started", SILENT_S),
        "The driver of the run has died, is stopped, or is out of reach, and the run has not ended in order",
        "Look at the end of its log. If its process is stopped (SIGSTOP), continue it; if it is gone: rlhf-ray resume RUN_DIR",
        explained_by=("DiskFull",),
    ),
    "disk/free_gb": Alarm(
        "DiskFull", "critical", Below("disk/free_gb", "disk/needed_gb"),
        "The disk of the run directory has no room for the next commit",
        "Free space on it, such as older runs or checkpoints (checkpoint.keep); a run that ended goes on with: rlhf-ray resume "
        "RUN_DIR",
    ),
    "memory/used_share": Alarm(
        "MemoryFull", "critical", Above("memory/used_share", FULL),
        "The memory of the driver's machine is nearly full: Ray or the system will end processes",
        "End what else runs there; or lower batch.max_tokens_per_micro_batch, rollout.engines or ranks, and resume the run: "
        "rlhf-ray plan CONFIG shows what each role takes",
    ),
    "reward/failed_tries": Alarm(
        "RewardFailing", "critical", Counted("reward/failed_tries", 120),
        "The reward source does not answer, or answers with errors; the run tries again for reward.hold_s seconds",
        "Start the service at reward.url again, or mend the function: the log names the error. A run that gave up goes on with:"
        " rlhf-ray resume RUN_DIR",
    ),
    "age/reward_call": Alarm(
        "RewardStalled", "warning", Above("age/reward_call", "limit/reward_call"),
        "A call to the reward source takes more than six times as long as usual",
        "Look at the service's queue (/health, /metrics) and its machine; continue or restart it: the call fails after "
        "reward.timeout_s and is made again",
        explained_by=("DiskFull", "RunSilent", "RewardFailing"),
    ),
    "rollout/engine_deaths": Alarm(
        "EngineLost", "warning", Either(Counted("rollout/engine_deaths", RECENT_S), Above("rollout/engines_down", 0)),
        "A rollout engine died or was given up; it is started again, and the others take over its answers",
        "rlhf-ray status RUN_DIR says why. If it was killed for its memory, lower rollout.kv_cache_gib or "
        "rollout.max_num_seqs; if engines die again and again, look at set_aside.jsonl",
    ),
    "groups/lost": Alarm(
        "GroupLost", "warning", Counted("groups/lost", RECENT_S),
        "A group of ranks was lost and is started again, from the last commit where it learns",
        "incidents.jsonl says which, and why; stacks/ what a rank did that hung. run.max_group_restarts ends a run that goes on"
        " losing groups",
    ),
    "age/phase": Alarm(
        "PhaseOverdue", "warning", Above("age/phase", "limit/phase"),
        "What the run is doing takes more than six times as long as usual",
        "rlhf-ray status RUN_DIR names the phase; stacks/ shows what each rank does. A rank that hangs is ended by itself after"
        " run.stall_floor_s; one that is only slow: look at its machine",
        explained_by=(*_WAITS, "EngineLost", "GroupLost"),
    ),
    "age/step": Alarm(
        "StepOverdue", "critical", Above("age/step", "limit/step"),
        "No step has ended for more than six times as long as one usually takes",
        "Look at the phase in rlhf-ray status RUN_DIR and at the end of the log; to begin again at the last commit, stop the"
        " run and: rlhf-ray resume RUN_DIR",
        explained_by=(*_WAITS, "PhaseOverdue"),
    ),
    "age/commit": Alarm(
        "CommitOverdue", "warning", Above("age/commit", "limit/commit"),
        "The last commit is older than two intervals of commits: a kill now would cost all since",
        "Look for errors of commits in the log; check the speed of the disk, or set checkpoint.every_steps lower and resume",
        explained_by=(*_WAITS, "StepOverdue", "PhaseOverdue", "GroupLost"),
    ),
    "updates/skipped": Alarm(
        "UpdatesSkipped", "warning", Counted("updates/skipped", RECENT_S),
        "Updates were skipped because a loss or gradient was NaN or Inf, or stood out",
        "Look at the last metrics before it and at incidents.jsonl; lower the learning rate, or resume from an earlier commit. "
        "run.max_consecutive_skips and guards.budget end the run",
    ),
    "prompts/dropped": Alarm(
        "PromptsDropped", "warning", Counted("prompts/dropped", RECENT_S),
        "Prompts were dropped with all their answers because one of them has no reward",
        "The warnings in the log name a sample and the reason: mend the reward function or its data",
        explained_by=("RewardFailing",),
    ),
    "rollout/log_prob_difference_mean": Alarm(
        "RolloutDiffers", "warning", Above("rollout/log_prob_difference_mean", 0.1, TUNING_S),
        "Rollout engines and trainer give other log-probs to the same tokens: the policy learns from what it did not do",
        "Compare policy.model.dtype with rollout.dtype, and with rollout.backend=transformers; in mode windowed, "
        "lower rollout.window",
        from_step=2,
    ),
    "kl/k1": Alarm(
        "FarFromReference", "advice", Above("kl/k1", 10.0, TUNING_S),
        "The policy is far from its reference: it may exploit the reward",
        "Compare gold/mean or samples with reward/learned; raise algorithm.kl.coefficient, or stop earlier",
        from_step=2,
    ),
    "clip_fraction": Alarm(
        "StepsTooLarge", "advice", Above("clip_fraction", 0.3, TUNING_S),
        "The policy loss clips more than 30 % of the tokens: updates go further than the samples tell",
        "Lower policy.engine.optimizer.learning_rate, or make fewer updates from one batch",
        from_step=2,
    ),
    "entropy": Alarm(
        "EntropyCollapsed", "advice", Below("entropy", 0.05, TUNING_S),
        "The policy has all but stopped to explore",
        "Raise algorithm.entropy_coefficient or algorithm.kl.coefficient, or go back to an earlier commit",
        from_step=2,
    ),
    "length/response": Alarm(
        "LengthDrifts", "advice", Changed("length/response", 2.0, DRIFT_S),
        "The mean length of answers has doubled or halved within an hour",
        "Read samples/: if the reward pays for length, use algorithm.shaping, or train the reward model on pairs that differ"
        " less in length",
        from_step=2,
    ),
    "truncated/share": Alarm(
        "AnswersCutOff", "advice", Above("truncated/share", 0.25, TUNING_S),
        "More than a quarter of the answers are cut off at the longest allowed length",
        "Raise rollout.max_new_tokens, or set algorithm.shaping.missing_eos",
        from_step=2,
    ),
    "groups/without_signal": Alarm(
        "NoSignal", "advice", Above("groups/without_signal", 0.5, TUNING_S),
        "For more than half of the answers all answers to the prompt score the same, and teach nothing",
        "Choose prompts that are neither too easy nor too hard, raise batch.samples_per_prompt, or set"
        " algorithm.dynamic_sampling",
        from_step=2,
    ),
    "explained_variance": Alarm(
        "CriticBlind", "advice", Below("explained_variance", 0.0, TUNING_S),
        "The critic predicts returns worse than their mean does",
        "Raise critic.engine.optimizer.learning_rate, or set algorithm.critic_warmup_steps",
        from_step=20,
    ),
    "rollout/staleness_mean": Alarm(
        "AnswersStale", "advice", Above("rollout/staleness_mean", 4.0, TUNING_S),
        "Answers are learned from more than four weight updates after they were begun",
        "Lower rollout.window, or set algorithm.max_staleness",
        from_step=2,
    ),
    "rollout/engines_idle": Alarm(
        "EnginesIdle", "advice", Above("rollout/engines_idle", 0.5, TUNING_S),
        "Rollout engines have no work for more than half of the time",
        "Use fewer engines and more ranks that learn, or let rollout run ahead (rollout.mode)",
        from_step=2,
    ),
    "round_trip/failed_share": Alarm(
        "TextDiffersFromTokens", "advice", Above("round_trip/failed_share", 0.05, TUNING_S),
        "Decoding and encoding an answer gives other tokens: a reward that reads text scores something else",
        "Use a reward model with the policy's tokenizer, which gets token ids",
        from_step=2,
    ),
}  # fmt: skip
