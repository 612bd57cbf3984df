"""What a run writes about its alarms, and how it is between two steps."""
