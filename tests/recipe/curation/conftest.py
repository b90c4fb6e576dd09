"""The tiny model with its data and the finished run folder of the stages' tests."""

from tests.recipe.run.conftest import finished, material

__all__ = ["finished", "material"]
