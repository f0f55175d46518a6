"""`medgpt`, also as `python -m medicalgpt_cli`: what comes before anything else is imported."""

from medicalgpt_cli.working_folder import leave_working_folder

leave_working_folder()  # before anything is imported that could lie there

import atexit  # noqa: E402

from medicalgpt_cli.engine.run import signals  # noqa: E402


def run() -> None:
    """Entry point. Signals are listened to while libraries are imported, too."""
    try:
        signals.listen()
        atexit.register(
            signals.ignore
        )  # runs when all threads have ended; what is registered later runs before it
        from medicalgpt_cli.app import main
    except KeyboardInterrupt as problem:
        signals.end(problem)
    else:
        main()


if __name__ == "__main__":
    run()
