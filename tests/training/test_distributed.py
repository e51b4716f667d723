"""BatchNorm over two processes on CPU: outputs, running statistics and gradients of one process, in float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

import processes
from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.training.distributed import GlobalBatchNorm2d, synchronize_batchnorm

CONFIGS = {
    "resnet18": {"encoder": "resnet18", "decoder": "deeplabv3plus"},
    "tf_efficientnet_lite0": {"encoder": "tf_efficientnet_lite0", "decoder": "deeplabv3plus"},
    "vit": {"encoder": "vit_tiny_patch16_224", "decoder": "dpt"},
}


def loss_and_gradients(name: str, rows: slice, *, count: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = PolypSegConfig(**CONFIGS[name], decoder_channels=16, decoder_dropout=0.0)
    model = PolypSegForSemanticSegmentation(config).double()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.rand(4, 64, 64, dtype=torch.float64)
    wrapped = model
    if count > 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        wrapped = DistributedDataParallel(synchronize_batchnorm(model, Accelerator(cpu=True)))
        assert name == "vit" or any(isinstance(module, GlobalBatchNorm2d) for module in model.modules())
    # soft_dice_loss works in float32, so the loss of this test is written out in float64
    p = wrapped(pixel_values=x[rows]).logits[:, 1].sigmoid()
    loss = (1 - 2 * (p * y[rows]).sum((1, 2)) / (p.square() + y[rows].square()).sum((1, 2))).mean()
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    return gradients | dict(model.named_buffers())


def one_of_two(rank: int, folder: Path) -> None:
    processes.join_pair(rank, folder)
    for name in CONFIGS:
        result = loss_and_gradients(name, slice(2 * rank, 2 * rank + 2), count=2)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A folder with what two processes found, NAME.pt for each of CONFIGS."""
    return processes.run_pair(__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_gradients_of_one(name, two_processes):
    """The tolerance is 1e-9 of the largest gradient: rounding of float64, amplified by sixty BatchNorms."""
    two = torch.load(two_processes / f"{name}.pt", weights_only=True)
    one = loss_and_gradients(name, slice(0, 4), count=1)
    assert one.keys() == two.keys()
    scale = max(value.abs().max().item() for key, value in one.items() if "running" not in key)
    for key in one:
        bound = 1e-9 * (scale if "running" not in key else max(1.0, one[key].abs().max().item()))
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=bound, msg=key)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
