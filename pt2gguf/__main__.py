"""``python -m pt2gguf``."""

import sys

from pt2gguf.cli import main

if __name__ == "__main__":
    sys.exit(main())
