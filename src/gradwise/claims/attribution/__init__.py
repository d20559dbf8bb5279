"""Claims of the attribution family."""
