"""Answers of a model to many prompts: sampled, scored, chosen among, and scored again."""
