"""Saving while training goes on: copies of a state, room for them in memory, and a thread that writes them."""
