"""The measures of a trained model: accuracy, calibration, win rate, pass@k and best-of-n, each defined once.

Invariants:

- A figure is counted over single pairs or prompts, never averaged over batches. A tie counts one half.
- A score that is not finite is an error, never a loss or a win.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CalibrationBin": ".calibration",
        "accuracy": ".preferences",
        "bag_of_words_baseline": ".baseline",
        "best_of_n": ".sampling",
        "best_of_n_kl": ".sampling",
        "calibration_bins": ".calibration",
        "calibration_error": ".calibration",
        "mean_pass_at_k": ".sampling",
        "pair_order": ".two_rewards",
        "pass_at_k": ".sampling",
        "rank_correlation": ".two_rewards",
        "tie_rate": ".preferences",
        "top_k_of_n_kl": ".sampling",
        "win_rate": ".preferences",
    },
)
