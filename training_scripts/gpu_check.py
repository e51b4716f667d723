"""The steps of gpu_check.sh: pack small copies of the datasets at home, run the checks where a GPU is.

python training_scripts/gpu_check.py pack --kvasir-seg data/Kvasir-SEG --cvc-clinicdb data/CVC-ClinicDB
python training_scripts/gpu_check.py run gpu-cache --output gpu-results
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli.console import run_app
from polypseg.study import gpu_check

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def pack(
    kvasir_seg: Annotated[Path, Option(help="Folder or archive of Kvasir-SEG.")],
    cvc_clinicdb: Annotated[Path, Option(help="Folder or archive of CVC-ClinicDB.")],
    output: Annotated[Path, Option(help="Folder that receives two zip files.")] = Path("gpu-cache"),
) -> None:
    """Write copies of both datasets at 224 px, under 60 MB together."""
    written = gpu_check.pack({"kvasir_seg": kvasir_seg, "cvc_clinicdb": cvc_clinicdb}, output)
    print("\n".join(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in written))


@app.command()
def run(
    packed: Annotated[Path, Argument(help="The folder that `pack` wrote.")],
    output: Annotated[Path, Option(help="Folder of results; a second call continues the rows.")] = Path("gpu-results"),
    step: Annotated[list[gpu_check.Step] | None, Option(help="What to do; repeatable. Default: all.")] = None,
    small: Annotated[bool, Option("--small", help="Two steps of everything, for a machine without GPU.")] = False,
    workers: Annotated[int, Option(min=0, help="Worker processes that augment.")] = 0,
) -> None:
    """Train both rows, find pretraining's largest batches, compare the GPU with the CPU; write what was measured."""
    effort = gpu_check.SMALL if small else gpu_check.FULL
    path = gpu_check.check(packed, output, steps=step or list(gpu_check.Step), effort=effort, workers=workers)
    print(f"{gpu_check.gpu_name()}: {path}")


if __name__ == "__main__":
    run_app(app)
