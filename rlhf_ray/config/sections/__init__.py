"""The sections that configs are made of, one module for each subject."""
