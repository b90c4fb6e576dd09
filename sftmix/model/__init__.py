"""Any causal language model with the loss in its head: its data type, adapters, shards and files."""
