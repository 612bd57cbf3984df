"""What a terminal shows of a run: how it is now, its samples, and one sample token by token."""
