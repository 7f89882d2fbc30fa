"""``python -m dpshm`` is the ``dpshm`` command."""

import sys

from dpshm.cli import main

if __name__ == "__main__":
    sys.exit(main())
