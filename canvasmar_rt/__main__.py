"""`python -m canvasmar_rt` is the `canvasmar-rt` command."""

from canvasmar_rt.cli import main

main()
