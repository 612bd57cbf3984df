"""Ranks and the groups that they form: the worker of each role, as a Ray actor or in this process."""
