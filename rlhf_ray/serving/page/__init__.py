"""The page of the service: a conversation and two answers, their scores side by side, and how the service is."""
