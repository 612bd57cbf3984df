"""The HTML report of a run: its page, charts, curves and tables."""
