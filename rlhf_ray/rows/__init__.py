"""Rows of data files: their formats and layouts, and how preferences, prompts and demonstrations are read from them."""
