"""Fine-tune one model of the study on one dataset (paper section 3.2).

accelerate launch training_scripts/finetune.py --model resnet50_deeplabv3plus.supervised_imagenet1k \
    --dataset kvasir_seg --recipe finetune --encoder-weights timm:resnet50.tv_in1k --output runs/rn-in-sl

On CPU with several processes: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
(`--cpu --num_processes 2` silently starts one). Expect what `--num-processes` says you expect.
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.console import reported

with reported():  # of a Ctrl-C too, in the seconds that these take
    from polypseg import zoo
    from polypseg.arguments import MaskValuesOption
    from polypseg.cli import run_script
    from polypseg.data import open_dataset
    from polypseg.errors import UsageError
    from polypseg.recipe import load_recipe
    from polypseg.runs import check_processes, make_accelerator
    from polypseg.suite import open_negatives
    from polypseg.training import build_model, finetune


def main(
    model: Annotated[str, Option(help="Model id of the table, e.g. RN-IN-MC or its long form.")],
    output: Annotated[Path, Option(help="The run's folder.")],
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")] = "kvasir_seg",
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    mask_values: MaskValuesOption = None,
    split: Annotated[str, Option(help="Named split.")] = "reference",
    recipe: Annotated[str, Option(help="Recipe file, or the name of a bundled one.")] = "finetune",
    set_: Annotated[list[str] | None, Option("--set", help="Override, e.g. training.epochs=2.")] = None,
    encoder_weights: Annotated[
        str | None, Option(help="Weights file, timm:<name>.<tag>, starter, or random. Required for pretrained rows.")
    ] = None,
    negatives: Annotated[
        Path | None, Option(help="Polyp-free frames (folder or archive) of a recipe with data.negatives.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --output.")] = False,
    workers: Annotated[int, Option(min=0, help="Worker processes that augment; 0 augments in the main process.")] = 0,
    num_processes: Annotated[int | None, Option(help="Fail unless so many processes run.")] = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of the dataset.")] = False,
) -> None:
    """Fine-tune one model of the study on one dataset."""
    entry, settings = zoo.get(model), load_recipe(recipe, overrides=set_ or [])
    if entry.method != "none" and encoder_weights is None:
        raise UsageError(f"{entry.model_id} is a pretrained row: give its weights, or say --encoder-weights random")
    data = open_dataset(dataset, source=source, allow_partial=allow_partial, mask_values=mask_values)
    accelerator = make_accelerator(settings.training.precision, run_dir=output)
    check_processes(accelerator, expected=num_processes)
    network = build_model(entry, settings, encoder_weights=encoder_weights)
    progress = finetune(
        network,
        data,
        settings,
        accelerator,
        run_dir=output,
        split=split,
        negatives=open_negatives(negatives) if negatives else None,
        resume=resume,
        workers=workers,
    )
    accelerator.print(f"best validation Dice {progress.best:.4f}; model in {output / 'best'}")


if __name__ == "__main__":
    run_script(main)
