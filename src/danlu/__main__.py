"""``python -m danlu`` is the ``danlu`` command, which is also how ``torchrun -m danlu`` starts it."""

import sys

from danlu.cli import main

if __name__ == "__main__":
    sys.exit(main())
