"""The forward pass over packed sequences: attention, segments, log-probs, parallel packs."""
