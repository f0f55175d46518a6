"""`python -m medicalgpt_cli` is `medgpt`."""

from medicalgpt_cli.app import main

if __name__ == "__main__":
    main()
