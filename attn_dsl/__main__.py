"""`python -m attn_dsl` is `attn-dsl`."""

import sys

from attn_dsl.cli import main

sys.exit(main())
