"""Rules between the sections of a job, by subject. They read values alone, so that a config can be checked anywhere."""
