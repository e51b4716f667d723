"""The study's twelve models (arXiv 2405.15524) and extra ones, a row each; everything else is computed from a row.

Columns are the paper's: encoder, decoder, pretraining method, pretraining corpus. A row's pretraining weights decide
its license, its position embedding and its caveats, so they live in the row too. To add a model, add a row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polypseg.errors import unknown_name

if TYPE_CHECKING:
    from polypseg.modeling import PolypSegConfig

RANDOM = "random"
"""Tag of weights that no pretraining made, and the name of that start wherever weights are asked for."""
STARTERS = {f"tf_efficientnet_lite{n}": f"EfficientNet-Lite{n}, supervised on ImageNet-1k" for n in range(3)}
"""Encoders whose ImageNet-1k weights the `starter` extra brings, and what a record says of that start."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ENCODERS = {"resnet50": "resnet50", "vit_base": "vit_base_patch16_224"}
"""Short encoder name of a row -> timm architecture."""

METHODS = {
    "moco_v3": "MoCo v3",
    "barlow_twins": "Barlow Twins",
    "mae": "MAE",
    "supervised": "supervised",
    "none": "none (random initialization)",
}
CORPORA = {
    "imagenet1k": "ImageNet-1k",
    "imagenet1k_only": "ImageNet-1k and nothing before it",
    "hyperkvasir": "Hyperkvasir-unlabelled",
    "none": "none",
}
_LETTERS = {
    "resnet50": "RN", "vit_base": "VT", "imagenet1k": "IN", "hyperkvasir": "HK", "moco_v3": "MC",
    "barlow_twins": "BT", "mae": "MA", "supervised": "SL", "none": "NA", "imagenet1k_only": "IN1K",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Where the pretraining weights of a row come from and what they demand."""

    location: str
    """URL, timm id, or the folder in which the reference study publishes them; empty for random initialization."""
    file_format: str
    """What the file is: container and key layout."""
    license: str
    """SPDX-like identifier that the weights impose on whatever is derived from them."""
    license_source: str
    """Where that license is stated."""
    timm: str = ""
    """The same weights in timm's collection, if they are there: fetched by themselves at full scale."""


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One model of the study, or one beside it."""

    encoder: str
    decoder: str
    method: str
    corpus: str
    upstream: Upstream
    position_embedding: str = "learned"
    """Kind of a ViT's position embedding; see PolypSegConfig."""
    position_embedding_trainable: bool = True
    notes: str = ""
    """What a reader of the model's card must know."""

    @property
    def tag(self) -> str:
        """What the encoder was pretrained by and on: ``moco_v3_imagenet1k``, or ``random``."""
        return RANDOM if self.method == "none" else f"{self.method}_{self.corpus}"

    @property
    def model_id(self) -> str:
        """Identifier in timm's grammar, ``architecture.tag``: ``resnet50_deeplabv3plus.moco_v3_imagenet1k``."""
        return f"{self.encoder}_{self.decoder}.{self.tag}"

    @property
    def short_name(self) -> str:
        """The paper's abbreviation: ``RN-IN-MC``."""
        return "-".join(_LETTERS[key] for key in (self.encoder, self.corpus, self.method))

    @property
    def license(self) -> str:
        """The license that the pretraining weights impose on the model."""
        return self.upstream.license

    def config_fields(self) -> dict[str, Any]:
        """The fields of the model's PolypSegConfig. All rows see ImageNet statistics, as in the reference."""
        return {
            "encoder": ENCODERS[self.encoder],
            "decoder": self.decoder,
            "position_embedding": self.position_embedding,
            "position_embedding_trainable": self.position_embedding_trainable,
            "image_size": 224,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        }

    def config(self) -> "PolypSegConfig":
        """The configuration of the full-size model."""
        from polypseg.modeling import PolypSegConfig

        return PolypSegConfig(**self.config_fields())


_FB = "https://dl.fbaipublicfiles.com"
_DRIVE = "https://drive.google.com/drive/folders/19oZ5-L3_n2sANeGR9nO7c2CtEOr6Bq3s"
_NC = "cc-by-nc-4.0"
_MOCO_LICENSE = "https://github.com/facebookresearch/moco-v3/blob/main/LICENSE"
_MAE_LICENSE = "https://github.com/facebookresearch/mae/blob/main/LICENSE"
_STUDY_LICENSE = "README of https://github.com/ESandML/SSL4GIE (pretrained weights)"
_HYPERKVASIR = "Pretraining length of the published weights is stated for MoCo v3 ResNet50 only (100 epochs)."

# fmt: off
NOTHING = Upstream(location="", file_format="none", license="apache-2.0", license_source="LICENSE of this package")
MOCO_RN = Upstream(location=f"{_FB}/moco-v3/r-50-100ep/r-50-100ep.pth.tar", file_format="moco_v3: state_dict, module.base_encoder.*", license=_NC, license_source=_MOCO_LICENSE)  # noqa: E501
MOCO_VT = Upstream(location=f"{_FB}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", file_format="moco_v3: state_dict, module.base_encoder.*", license=_NC, license_source=_MOCO_LICENSE)  # noqa: E501
BARLOW  = Upstream(location=f"{_FB}/barlowtwins/ljng/resnet50.pth", file_format="torchvision ResNet50 keys, bare", license="mit", license_source="https://github.com/facebookresearch/barlowtwins/blob/main/LICENSE")  # noqa: E501
MAE_VT  = Upstream(location=f"{_FB}/mae/pretrain/mae_pretrain_vit_base.pth", file_format="mae: model, timm ViT keys", license=_NC, license_source=_MAE_LICENSE, timm="vit_base_patch16_224.mae")  # noqa: E501
SUP_RN  = Upstream(location="https://download.pytorch.org/models/resnet50-0676ba61.pth", file_format="torchvision ResNet50 keys with fc (timm resnet50.tv_in1k)", license="bsd-3-clause", license_source="https://github.com/pytorch/vision/blob/main/LICENSE", timm="resnet50.tv_in1k")  # noqa: E501
SUP_VT  = Upstream(location="timm/vit_base_patch16_224.augreg_in21k_ft_in1k", file_format="timm safetensors (augreg npz upstream)", license="apache-2.0", license_source="https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k_ft_in1k", timm="vit_base_patch16_224.augreg_in21k_ft_in1k")  # noqa: E501
IN1K_VT = Upstream(location="timm/vit_base_patch16_224.augreg_in1k", file_format="timm safetensors (augreg npz upstream)", license="apache-2.0", license_source="https://huggingface.co/timm/vit_base_patch16_224.augreg_in1k", timm="vit_base_patch16_224.augreg_in1k")  # noqa: E501
HK_MOCO = Upstream(location=_DRIVE, file_format="encoder state dict, strict", license=_NC, license_source=_STUDY_LICENSE)  # noqa: E501
HK_BT   = Upstream(location=_DRIVE, file_format="torchvision ResNet50 keys, bare", license=_NC, license_source=_STUDY_LICENSE)  # noqa: E501
HK_MAE  = Upstream(location=_DRIVE, file_format="mae: model, timm ViT keys", license=_NC, license_source=_STUDY_LICENSE)

_MOCO_POS = {"position_embedding": "sincos_moco_v3", "position_embedding_trainable": False}
_MAE_POS  = {"position_embedding": "sincos_mae", "position_embedding_trainable": False}
_RN, _VT = ("resnet50", "deeplabv3plus"), ("vit_base", "dpt")


def _row(architecture: tuple[str, str], method: str, corpus: str, upstream: Upstream, notes: str = "", **fields: Any) -> ZooEntry:  # noqa: E501
    encoder, decoder = architecture
    return ZooEntry(encoder=encoder, decoder=decoder, method=method, corpus=corpus, upstream=upstream, notes=notes, **fields)  # noqa: E501


ZOO: tuple[ZooEntry, ...] = (
    #    arch  method          corpus         weights
    _row(_RN, "moco_v3",      "hyperkvasir", HK_MOCO, "100 epochs at batch 1536."),
    _row(_RN, "barlow_twins", "hyperkvasir", HK_BT,   _HYPERKVASIR),
    _row(_RN, "moco_v3",      "imagenet1k",  MOCO_RN, "The 100-epoch weights, to match the Hyperkvasir run."),
    _row(_RN, "barlow_twins", "imagenet1k",  BARLOW,  "1000 epochs: pretraining length differs between methods."),
    _row(_RN, "supervised",   "imagenet1k",  SUP_RN,  "torchvision's first release (V1), not the V2 recipe."),
    _row(_RN, "none",         "none",        NOTHING),
    _row(_VT, "moco_v3",      "hyperkvasir", HK_MOCO, _HYPERKVASIR, **_MOCO_POS),
    _row(_VT, "mae",          "hyperkvasir", HK_MAE,  _HYPERKVASIR, **_MAE_POS),
    _row(_VT, "moco_v3",      "imagenet1k",  MOCO_VT, "300 epochs; the patch projection is the frozen random one.", **_MOCO_POS),  # noqa: E501
    _row(_VT, "mae",          "imagenet1k",  MAE_VT,  "1600 epochs: pretraining length differs between methods.", **_MAE_POS),  # noqa: E501
    _row(_VT, "supervised",   "imagenet1k",  SUP_VT,  "Saw ImageNet-21k before ImageNet-1k, although called ImageNet-1k; trained with mean = std = 0.5 and fed ImageNet statistics, as in the reference."),  # noqa: E501
    _row(_VT, "none",         "none",        NOTHING),
)
EXTRA: tuple[ZooEntry, ...] = (
    _row(_VT, "supervised", "imagenet1k_only", IN1K_VT, "Not one of the study's twelve. The study's VT-IN-SL saw ImageNet-21k first, so it differs from RN-IN-SL in its corpus too; this encoder (AugReg, 300 epochs) saw ImageNet-1k and nothing else. Trained with mean = std = 0.5 and fed ImageNet statistics, as VT-IN-SL is."),  # noqa: E501
)
"""Rows beside the study's, for comparisons that the twelve do not allow; "all models" never means these."""
# fmt: on


def rows() -> tuple[ZooEntry, ...]:
    """Every row: the study's twelve, then the extra ones."""
    return (*ZOO, *EXTRA)


def get(model_id: str) -> ZooEntry:
    """The row of ``model_id`` or of its short name (``RN-IN-MC``). Raises UsageError for another name."""
    for entry in rows():
        if model_id in (entry.model_id, entry.short_name):
            return entry
    raise unknown_name("model", model_id, [name for entry in rows() for name in (entry.model_id, entry.short_name)])
