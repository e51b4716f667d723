"""What transformers' own tests ask of every model class, and what its tools do with this one.

The wheels of transformers do not bring its ``ModelTesterMixin``: these are the same questions, asked by our own code.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from marks import first_fast
from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.inference.model import build_image_processor

SIDE = 64
PAIRS = {
    "cnn": {"encoder": "test_resnet", "decoder": "deeplabv3plus"},
    "vit": {"encoder": "test_vit", "decoder": "dpt"},
    "cnn_dpt": {"encoder": "test_resnet", "decoder": "dpt"},
    "vit_deeplabv3plus": {"encoder": "test_vit", "decoder": "deeplabv3plus"},
}


def config_of(name: str) -> PolypSegConfig:
    return PolypSegConfig(**PAIRS[name], decoder_channels=8, image_size=SIDE)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=drawn),
        "labels": torch.rand(batch, SIDE, SIDE, generator=drawn).round(),
    }


@pytest.fixture(params=PAIRS)
def model(request: pytest.FixtureRequest) -> PolypSegForSemanticSegmentation:
    torch.manual_seed(0)
    return PolypSegForSemanticSegmentation(config_of(request.param)).eval()


@pytest.fixture
def folder(model: PolypSegForSemanticSegmentation, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    build_image_processor(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(network: Any, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(**(inputs() | changes)).logits
    return result


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Some CPUs' kernels depend on where tensors lie in memory: observed 1e-6."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# -- what ModelTesterMixin asks --------------------------------------------------------------------------


def test_signature_begins_with_the_main_input(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[:2] == [model.main_input_name, "labels"] and model.main_input_name == "pixel_values"


def test_the_same_input_gives_the_same_output_and_frames_do_not_mix(model):
    assert_same(logits(model), logits(model))
    pixels = inputs()["pixel_values"]
    alone = torch.cat([logits(model, pixel_values=frame[None], labels=None) for frame in pixels])
    assert_same(alone, logits(model))


def test_a_copy_and_a_state_dict_carry_the_whole_model(model):
    other = PolypSegForSemanticSegmentation(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for one in (other, copy.deepcopy(model)):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in one.state_dict().items())
        assert_same(logits(one), logits(model))
    assert not list(model._tied_weights_keys or ())


@pytest.mark.parametrize("dtype", first_fast([torch.bfloat16, torch.float16]))
def test_half_precision_is_loaded_and_computed(model, folder, dtype):
    half = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype} and half.dtype == dtype
    with torch.no_grad():
        output = half(inputs()["pixel_values"].to(dtype), labels=inputs()["labels"])
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32 and output.logits.isfinite().all()
    whole = logits(model)
    assert (output.logits.float() - whole).abs().max() < 0.1 * (1 + whole.abs().max())
    assert AutoModelForSemanticSegmentation.from_pretrained(folder, dtype="auto").dtype == torch.float32
    half.save_pretrained(folder.parent / "half")
    again = AutoModelForSemanticSegmentation.from_pretrained(folder.parent / "half", dtype="auto")
    assert again.dtype == dtype


def test_device_map_and_shards_load_the_same_model(model, folder):
    mapped = AutoModelForSemanticSegmentation.from_pretrained(folder, device_map="auto").eval()
    assert_same(logits(mapped).cpu(), logits(model))
    model.save_pretrained(folder.parent / "shards", max_shard_size="50KB")
    assert len(list((folder.parent / "shards").glob("*.safetensors"))) > 1
    assert_same(logits(AutoModelForSemanticSegmentation.from_pretrained(folder.parent / "shards")), logits(model))


def test_hidden_states_keep_their_gradients(model):
    output = model(**inputs(), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.loss.backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in output.hidden_states)


def test_outputs_are_resized_to_each_frame(model, folder):
    processor = build_image_processor(model.config)
    sizes = [(48, 80), (100, 60)]
    with torch.no_grad():
        output = model(inputs()["pixel_values"])
    maps = processor.post_process_semantic_segmentation(output, target_sizes=sizes)
    assert [tuple(found.shape) for found in maps] == sizes and {int(v) for m in maps for v in m.unique()} <= {0, 1}


# -- what its tools do with the class --------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", first_fast([True, False]))
@pytest.mark.parametrize("name", first_fast(["vit", "cnn"]))
def test_trainer_takes_two_steps_and_its_checkpoint_loads(name, checkpointing, tmp_path):
    torch.manual_seed(0)
    network = PolypSegForSemanticSegmentation(config_of(name))
    before = copy.deepcopy(network.state_dict())
    rows = [{key: value[index] for key, value in inputs(4).items()} for index in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
    )
    trainer = Trainer(model=network, args=arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    assert 0 < trainer.train().training_loss < 2
    assert 0 < trainer.evaluate()["eval_loss"] < 2
    moved = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("encoder.") for key in moved) and any(key.startswith("decoder.") for key in moved)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert_same(logits(loaded), logits(network.eval()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_exported_and_traced_graphs_compute_the_same(name):
    network = PolypSegForSemanticSegmentation(config_of(name)).eval()
    pixels = inputs()["pixel_values"]
    exported = torch.export.export(network, (), {"pixel_values": pixels}, strict=False).module()
    assert_same(exported(pixel_values=pixels).logits, logits(network, labels=None))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_same(logits(compiled, labels=None), logits(network, labels=None))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_adapters_train_and_are_merged(name, checkpointing):
    peft = pytest.importorskip("peft")
    network = PolypSegForSemanticSegmentation(config_of(name))
    if checkpointing:
        network.gradient_checkpointing_enable()
    kind: Any = torch.nn.Linear if name == "vit" else torch.nn.Conv2d
    layers = {key: layer for key, layer in network.encoder.named_modules() if isinstance(layer, kind)}
    # peft's adapters of convolutions do not know dilation, which the deepest stage has.
    chosen = [key for key, layer in layers.items() if getattr(layer, "dilation", (1, 1)) == (1, 1)][-2:]
    targets = [f"encoder.{key}" for key in chosen]
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["decoder"]))
    trained = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("lora_" in key for key in trained) and any("decoder" in key for key in trained)
    adapted(**inputs()).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    merged = adapted.eval().merge_and_unload()
    assert isinstance(merged, PolypSegForSemanticSegmentation) and logits(merged).isfinite().all()
