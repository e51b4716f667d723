"""A Hub user without this package: plain transformers, run as a process of its own by the round-trip tests.

python tests/plain_client.py REPO REVISION TRUST INPUTS.npz OUTPUTS.npz

INPUTS: pixel_values (B, 3, H, W) float32 and frame (H, W, 3) uint8; OUTPUTS: logits, and the pipeline's polyp mask of
the frame. Importing polypseg is made impossible first.
"""

import sys
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline


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
    segment = pipeline("image-segmentation", model=repo, **options)
    masks = {answer["label"]: np.asarray(answer["mask"]) > 0 for answer in segment(frame)}
    empty = np.zeros(data["frame"].shape[:2], dtype=bool)
    np.savez(
        outputs,
        logits=logits.numpy(),
        half_logits=half_logits.numpy(),
        mask=masks.get("polyp", empty),
        background=masks.get("background", empty),
        seconds=loaded,
    )


if __name__ == "__main__":
    main()
