"""What a result is worth: accuracy, calibration, win rate, pass@k, best-of-n, each defined once.

Always true: a figure is counted over single pairs or prompts, never averaged over batches; ties count one half; a score
that is not finite is an error and never a loss or a win.
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
        "pass_at_k": ".sampling",
        "tie_rate": ".preferences",
        "win_rate": ".preferences",
    },
)
