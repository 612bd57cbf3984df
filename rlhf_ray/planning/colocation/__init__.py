"""All roles on the same GPUs, by turns: who is on them in which phase of a step, and what memory that takes."""
