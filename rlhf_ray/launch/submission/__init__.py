"""A job on a running Ray cluster, seen from the client: its server's answers, its log, and how it ended."""
