"""What each rank says of itself: its memory, and whether it works or waits."""
