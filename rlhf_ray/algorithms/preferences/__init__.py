"""Losses that train a policy on preferences directly: on pairs, and on single answers with a label."""
