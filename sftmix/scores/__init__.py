"""How well the reference predicts each example, and the two halves that follow from it."""
