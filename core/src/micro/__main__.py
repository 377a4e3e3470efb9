"""``python -m micro`` is the ``micro`` command."""

import sys

from micro.cli import main

if __name__ == "__main__":
    sys.exit(main())
