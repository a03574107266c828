"""`python -m flawstream_cli`: the command without its script."""

from flawstream_cli.main import main

main()
