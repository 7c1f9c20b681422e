"""`python -m cofi_jax.report`: puts finished runs on one page."""

import sys

from cofi_jax.report.pages import main

sys.exit(main(sys.argv))
