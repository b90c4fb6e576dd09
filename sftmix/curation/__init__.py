"""Scores as a thing of their own: scoring a file of examples, choosing among them, and finding the bad ones."""
