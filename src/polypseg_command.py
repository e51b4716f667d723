"""Entry point of the ``polypseg`` command."""


def main() -> None:
    """Run the command line."""
    from polypseg.cli import main as run

    run()


if __name__ == "__main__":
    main()
