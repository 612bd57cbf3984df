"""What a job must find on this machine, one module for each subject. Nothing is loaded or downloaded."""
