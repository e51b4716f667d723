"""Polyp segmentation in the browser: one model, or two compared. For research only; not a medical device.

Reads ``models.json`` beside it and needs nothing but what ``requirements.txt`` lists.
"""

import ctypes
import json
import math
import re
from functools import lru_cache, wraps
from html import escape
from pathlib import Path
from threading import Lock

import cv2
import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

HERE = Path(__file__).resolve().parent
MODELS = {entry["title"]: entry for entry in json.loads((HERE / "models.json").read_text(encoding="utf-8"))}
EXAMPLES = [str(path) for path in sorted((HERE / "examples").glob("*.png"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIN_AREA = 64  # pixels; smaller regions are drawn but not counted
LARGEST = 20_000_000  # pixels of a frame
LARGEST_UPLOAD = "20mb"
FIRST, SECOND, BOTH = (0, 229, 255), (255, 214, 10), (255, 255, 255)
"""Cyan and yellow differ in hue and lightness for every kind of color vision, and from red mucosa."""

WARNING = (
    "<b>Research only. Not a medical device.</b> Do not use it for diagnosis, screening, treatment or the management "
    "of patients. A model can miss a polyp or outline what is none. Do not upload anything that identifies a patient."
)
WAITING = '<p class="hint">Drop a colonoscopy frame on the left, or choose one of the examples.</p>'
_busy = Lock()  # both tabs ask at once: the second finds the first's answer
_libc = ctypes.CDLL(None)
if hasattr(_libc, "malloc_trim"):  # glibc keeps a heap for each thread of the server: at most two
    _libc.mallopt(-8, 2)


class RefusedError(Exception):
    """What stands on the page in place of a result."""


def answered(show, outputs):
    """``show`` with the reason of a RefusedError in the first of so many outputs, and memory given back."""

    @wraps(show)
    def answer(*inputs):
        try:
            return show(*inputs)
        except RefusedError as reason:
            return f'<p class="refused" role="alert">{escape(str(reason))}</p>', *[None] * (outputs - 1)
        finally:
            getattr(_libc, "malloc_trim", id)(0)

    return answer


@lru_cache(maxsize=2)
def load_model(title):
    """The model of that title and its image processor; the two used last stay in memory."""
    entry = MODELS[title]
    local = (HERE / entry["id"]).is_dir()
    source = str(HERE / entry["id"]) if local else entry["id"]
    if entry["remote_code"] and not local and not re.fullmatch(r"[0-9a-f]{40}", entry["revision"] or ""):
        raise RefusedError(f"{title} brings its own code, which is run only at a full commit id: add its revision.")
    options = {} if local or not entry["revision"] else {"revision": entry["revision"]}
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **options)
        model, report = AutoModelForSemanticSegmentation.from_pretrained(
            source, trust_remote_code=bool(entry["remote_code"]), output_loading_info=True, **options
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys']))}")
    except Exception as error:  # no network, no such model, a damaged file, a missing package
        raise RefusedError(f"{title} could not be loaded: {first_line(error)}. Choose another model.") from error
    return model.to(DEVICE).eval(), processor


def first_line(error):
    """What to show of an error."""
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)


@lru_cache(maxsize=3)  # both tabs and their two models; a large frame takes 140 MB
def polyp_logits(title, pixels, width, height):
    """RGB bytes of a frame -> logits (height, width) at the frame's size, positive where a polyp is more likely."""
    frame = Image.frombytes("RGB", (width, height), pixels)
    with torch.inference_mode():
        model, processor = load_model(title)
        try:
            logits = model(**processor(images=[frame], return_tensors="pt").to(DEVICE)).logits.float().cpu()
        except Exception as error:
            raise RefusedError(f"{title} failed on this frame: {first_line(error)}.") from error
    if not logits.isfinite().all():  # no NaN is above a threshold: the app would say that there is no polyp
        raise RefusedError(f"{title} gives values that are no finite numbers for this frame: its files are damaged.")
    labels = {str(name).lower(): int(index) for index, name in model.config.id2label.items()}
    classes = logits.shape[1]
    if classes > 2 and "polyp" not in labels:
        raise RefusedError(f"{title} has {classes} classes and none is called polyp.")
    index = labels["polyp"] if classes > 2 else classes - 1
    polyp, others = logits[:, index], [other for other in range(classes) if other != index]
    if others:
        polyp = polyp - logits[:, others].amax(dim=1)
    return F.interpolate(polyp[None], size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


class FrameInput(gr.Image):
    """An image component that hands on what is wrong with an upload, where gradio would fail once for each output."""

    is_template = True  # drawn as gradio's own

    def preprocess(self, payload):
        try:
            if payload is not None and math.prod(Image.open(payload.path).size) > LARGEST:
                return RefusedError(f"The picture has more than {LARGEST // 1_000_000} megapixels: crop or shrink it.")
            return super().preprocess(payload)
        except Exception:
            return RefusedError("This file cannot be read as a picture: upload a JPEG or PNG of one frame.")


def predict(image, title, threshold):
    """A frame -> probability (H, W) and mask (H, W)."""
    if isinstance(image, RefusedError):
        raise image
    with _busy:
        logits = polyp_logits(title, image.tobytes(), *image.size)
    return 1 / (1 + np.exp(-logits)), logits > math.log(threshold / (1 - threshold))


def outline(pixels, mask, color, *, fill):
    """Draw a mask on RGB pixels (H, W, 3), which are changed: outline with a dark halo, filled with that opacity."""
    pixels[mask] = ((1 - fill) * pixels[mask] + fill * np.array(color)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(2, round(min(mask.shape) / 160))
    for line, shade in ((2 * width + 1, (0, 0, 0)), (width, color)):
        cv2.drawContours(pixels, contours, -1, shade, line, cv2.LINE_AA)


def count_lesions(mask):
    """Connected regions of at least MIN_AREA pixels."""
    areas = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    return int((areas >= MIN_AREA).sum())


def figures(**values):
    """A row of figures: what it is -> the value."""
    cells = "".join(f"<div><dt>{name.replace('_', ' ')}</dt><dd>{value}</dd></div>" for name, value in values.items())
    return f'<dl class="figures">{cells}</dl>'


def show_one(image, title, threshold):
    """-> figures, outline, mask, probability map."""
    if image is None:
        return WAITING, None, None, None
    probability, mask = predict(image, title, threshold)
    drawn = np.array(image)
    outline(drawn, mask, FIRST, fill=0.18)
    chart = cv2.applyColorMap((255 * probability).round().astype(np.uint8), cv2.COLORMAP_CIVIDIS)[:, :, ::-1]
    values = figures(
        share_of_the_frame=f"{100 * mask.mean():.1f} %",
        polyp_area=f"{mask.sum():,} px",
        **{f"lesions (&ge; {MIN_AREA} px)": count_lesions(mask)},
        highest_probability=f"{probability.max():.2f}",
    )
    empty = "" if mask.any() else '<p class="hint"><b>No polyp at this threshold.</b> That is no proof of absence.</p>'
    return values + empty, drawn, mask.astype(np.uint8) * 255, np.ascontiguousarray(chart)


def show_two(image, first, second, threshold, shown):
    """-> table, both outlines, disagreement; nothing is computed while the tab is hidden."""
    if not shown:
        return gr.skip(), gr.skip(), gr.skip()
    if image is None:
        return WAITING, None, None
    found = [predict(image, title, threshold) for title in (first, second)]
    rows, masks, drawn = [], [], np.array(image)
    for title, color, (probability, mask) in zip((first, second), (FIRST, SECOND), found, strict=True):
        outline(drawn, mask, color, fill=0)
        masks.append(mask)
        cells = (f"{100 * mask.mean():.1f} %", f"{mask.sum():,}", count_lesions(mask), f"{probability.max():.2f}")
        rows.append(f"<tr><th>{chip(color)}{escape(title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    (one, two), total = masks, int(sum(mask.sum() for mask in masks))
    difference = np.repeat((0.55 * np.array(image.convert("L")))[:, :, None], 3, axis=2).astype(np.uint8)
    for where, color in ((one & ~two, FIRST), (two & ~one, SECOND), (one & two, BOTH)):
        difference[where] = (0.35 * difference[where] + 0.65 * np.array(color)).astype(np.uint8)
    dice = f"{2 * (one & two).sum() / total:.3f}" if total else "both masks are empty"
    head = "".join(f"<th>{name}</th>" for name in ("model", "area", "px", "lesions", "max. prob."))
    return (
        f'<table class="pair"><tr>{head}</tr>{"".join(rows)}</table>'
        f'<p class="hint"><b>Agreement of the two masks (Dice): {dice}.</b> They differ on '
        f"{100 * (one ^ two).mean():.1f} % of the frame ({(one ^ two).sum():,} px). "
        "Agreement does not mean that either is right.</p>",
        drawn,
        difference,
    )


def chip(color):
    """A small square of that color."""
    return f'<span class="chip" style="background: rgb{color}"></span>'


def about(title):
    """License and origin of a model."""
    entry = MODELS[title]
    link = f'<a href="https://huggingface.co/{escape(entry["id"])}" target="_blank">{escape(entry["id"])}</a>'
    where = "a folder of this app" if (HERE / entry["id"]).is_dir() else link
    at = f" at {escape(entry['revision'][:12])}" if entry["revision"] else ""
    return (
        f'<div class="about"><b>License:</b> {escape(entry["licence"])}. <b>Origin:</b> {escape(entry["note"])} '
        f"<b>From:</b> {where}{at}.</div>"
    )


def about_two(first, second):
    """License and origin of both."""
    return "".join(f"{chip(c)}<b>{escape(t)}</b>{about(t)}" for c, t in ((FIRST, first), (SECOND, second)))


def panel(caption, *, height, min_width=140):
    """A picture with its caption above it, where it covers nothing."""
    with gr.Column(min_width=min_width):
        gr.HTML(f'<p class="caption">{caption}</p>')
        return gr.Image(
            show_label=False, interactive=False, format="png", height=height, buttons=["download", "fullscreen"]
        )


titles = list(MODELS)
with gr.Blocks(title="Polyp segmentation", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.HTML("<h1>Polyp segmentation</h1><p>Outlines polyps in colonoscopy frames.</p>", elem_id="head")
    gr.HTML(WARNING, elem_id="warning")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = FrameInput(
                label="Colonoscopy frame", type="pil", image_mode="RGB", sources=["upload", "clipboard"], height=290
            )
            gr.Examples(EXAMPLES, inputs=image, label="Examples: drawn by a program, no patients")
            threshold = gr.Slider(
                0.05, 0.95, value=0.5, step=0.05, label="Threshold", info="A pixel is polyp above this probability."
            )
        with gr.Column(scale=7, min_width=300), gr.Tabs():
            with gr.Tab("One model"):
                model = gr.Dropdown(titles, value=titles[0], label="Model")
                model_about = gr.HTML(about(titles[0]))
                result = gr.HTML(WAITING, elem_id="result")
                with gr.Row():
                    with gr.Column(scale=5, min_width=280):
                        drawn = panel("Outline at the threshold", height=360)
                    with gr.Column(scale=3, min_width=160):
                        mask = panel("Mask", height=160)
                        chart = panel('Probability: 0 <span class="scale"></span> 1', height=160)
            with gr.Tab("Compare two models") as pair_tab:
                with gr.Row():
                    first = gr.Dropdown(titles, value=titles[0], label="First model (cyan)", min_width=240)
                    second = gr.Dropdown(titles, value=titles[-1], label="Second model (yellow)", min_width=240)
                pair_result = gr.HTML(WAITING, elem_id="pair-result")
                with gr.Row():
                    pair_drawn = panel("Outlines at the threshold", height=300, min_width=260)
                    legend = ((FIRST, "first only"), (SECOND, "second only"), (BOTH, "both"))
                    names = " ".join(f"<span>{chip(color)}{name}</span>" for color, name in legend)
                    pair_difference = panel(names, height=300, min_width=260)
                pair_about = gr.HTML(about_two(titles[0], titles[-1]))
    shown = gr.State(False)
    one = (answered(show_one, 4), [image, model, threshold], [result, drawn, mask, chart])
    two = (answered(show_two, 3), [image, first, second, threshold, shown], [pair_result, pair_drawn, pair_difference])
    gr.on([image.change, threshold.change, model.change], *one, trigger_mode="always_last")
    gr.on([image.change, threshold.change, first.change, second.change], *two, trigger_mode="always_last")
    pair_tab.select(lambda: True, None, shown).then(*two)
    model.change(about, model, model_about)
    gr.on([first.change, second.change], about_two, [first, second], pair_about)

if __name__ == "__main__":
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"])
    demo.launch(theme=theme, css_paths=HERE / "style.css", footer_links=[], quiet=True, max_file_size=LARGEST_UPLOAD)
