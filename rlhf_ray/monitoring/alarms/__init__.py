"""Alarms of a run: what they are, when they hold, and what to do about them. Nothing here reads a file or a clock."""
