"""`python -m sslrun`, as torchrun starts it."""

from sslrun.cli import main

main()
