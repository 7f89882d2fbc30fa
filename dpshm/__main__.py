"""``python -m dpshm`` is the ``dpshm`` command."""

from dpshm.cli import main

if __name__ == "__main__":
    main()
