"""Claims of the lecture: sentences, the runs that test them, and their verdicts."""
