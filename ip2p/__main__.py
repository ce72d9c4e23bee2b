"""``python -m ip2p``."""

import sys

from ip2p.cli import main

sys.exit(main())
