"""`python -m cofi_jax.sweep`: runs configs times seeds and tables what came out."""

import sys

from cofi_jax.run.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
