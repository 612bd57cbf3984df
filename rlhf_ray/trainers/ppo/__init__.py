"""PPO: one step as the data travels, and the objects it is built from."""
