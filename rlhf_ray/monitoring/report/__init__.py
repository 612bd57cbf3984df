"""The HTML report of a run: curves, tables, samples, checks and memory on one page."""
