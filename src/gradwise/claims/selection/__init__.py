"""Claims of the selection family."""
