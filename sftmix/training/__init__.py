"""From two halves of tokenised examples to steps, and the loop that takes them."""
