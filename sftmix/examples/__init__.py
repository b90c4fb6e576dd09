"""Scripts of a user's own, each with SFTMix: a loop in PyTorch, Lightning, and TRL. A test runs every one."""
