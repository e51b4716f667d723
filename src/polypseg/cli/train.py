"""Commands that train: fine-tuning and pretraining, in one process or under ``accelerate launch``."""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.cli.options import MaskValuesOption, SourceOption, places

Set = Annotated[list[str] | None, Option("--set", help="Override of the recipe, e.g. training.epochs=2; repeatable.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in --output.")]
Processes = Annotated[int | None, Option(help="Fail unless so many processes run.")]


def finetune(
    model: Annotated[str, Option(help="Model id of the table, e.g. RN-IN-MC or its long form.")],
    output: Annotated[Path, Option(help="The run's folder.")],
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")] = "kvasir_seg",
    source: SourceOption = None,
    mask_values: MaskValuesOption = None,
    split: Annotated[str, Option(help="Named split.")] = "reference",
    recipe: Annotated[str, Option(help="Recipe file, or the name of a bundled one.")] = "finetune",
    set_: Set = None,
    encoder_weights: Annotated[
        str | None, Option(help="Weights file, timm:<name>.<tag>, starter, or random. Required for pretrained rows.")
    ] = None,
    initial_model: Annotated[
        str | None, Option(help="Go on from a fine-tuned model of the row: folder, Hub id, starter.")
    ] = None,
    negatives: Annotated[
        Path | None, Option(help="Polyp-free frames (folder or archive) of a recipe with data.negatives.")
    ] = None,
    resume: Resume = False,
    workers: Annotated[int, Option(min=0, help="Worker processes that augment; 0 augments in the main process.")] = 0,
    num_processes: Processes = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of the dataset.")] = False,
) -> None:
    """Fine-tune one model of the study on one dataset (paper section 3.2)."""
    from polypseg import zoo
    from polypseg.errors import UsageError
    from polypseg.recipe import load_recipe

    entry, settings = zoo.get(model), load_recipe(recipe, overrides=set_ or [])
    place = places(source, datasets=[dataset]).get(dataset)
    if initial_model is not None and encoder_weights is not None:
        raise UsageError("--initial-model brings its encoder: leave --encoder-weights out")
    if entry.method != "none" and encoder_weights is None and initial_model is None:
        raise UsageError(f"{entry.model_id} is a pretrained row: give its weights, or say --encoder-weights random")
    from polypseg.data import open_dataset
    from polypseg.evaluation.suite import open_negatives
    from polypseg.inference.model_folder import named_folder
    from polypseg.training.finetune import build_model, continued_model
    from polypseg.training.finetune import finetune as train
    from polypseg.training.run_folder import check_processes, make_accelerator

    data = open_dataset(dataset, source=place, allow_partial=allow_partial, mask_values=mask_values)
    accelerator = make_accelerator(settings.training.precision, run_dir=output)
    check_processes(accelerator, expected=num_processes)
    if initial_model is not None:
        network = continued_model(entry, settings, folder=named_folder(initial_model))
    else:
        network = build_model(entry, settings, encoder_weights=encoder_weights)
    progress = train(
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


def pretrain(
    recipe: Annotated[str, Option(help="Recipe file, or the name of a bundled one (pretrain_...).")],
    frames: Annotated[Path, Option(help="Folder, zip archive or tar shards of frames; only supervised uses labels.")],
    output: Annotated[Path, Option(help="The run's folder.")],
    corpus: Annotated[str | None, Option(help="What model ids call the frames, where they are not the row's.")] = None,
    labeled: Annotated[
        Path | None, Option("--labelled", help="Frames in one folder per class, for the report at the end.")
    ] = None,
    set_: Set = None,
    resume: Resume = False,
    workers: Annotated[int, Option(min=0, help="Worker processes that make views; 0: the main process.")] = 0,
    num_processes: Processes = None,
) -> None:
    """Pretrain an encoder: MoCo v3, Barlow Twins, MAE or, as their baseline, with labels, as the recipe says."""
    from polypseg.pretraining.recipe import load_pretraining_recipe

    settings = load_pretraining_recipe(recipe, overrides=set_ or [])
    from polypseg.data.corpus import open_frames
    from polypseg.pretraining.export import export_encoder, write_run_report
    from polypseg.pretraining.loop import build_method
    from polypseg.pretraining.loop import pretrain as train
    from polypseg.pretraining.probes.labeled import load_labeled
    from polypseg.training.run_folder import check_processes, make_accelerator, sole_run

    store = open_frames(frames)
    classes = load_labeled(labeled, image_size=settings.data.image_size) if labeled else None
    accelerator = make_accelerator(settings.training.precision, run_dir=output)
    check_processes(accelerator, expected=num_processes)
    method = build_method(settings)
    with sole_run(output, accelerator):
        progress = train(method, store, settings, accelerator, run_dir=output, resume=resume, workers=workers)
        if accelerator.is_main_process:
            weights = export_encoder(method, settings, progress, store, folder=output / "encoder", corpus=corpus)
            report = write_run_report(method, settings, progress, store, folder=output / "report", labeled=classes)
            accelerator.print(f"encoder: {weights}\nreport: {', '.join(map(str, report))}")
