"""Render hub_configs/models/*.json from the table of models.

python training_scripts/render_hub_configs.py
"""

from pathlib import Path

from polypseg.cli.console import run_script
from polypseg.hub.model_configs import write_model_configs


def main() -> None:
    """Render hub_configs/models/*.json from the table of models."""
    folder = Path(__file__).resolve().parents[1] / "hub_configs" / "models"
    print(f"{len(write_model_configs(folder))} files in {folder}")


if __name__ == "__main__":
    run_script(main)
