"""Examples as they come, read and turned into the tokens that are trained on."""
