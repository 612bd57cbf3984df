"""What travels to the engines in the place of all weights, and what their workers need to take it."""
