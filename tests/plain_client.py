"""A Hub user without this package: plain transformers, run as a process of its own by the round-trip tests.

python tests/plain_client.py REPO REVISION TRUST INPUTS.npz OUTPUTS.npz

INPUTS: pixel_values (B, 3, H, W) float32, frame (H, W, 3) uint8; OUTPUTS: logits of both weight files, and the masks
that pipeline("image-segmentation") gives of the frame: by itself, and with the processor of the evaluation, as the card
says. Importing polypseg is made impossible first.
"""

import sys
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline


def main() -> None:
    """Load by id, compute, segment."""
    sys.modules["polypseg"] = None  # type: ignore[assignment]
    repo, revision, trust, inputs, outputs = sys.argv[1:]
    options = {"revision": revision, "trust_remote_code": trust == "trust"}
    data = np.load(inputs)
    started = time.perf_counter()
    model = AutoModelForSemanticSegmentation.from_pretrained(repo, **options).eval()
    loaded = time.perf_counter() - started
    with torch.inference_mode():
        logits = model(torch.from_numpy(data["pixel_values"])).logits
    half = AutoModelForSemanticSegmentation.from_pretrained(repo, variant="fp16", dtype=torch.float16, **options)
    with torch.inference_mode():
        half_logits = half.float().eval()(torch.from_numpy(data["pixel_values"])).logits
    frame = Image.fromarray(data["frame"])
    masks = {}
    processor = AutoImageProcessor.from_pretrained(repo, backend="pil", revision=revision)
    for name, given in {"bare": {}, "evaluation": {"image_processor": processor}}.items():
        answers = pipeline("image-segmentation", model=repo, **given, **options)(frame)
        masks[name] = {answer["label"]: np.asarray(answer["mask"]) > 0 for answer in answers}
    empty = np.zeros(data["frame"].shape[:2], dtype=bool)
    np.savez(
        outputs,
        logits=logits.numpy(),
        half_logits=half_logits.numpy(),
        mask=masks["evaluation"].get("polyp", empty),
        background=masks["evaluation"].get("background", empty),
        bare_mask=masks["bare"].get("polyp", empty),
        seconds=loaded,
    )


if __name__ == "__main__":
    main()
