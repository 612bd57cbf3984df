"""Training on examples: supervised fine-tuning and reward models."""
