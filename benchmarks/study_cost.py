"""What the full study should cost: optimizer steps, images, FLOPs, GPU hours and memory of every full-size recipe.

python benchmarks/study_cost.py --output docs/full_study_cost.csv

Steps, images and FLOPs are exact counts. Hours and memory are estimates, not measurements: hours are FLOPs over the
peak rate of one A100 at the utilizations of ``UTILIZATION``, which published runs bracket (``--anchors`` recomputes
them); memory is what autograd keeps for the backward pass, with parameters, gradients and optimizer state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from typer import Option

from polypseg import zoo
from polypseg.cli.console import run_script
from polypseg.data.catalog import DATASETS
from polypseg.files import write_csv
from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.loop import build_method
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.provenance.origin import STUDY_TRAINING_IMAGES
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model

PRETRAINING = (
    "pretrain_moco_v3_resnet50",
    "pretrain_barlow_twins_resnet50",
    "pretrain_moco_v3_vit_base",
    "pretrain_mae_vit_base",
)
FINETUNING = {"finetune, ResNet50 + DeepLabV3+": "RN-NA-NA", "finetune, ViT-B + DPT": "VT-NA-NA"}
"""Name in the table -> a row of the architecture; the six rows of an architecture cost the same."""
PEAK = {"A100": 312e12, "V100": 125e12}
"""Dense float16 tensor-core FLOP/s, by the maker's data sheets."""
UTILIZATION = (0.05, 0.20)
"""Shares of the peak, low and high: about those of the Barlow Twins authors' run and of NVIDIA's tuned ResNet-50."""
GPUS = 8
"""Over which the table shares a batch."""
IMAGENET_TRAIN = 1_281_167


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """One image's share of a forward and backward pass."""

    flops: float
    """Multiplications and additions counted apart."""
    kept_bytes: float
    """What autograd keeps for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published training run: what it says of the rate that a GPU reaches."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], dict[str, Tensor]]
    images_per_gpu_second: float
    gpu: str
    address: str


def convolution_backward_flops(
    gradient: list[int],
    images: list[int],
    weight: list[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    **_: Any,
) -> int:
    """As much as the forward pass for each wanted gradient; torch's own count forgets the groups of the weights'."""
    positions = images if transposed else gradient
    forward = 2 * positions[0] * torch.Size(positions[2:]).numel() * torch.Size(weight).numel()
    return forward * sum(wanted[:2])


def attention_flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """The CPU's fused attention, which torch's counter does not know, as it counts the others."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    gradient: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any
) -> int:
    """Four products and the scores once more."""
    return sdpa_backward_flop_count(gradient, query, key, value)


COUNTS = {
    torch.ops.aten.convolution_backward: convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def pass_cost(
    module: nn.Module, inputs: Callable[[nn.Module, int], dict[str, Tensor]], *, half: bool = True
) -> PassCost:
    """Run forward and backward on tensors without content, at 2 and 4 images: the difference is what an image costs.

    ``half``: under bfloat16 autocast of the CPU, which keeps less than a GPU's; otherwise in float32, which keeps more.
    """
    (flops_2, kept_2), (flops_4, kept_4) = (_run_empty(module, inputs, images=n, half=half) for n in (2, 4))
    return PassCost(flops=(flops_4 - flops_2) / 2, kept_bytes=(kept_4 - kept_2) / 2)


def _run_empty(
    module: nn.Module, inputs: Callable[[nn.Module, int], dict[str, Tensor]], *, images: int, half: bool
) -> tuple[int, int]:
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with saving, torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = module(**inputs(module, images)).loss
        loss.backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(x.untyped_storage().nbytes() for x in kept.values())


def view_inputs(method: nn.Module, images: int, *, size: int = 224) -> dict[str, Tensor]:
    """What a pretraining method takes."""
    views: Any = method.views
    inputs = {"views": torch.randn(images, views, 3, size, size)}
    return inputs | ({"noise": torch.rand(images, method.patches)} if isinstance(method, MAE) else {})


def pair_inputs(model: nn.Module, images: int, *, size: int = 224) -> dict[str, Tensor]:
    """What a segmentation model takes."""
    return {"pixel_values": torch.randn(images, 3, size, size), "labels": torch.rand(images, size, size)}


class Classifier(nn.Module):
    """A supervised classifier, for the published throughput of one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = build_encoder("resnet50"), nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Any:
        """images (B, 3, 224, 224) -> an object with the loss."""
        return type("Output", (), {"loss": self.head(self.encoder(images)).logsumexp(1).mean()})


def published_anchors() -> list[Anchor]:
    """The runs that ``UTILIZATION`` leans on, with where each is reported."""
    return [
        Anchor(
            name="Barlow Twins, ResNet50, 1000 epochs of ImageNet: 7 days on 16 V100",
            build=lambda: build_method(load_pretraining_recipe("pretrain_barlow_twins_resnet50")),
            inputs=view_inputs,
            images_per_gpu_second=1000 * IMAGENET_TRAIN / (7 * 86400 * 16),
            gpu="V100",
            address="https://github.com/facebookresearch/barlowtwins (README)",
        ),
        Anchor(
            name="MAE, ViT-L, 800 epochs of ImageNet: 42 h on 64 V100",
            build=lambda: MAE(build_encoder("vit_large_patch16_224")),
            inputs=view_inputs,
            images_per_gpu_second=800 * IMAGENET_TRAIN / (42 * 3600 * 64),
            gpu="V100",
            address="https://github.com/facebookresearch/mae (PRETRAIN.md)",
        ),
        Anchor(
            name="MoCo v3, ViT-B, read as 100 epochs of ImageNet: 24 h on 128 GPUs, read as V100",
            build=lambda: build_method(load_pretraining_recipe("pretrain_moco_v3_vit_base")),
            inputs=view_inputs,
            images_per_gpu_second=100 * IMAGENET_TRAIN / (24 * 3600 * 128),
            gpu="V100",
            address="https://arxiv.org/abs/2104.02057 (section 6, training time)",
        ),
        Anchor(
            name="supervised ResNet50, tuned by NVIDIA: 16621 images/s on 8 A100",
            build=Classifier,
            inputs=lambda _, images: {"images": torch.randn(images, 3, 224, 224)},
            images_per_gpu_second=16621 / 8,
            gpu="A100",
            address="https://github.com/NVIDIA/DeepLearningExamples (PyTorch/Classification/ConvNets/resnet50v1.5)",
        ),
    ]


def recipe_counts(name: str) -> tuple[int, int]:
    """Optimizer steps of a recipe on the study's data, and the images of a step."""
    if name in FINETUNING:
        training: Any = load_recipe("finetune").training
        available: int = STUDY_TRAINING_IMAGES
    else:
        training = load_pretraining_recipe(name).training
        available = DATASETS["hyperkvasir_unlabelled"].count or 0
    return training.epochs * (available // training.total_batch_size), training.total_batch_size


def cost_row(name: str) -> dict[str, Any]:
    """One line of the table. Sizes are in 10^9 bytes, hours in GPU hours; low and high bracket the estimate."""
    steps, batch = recipe_counts(name)
    module, inputs, fixed = _full_size(name)
    half, single = (pass_cost(module, inputs, half=half) for half in (True, False))
    total = steps * batch * half.flops
    rates = [PEAK["A100"] * share for share in UTILIZATION]
    row: dict[str, Any] = {
        "recipe": name,
        "steps": steps,
        "batch": batch,
        "images": steps * batch,
        "gflops_per_image": round(half.flops / 1e9, 1),
        "a100_hours_low": round(total / rates[1] / 3600, 2),
        "a100_hours_high": round(total / rates[0] / 3600, 2),
        "images_per_gpu_second_at_low": round(rates[1] / half.flops),
    }
    for gpus in (1, GPUS):
        for bound, cost in (("low", half), ("high", single)):
            size = (batch // gpus * cost.kept_bytes + fixed) / 1e9
            row[f"memory_gb_{bound}_on_{gpus}"] = round(size, 1)
    return row


def _full_size(name: str) -> tuple[nn.Module, Callable[[nn.Module, int], dict[str, Tensor]], int]:
    """The module in training mode, what it takes, and the bytes of what does not grow with the batch."""
    if name in FINETUNING:
        model = build_model(zoo.get(FINETUNING[name]), load_recipe("finetune")).train()
        return model, pair_inputs, _fixed_bytes(model, states=2)
    recipe = load_pretraining_recipe(name)
    method = build_method(recipe).train()
    states = 1 if recipe.optimiser.kind == "lars" else 2
    return method, view_inputs, _fixed_bytes(method, states=states)


def _fixed_bytes(module: nn.Module, *, states: int) -> int:
    """Parameters and, for what trains, gradient, the copy of it that processes exchange, and the optimizer's states."""
    everything = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 4 * (everything + trained * (2 + states))


def cost_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a reader, from the rows of the CSV file, with the sum of four pretrainings and twelve trainings."""
    lines = [
        "| recipe | steps x batch | images | GFLOPs an image | A100 hours | GB on 1 GPU | GB on 8 | images/s at 20 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = [f"{row[f'memory_gb_low_on_{n}']} to {row[f'memory_gb_high_on_{n}']}" for n in (1, GPUS)]
        cells = [
            row["recipe"],
            f"{int(row['steps']):,} x {row['batch']}",
            f"{int(row['images']):,}",
            row["gflops_per_image"],
            f"{row['a100_hours_low']} to {row['a100_hours_high']}",
            *memory,
            row["images_per_gpu_second_at_low"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    low, high = (
        sum(float(row[f"a100_hours_{bound}"]) * (6 if row["recipe"] in FINETUNING else 1) for row in rows)
        for bound in ("low", "high")
    )
    return "\n".join([*lines, f"| sum of 4 + 12 runs | | | | {low:.0f} to {high:.0f} | | | |"])


def main(
    output: Annotated[Path, Option(help="The table.")] = Path("docs/full_study_cost.csv"),
    anchors: Annotated[bool, Option("--anchors", help="Only print what published runs reach, by the same count.")] = (
        False
    ),
) -> None:
    """What the full study should cost, as counted and estimated from the recipes."""
    if anchors:
        for anchor in published_anchors():
            flops = pass_cost(anchor.build().train(), anchor.inputs).flops
            rate = flops * anchor.images_per_gpu_second
            share = rate / PEAK[anchor.gpu]
            print(f"{anchor.name}: {flops / 1e9:.1f} GFLOPs an image, {rate / 1e12:.1f} TFLOP/s, {share:.1%} of peak")
            print(f"  {anchor.address}")
        return
    rows = [cost_row(name) for name in (*PRETRAINING, *FINETUNING)]
    write_csv(output, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    run_script(main)
