"""Time by rank: what each process of a run did and waited for, and which of it a step had to wait for."""
