"""One run: its folder, what its stages share, the stages, and the table at the end."""
