"""A language model as a judge: what it is asked, how its replies are read, what it may cost, and the sources made of it."""
