"""Run the command line as `python -m ortho_cli`."""

from ortho_cli.cli.app import main

main()
