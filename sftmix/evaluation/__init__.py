"""Held-out figures, sample answers and pictures."""
