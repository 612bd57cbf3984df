"""Processes and signals: how a command is interrupted, and how a process and its parent learn of each other's end."""
