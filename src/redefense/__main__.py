"""`python -m redefense`."""

from redefense.cli import main

main()
