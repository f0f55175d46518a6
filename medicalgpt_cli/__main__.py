"""`medgpt`, also as `python -m medicalgpt_cli`: signals are listened to before anything else is imported."""

from medicalgpt_cli.engine.run import signals


def run() -> None:
    """Entry point."""
    try:
        signals.listen()
        from medicalgpt_cli.app import main
    except KeyboardInterrupt as problem:
        signals.end(problem)
    else:
        main()


if __name__ == "__main__":
    run()
