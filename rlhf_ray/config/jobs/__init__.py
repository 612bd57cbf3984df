"""The kinds of jobs: one module for each, and a registry with a line for each."""
