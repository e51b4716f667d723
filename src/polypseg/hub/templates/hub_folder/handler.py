"""Inference Endpoints: image in, the Hub's image-segmentation answer out. Research only, not a medical device."""

import base64
import io
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation


class EndpointHandler:
    """Loads the repository's own files, its model code included, once per endpoint."""

    def __init__(self, path: str = ""):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model, report = AutoModelForSemanticSegmentation.from_pretrained(
            path, trust_remote_code=True, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"the weights in {path} are not complete; missing: {', '.join(missing)}")
        self.name = path
        self.model = model.to(self.device).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")

    @torch.inference_mode()
    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """data["inputs"]: a PIL image, its bytes or their base64 text; data["parameters"]["threshold"]: 0.5 by default.

        Returns one entry a label: {"label", "score": mean probability of the label inside its mask or None where the
        mask is empty, "mask": base64 text of a PNG of the image's size, 0 or 255}. Raises ValueError for anything
        else and for outputs that are not finite.
        """
        image = _read_image(data.get("inputs"))
        threshold = float((data.get("parameters") or {}).get("threshold", 0.5))
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {threshold}")
        inputs = self.processor(images=[image], return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits.float()
        if not logits.isfinite().all():  # no NaN is above a threshold: the answer would be that there is no polyp
            raise ValueError(
                f"{self.name} gives values that are no finite numbers for this image: its files are damaged"
            )
        polyp = (logits[:, 1] - logits[:, 0])[:, None]
        polyp = F.interpolate(polyp, size=(image.height, image.width), mode="bilinear", align_corners=False)
        probability = polyp[0, 0].sigmoid().cpu()
        mask = probability > threshold
        return [_answer("background", 1 - probability, ~mask), _answer("polyp", probability, mask)]


def _read_image(inputs: Any) -> Image.Image:
    try:
        image = inputs
        if not isinstance(inputs, Image.Image):
            content = base64.b64decode(inputs, validate=True) if isinstance(inputs, str) else bytes(inputs)
            image = Image.open(io.BytesIO(content))
        if image.mode.startswith(("I", "F")):  # Pillow would clip them to white
            raise ValueError(f"more than 8 bits per channel (mode {image.mode}), convert it to 8")
        return image.convert("RGB")
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"inputs must be an image, its bytes or their base64 text: {error}") from error


def _answer(label: str, probability: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    picture = io.BytesIO()
    Image.fromarray(mask.numpy().astype("uint8") * 255).save(picture, format="PNG")
    score = float(probability[mask].mean()) if mask.any() else None
    return {"label": label, "score": score, "mask": base64.b64encode(picture.getvalue()).decode()}
