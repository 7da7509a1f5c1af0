"""`python -m pmgaft`."""

from pmgaft.cli import main

main(prog_name="pmgaft")
