"""`python -m gradshield_fast` is `gradshield-fast`."""

from gradshield_fast.cli import main

main()
