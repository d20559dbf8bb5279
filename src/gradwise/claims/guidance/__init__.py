"""Claims of the guidance family."""
