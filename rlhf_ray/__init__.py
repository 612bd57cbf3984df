"""Reinforcement learning from human feedback as a service on a Ray cluster."""

__version__ = "0.1.0"
