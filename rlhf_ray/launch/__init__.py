"""What the commands do: start drivers, services and offline scoring, and end in an exit code."""
