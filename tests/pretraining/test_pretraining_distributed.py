"""All three methods on two processes: loss and gradients of one process with the whole batch, in float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

import processes
from polypseg.pretraining.barlow_twins import BarlowTwins
from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.moco_v3 import MoCoV3
from polypseg.training.distributed import gather_rows, process_count, process_index, synchronize_batchnorm

CASES = ("moco_v3-cnn", "moco_v3-vit", "barlow_twins-cnn", "mae-vit")


def build(case: str) -> torch.nn.Module:
    name, family = case.split("-")
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet" if family == "cnn" else "test_vit")
    if name == "moco_v3":
        return MoCoV3(encoder, hidden_width=32, output_width=16, temperature=0.2)
    if name == "barlow_twins":
        return BarlowTwins(encoder, projector_width=32)
    return MAE(encoder, image_size=64, decoder_width=16, decoder_depth=1, decoder_heads=2)


def loss_and_gradients(case: str, rows: slice) -> dict[str, torch.Tensor]:
    """Two steps of gradient, so that parameters behind zero gains have one too; the loss is the second step's."""
    torch.set_num_threads(1)
    method = build(case).double().train()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(8, method.views, 3, 64, 64, generator=generator, dtype=torch.float64)
    inputs = [views[rows]]
    if isinstance(method, MAE):
        inputs.append(torch.rand(8, method.patches, generator=generator)[rows])
    wrapped = method
    if process_count() > 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        wrapped = DistributedDataParallel(synchronize_batchnorm(method, Accelerator(cpu=True)))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        method.start_step(0.5)
        loss = wrapped(*inputs).loss
        loss.backward()
        if _ == 0:
            optimizer.step()
    mean = gather_rows(loss.detach()[None]).mean()
    gradients = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    return {"loss": mean} | gradients | dict(method.named_buffers())


def one_of_two(rank: int, folder: Path) -> None:
    processes.join_pair(rank, folder)
    assert process_count() == 2 and process_index() == rank
    for case in CASES:
        result = loss_and_gradients(case, slice(4 * rank, 4 * rank + 4))
        if rank == 0:
            torch.save(result, folder / f"{case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A folder with what two processes found, CASE.pt for each of CASES."""
    return processes.run_pair(__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_loss_and_gradients_of_one(case, two_processes):
    """The tolerance is 1e-9 of the largest value of its kind; timm interpolates position tables in float32: 1e-6."""
    two = torch.load(two_processes / f"{case}.pt", weights_only=True)
    one = loss_and_gradients(case, slice(0, 8))
    assert one.keys() == two.keys()
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-9)
    largest = max(value.abs().max().item() for key, value in one.items() if "running" not in key and key != "loss")
    for key in one:
        scale = max(1.0, one[key].abs().max().item()) if "running" in key or "tracked" in key else largest
        bound = 1e-6 if key == "encoder.pos_embed" else 1e-9
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=bound * scale, msg=key)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
