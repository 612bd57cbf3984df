"""Commands about a run directory that is there."""
