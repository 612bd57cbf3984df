"""The workers: one rank of one role each, as plain classes that know nothing of Ray."""
