"""Claims of the recovery family."""
