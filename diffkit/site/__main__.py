"""`python -m diffkit.site`."""

import sys

from diffkit.site import main

sys.exit(main())
