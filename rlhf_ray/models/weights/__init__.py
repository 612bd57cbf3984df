"""Weights on disk and in memory: reading, sharding, adapters, quantisation, tokenizers."""
