"""Which metrics share a panel, on the dashboards and in the report.

Invariant: a metric is in one panel at most, and a panel has one unit.
"""

from __future__ import annotations

from collections.abc import Collection

_SHARED_PANELS = {
    "Time since the last step, and its limit": ("age/step", "limit/step"),
    "Time in the phase, and its limit": ("age/phase", "limit/phase"),
    "Age of the last commit, and its limit": ("age/commit", "limit/commit"),
    "Time of the oldest call to a reward source, and its limit": ("age/reward_call", "limit/reward_call"),
    "Disk": ("disk/free_gb", "disk/needed_gb"),
    "KL from the reference": ("kl/k1", "kl/k3"),
    "Length": ("length/response", "length/prompt"),
    "Difference of log-probs by position": tuple(f"rollout/log_prob_difference_part_{part}" for part in range(1, 9)),
    "Scores of the two sides": ("reward/chosen", "reward/rejected"),
    "Log-probability of the two sides": ("log_prob/chosen", "log_prob/rejected"),
    "Norm of the gradient": ("grad_norm/policy", "grad_norm/critic"),
    "Learning rate of the last update": ("learning_rate/policy", "learning_rate/critic"),
    "Share of clipped tokens": ("clip_fraction", "clip_fraction/value"),
    "Returns and values": ("returns/mean", "values/mean"),
    "Score that the step trained on": ("reward/mean", "reward/std"),
    "GPU memory of the policy": ("memory/gpu_reserved_gb/policy", "memory/gpu_allocated_gb/policy"),
    "GPU memory of the critic": ("memory/gpu_reserved_gb/critic", "memory/gpu_allocated_gb/critic"),
    "GPU memory": ("memory/gpu_reserved_gb", "memory/gpu_allocated_gb"),
    "Memory of a rank": ("rank/resident_gb", "rank/pss_gb"),
    "GPU memory of a rank": ("rank/gpu_held_gb", "rank/gpu_peak_gb"),
    "Held-out reward": ("evaluation/reward", "evaluation/reward_start"),
    "Held-out gold": ("evaluation/gold", "evaluation/gold_start"),
    "Held-out win rate over the start": ("evaluation/reward_win_rate", "evaluation/gold_win_rate"),
    "Held-out answers with the habit": ("evaluation/habit_rate", "evaluation/habit_rate_start"),
    "Habits in a held-out answer": ("evaluation/habits_per_answer", "evaluation/habits_per_answer_start"),
    "Held-out length": ("evaluation/length", "evaluation/length_start"),
}
_FAMILY_PANELS = {
    "critical_path": "Critical path of the step, by role",
    "idle": "Share of the step without work, by role",
}
"""Families whose members are in one panel."""


def choose_panel(name: str, available: Collection[str]) -> tuple[str, list[str]]:
    """The title and metrics of the panel that shows ``name``: it alone, or with those ``available`` that belong to it."""
    family, _, member = name.partition("/")
    if family in _FAMILY_PANELS and member != "*":
        return _FAMILY_PANELS[family], sorted(other for other in available if other.startswith(f"{family}/"))
    for title, members in _SHARED_PANELS.items():
        present = [member for member in members if member in available]
        if name in present and len(present) > 1:
            return title, present
    return name, [name]
