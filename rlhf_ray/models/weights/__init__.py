"""The weights of models: reading them from disk, splitting and quantising them, adapters, and tokenizers."""
