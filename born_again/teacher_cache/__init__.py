"""A frozen teacher's answers, kept in memory or on disk and found again by the names of the views they are for."""
