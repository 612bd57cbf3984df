"""Rewards of the steps of an answer: how they are checked and reduced, and at which tokens of the answer they stand."""
