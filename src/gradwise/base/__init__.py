"""The lowest room: checks, generators, counts of work, result and loss objects.

Everything else may import it; it imports nothing of the project.
"""
