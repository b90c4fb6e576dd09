"""The demo: a data set that every Python carries, a model that a package carries, and a size that fits the time."""
