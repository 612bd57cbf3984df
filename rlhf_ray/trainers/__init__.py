"""The training loops of all jobs, run by the driver, and what they share: journal, checkpoints, session, stopping."""
