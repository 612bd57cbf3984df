"""A generated world of customer letters and sums, whose gold score is known exactly: for the demo and for tests."""
