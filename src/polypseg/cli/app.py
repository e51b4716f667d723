"""The ``polypseg`` command: its commands by audience, each with examples."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

from polypseg.cli import data, estimate, evaluate, hub, predict, shift, study, train, web
from polypseg.cli.console import run_app

USE, EVALUATE, TRAIN = "Use a model", "Evaluate", "Train and study"
DATA, PUBLISH = "Data", "Publish"

COMMANDS: tuple[tuple[str, str, Callable[..., None], tuple[str, ...]], ...] = (
    (USE, "segment", predict.segment, ("polypseg segment frame.jpg", "polypseg segment videos/ --output masks")),
    (USE, "web", web.web, ("polypseg web", "polypseg web --export space --title 'Polyp segmentation'")),
    (USE, "demo-app", predict.demo_app, ("polypseg demo-app", "polypseg demo-app --model starter --model runs/a/best")),
    (USE, "models", predict.models, ("polypseg models", "polypseg models --json")),
    (USE, "license", predict.license_, ("polypseg license starter", "polypseg license RN-HK-MC --json")),
    (USE, "verify", hub.verify, ("polypseg verify starter --run", "polypseg verify exported/rn-in-sl")),
    (
        EVALUATE,
        "evaluate",
        evaluate.evaluate,
        (
            "polypseg evaluate --model starter --dataset cvc_clinicdb --source CVC-ClinicDB",
            "polypseg evaluate --predictions masks/ --dataset folder --source my-frames --all-conventions",
        ),
    ),
    (
        EVALUATE,
        "estimate",
        estimate.estimate,
        ("polypseg estimate my-frames/", "polypseg estimate cvc_clinicdb --model starter --output estimate"),
    ),
    (
        EVALUATE,
        "calibrate",
        estimate.calibrate,
        (
            "polypseg calibrate frames/ masks/",
            "polypseg calibrate frames/ masks/ --clip '(.*)_[0-9]+' --output point.json",
        ),
    ),
    (
        EVALUATE,
        "adapt",
        estimate.adapt,
        (
            "polypseg adapt frames/ masks/ --clip '(.*)_[0-9]+' --output adapted",
            "polypseg adapt my-frames/ --model starter --output adapted",
        ),
    ),
    (
        EVALUATE,
        "check-receipts",
        evaluate.check_receipts,
        ("polypseg check-receipts model_cards/results", "polypseg check-receipts results --public-key key.pub"),
    ),
    (
        EVALUATE,
        "sign-receipts",
        evaluate.sign_receipts,
        ("polypseg sign-receipts results --key key.pem", "polypseg sign-receipts a.receipt.json --key key.pem"),
    ),
    (
        EVALUATE,
        "diagnose",
        evaluate.diagnose,
        ("polypseg diagnose 0.8231 0.7454", "polypseg diagnose 89.1 83.2 --images 100"),
    ),
    (
        EVALUATE,
        "robustness",
        predict.robustness,
        (
            "polypseg robustness --model starter --dataset kvasir_seg --split reference --part test",
            "polypseg robustness --model starter --dataset synthetic_b --corruption motion_blur --limit 20",
        ),
    ),
    (
        TRAIN,
        "finetune",
        train.finetune,
        (
            "polypseg finetune --model RN-IN-SL --encoder-weights timm:resnet50.tv_in1k --output runs/rn-in-sl",
            "polypseg finetune --model RN-NA-NA --dataset synthetic_a --recipe smoke --output runs/try",
        ),
    ),
    (
        TRAIN,
        "pretrain",
        train.pretrain,
        (
            "polypseg pretrain --recipe pretrain_mae_small --frames frames/ --output runs/mae",
            "polypseg pretrain --recipe pretrain_mae_small --frames frames/ --output runs/mae --resume",
        ),
    ),
    (
        TRAIN,
        "study",
        study.study,
        (
            "polypseg study --scale smoke --output runs/demo",
            "polypseg study --grid twelve_small --in-distribution kvasir_seg --output runs/grid --plan",
        ),
    ),
    (
        TRAIN,
        "report",
        study.report,
        (
            "polypseg report runs/grid/results --output report.html",
            "polypseg report results --source kvasir_seg=Kvasir-SEG",
        ),
    ),
    (
        TRAIN,
        "convert",
        hub.convert,
        (
            "polypseg convert checkpoint.pth.tar --inspect",
            "polypseg convert checkpoint.pth.tar --output converted",
        ),
    ),
    (
        PUBLISH,
        "export",
        hub.export,
        (
            "polypseg export runs/rn-in-sl/best --output exported/rn-in-sl",
            "polypseg export starter --format onnx --precision fp16 --output onnx",
        ),
    ),
    (
        PUBLISH,
        "push",
        hub.push,
        (
            "polypseg push exported/rn-in-sl --dry-run",
            "polypseg push --all exported --organisation my-lab --private",
        ),
    ),
    (
        PUBLISH,
        "export-space",
        predict.export_space,
        (
            "polypseg export-space --model starter --output space",
            "polypseg export-space --model me/model --trust-remote-code --output space",
        ),
    ),
)
"""Panel, name, function and examples of every command at the top."""

app = typer.Typer(
    help="Polyp segmentation whose behavior on other hospitals' data is known. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, name, function, examples in COMMANDS:
    app.command(name, rich_help_panel=panel, epilog="Examples:\n\n" + "\n\n".join(examples))(function)
app.add_typer(data.data_app, name="data", rich_help_panel=DATA)
app.add_typer(shift.shift_app, name="shift", rich_help_panel=EVALUATE)


def _print_version(value: bool) -> None:
    if value:
        from polypseg import __version__

        print(f"polypseg {__version__}")
        raise typer.Exit


@app.callback()
def before(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Polyp segmentation whose behavior on other hospitals' data is known. Not a medical device."""
    if quiet:
        import os

        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main() -> Any:
    """Entry point."""
    run_app(app)
