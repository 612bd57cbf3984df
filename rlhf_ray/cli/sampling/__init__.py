"""Commands about answers that are sampled apart from training, and about their rewards."""
