"""Entry point of the ``polypseg`` command: keeps torch and timm unloaded until a command needs them."""

import os

os.environ.setdefault("POLYPSEG_LAZY", "1")


def main() -> None:
    """Run the command line."""
    from polypseg.cli import main as run

    run()


if __name__ == "__main__":
    main()
