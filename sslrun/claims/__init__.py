"""Claims of the lecture: the sentences, the runs that test them, and the verdicts."""
