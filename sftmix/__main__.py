"""``python -m sftmix``: the command line, also under torchrun."""

from sftmix.cli import main

if __name__ == "__main__":  # processes that share the tokenising import this file again
    main()
