"""``python -m turboattention``."""

import sys

from turboattention.cli.main import main

sys.exit(main())
