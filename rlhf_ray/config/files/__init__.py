"""What a job needs to find on this machine, by subject: each mistake with its key, nothing loaded or downloaded."""
