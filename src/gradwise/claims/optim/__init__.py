"""Claims of the optimisation family."""
