"""Pretrain an encoder: MoCo v3, Barlow Twins, MAE or, as their baseline, with labels, as the recipe says.

accelerate launch training_scripts/pretrain.py --recipe pretrain_moco_v3_resnet50 \
    --frames data/hyper-kvasir-unlabeled-images.zip --labelled data/labeled-images --output runs/moco

On CPU with several processes: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
The encoder is then in <output>/encoder, for `finetune.py --encoder-weights <output>/encoder/model.safetensors`.
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.console import reported

with reported():  # of a Ctrl-C too, in the seconds that these take
    from polypseg.cli import run_script
    from polypseg.data.frames import open_frames
    from polypseg.data.labelled import load_labelled
    from polypseg.pretraining.export import export_encoder, write_run_report
    from polypseg.pretraining.recipe import load_pretraining_recipe
    from polypseg.pretraining.run import build_method, pretrain
    from polypseg.runs import check_processes, make_accelerator, sole_run


def main(
    recipe: Annotated[str, Option(help="Recipe file, or the name of a bundled one (pretrain_...).")],
    frames: Annotated[Path, Option(help="Folder, zip archive or tar shards of frames; only supervised uses labels.")],
    output: Annotated[Path, Option(help="The run's folder.")],
    corpus: Annotated[str | None, Option(help="What model ids call the frames, where they are not the row's.")] = None,
    labelled: Annotated[Path | None, Option(help="Frames in one folder a class, for the report at the end.")] = None,
    set_: Annotated[list[str] | None, Option("--set", help="Override, e.g. training.epochs=2.")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --output.")] = False,
    workers: Annotated[int, Option(min=0, help="Worker processes that make views; 0: the main process.")] = 0,
    num_processes: Annotated[int | None, Option(help="Fail unless so many processes run.")] = None,
) -> None:
    """Pretrain an encoder."""
    settings = load_pretraining_recipe(recipe, overrides=set_ or [])
    store = open_frames(frames)
    classes = load_labelled(labelled, image_size=settings.data.image_size) if labelled else None
    accelerator = make_accelerator(settings.training.precision, run_dir=output)
    check_processes(accelerator, expected=num_processes)
    method = build_method(settings)
    with sole_run(output, accelerator):
        progress = pretrain(method, store, settings, accelerator, run_dir=output, resume=resume, workers=workers)
        if accelerator.is_main_process:
            weights = export_encoder(method, settings, progress, store, folder=output / "encoder", corpus=corpus)
            report = write_run_report(method, settings, progress, store, folder=output / "report", labelled=classes)
            accelerator.print(f"encoder: {weights}\nreport: {', '.join(map(str, report))}")


if __name__ == "__main__":
    run_script(main)
