"""Several reward models as one: the average of their weights."""
