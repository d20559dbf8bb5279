"""Claims of the regularisation family."""
