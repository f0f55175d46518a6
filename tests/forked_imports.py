"""What the program does before it imports a library; the first of the modules that `forked.py` loads."""

from medicalgpt_cli.engine.run.quiet import quieten

quieten()
