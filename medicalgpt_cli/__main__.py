"""`python -m medicalgpt_cli` is `medgpt`, and both begin here."""

from medicalgpt_cli.working_folder import leave_working_folder

leave_working_folder()  # before anything is imported that could lie there

from medicalgpt_cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
