"""Where jobs run: processes on this machine, and Slurm. Takes commands, and knows nothing of what they do."""
