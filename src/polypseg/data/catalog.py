"""The table of datasets: what each is, where it is published, how its files are laid out, what may be done with it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from polypseg.errors import unknown_name

CLIP_COLUMN = "sequence_id"
"""Of the sets whose frames are video clips: which clip a frame belongs to."""
CENTER_COLUMN = "centre"
"""Of the sets of several hospitals: which one a frame comes from."""
_PART = r"((train(ing)?|val(id|idation)?|test(ing)?)[ _-]?)?"
ANY_IMAGE_FOLDER = rf"{_PART}(images?|imgs?|original|frames)"
ANY_MASK_FOLDER = rf"{_PART}(masks?|ground[ _]?truths?|gt|labels?|annotations?|segmentations?)"
ANY_MASK_STEM = r"(?P<id>.+?)(_mask|_segmentation|_gt|_groundtruth|_label)?"
"""Folders and names of re-packed sets, tried after a set's own; of any case, with the parts of a split before them."""
MARKED_MASK_STEM = ANY_MASK_STEM.removesuffix("?")
"""How masks are told from images in one folder."""
EXPECTED_TREE = (
    "images/NAME.png with masks/NAME.png (or NAME_mask.png), the same below train/, val/ and test/, "
    "images/train/NAME.png with masks/train/NAME.png, or NAME.png beside NAME_mask.png in one folder"
)
_CLIP_ENDS = (
    25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317,
    342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612,
)  # fmt: skip
"""Last frame of each of CVC-ClinicDB's 29 video clips."""


def clinicdb_sequence(frame_id: str, path: str) -> str:
    """The clip, 1 to 29, of a CVC-ClinicDB frame; the frames 1 to 612 are numbered through."""
    frame = int(frame_id)
    return str(next((clip for clip, end in enumerate(_CLIP_ENDS, start=1) if frame <= end), "unknown"))


def polypgen_center(frame_id: str, path: str) -> str:
    """The center C1 to C6 from the folder (``images_C3``) or the file name (``C3_...``); else ``unknown``."""
    match = re.search(r"(?:^|[_/])(?:C|cent(?:re|er)[ _-]?)([1-6])(?=[_/]|$)", path, re.IGNORECASE)
    return f"C{match.group(1)}" if match else "unknown"


def parent_folder(frame_id: str, path: str) -> str:
    """The name of the folder that holds the file: HyperKvasir's class."""
    return path.split("/")[-2] if "/" in path else "unknown"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset. Folder patterns are regular expressions for a whole folder name, case-insensitive."""

    name: str
    title: str
    license: str
    """Terms in a line, as the publisher states them."""
    citation: str
    homepage: str
    count: int | None
    """Images of the complete set; None where any number is right."""
    image_folder: str = ".*"
    mask_folder: str | None = None
    """None for sets without masks."""
    mask_stem: str = r"(?P<id>.+)"
    """How a mask's file name (without suffix) contains the image's."""
    image_stem: str = r"(?P<id>.+)"
    """How an image's file name looks where images and masks lie in one folder; other files there are left out."""
    mask_values: str | None = None
    """Which values or colors of the published masks are polyp; None for gray above 127."""
    groups: dict[str, Callable[[str, str], str]] = field(default_factory=dict)
    """Extra columns: name -> function of (id, path)."""
    locations: tuple[str, ...] = ()
    """Names under which the set is looked for in the data folder."""
    url: str | None = None
    """Published archive; None where the set must be requested."""
    archive_size: int | None = None
    archive_sha256: str | None = None
    """As recorded independently by several public projects; None where no such record was found."""
    request: str = ""
    """How to get a set that has no public address."""
    may_be_republished: bool = False


_SIMULA = "https://datasets.simula.no/downloads"
_RESEARCH_ONLY = "research and education only; commercial use needs the owners' written permission"
OWN_FOLDER = "folder"
"""The dataset of the table that stands for anybody's own images and masks: two of that name may be two sets."""

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="kvasir_seg",
            title="Kvasir-SEG",
            license=_RESEARCH_ONLY,
            citation="Jha et al., Kvasir-SEG: A Segmented Polyp Dataset, MMM 2020",
            homepage="https://datasets.simula.no/kvasir-seg/",
            count=1000,
            image_folder="images",
            mask_folder="masks",
            locations=("Kvasir-SEG", "kvasir-seg", "kvasir_seg", "kvasir-seg.zip"),
            url=f"{_SIMULA}/kvasir-seg.zip",
            archive_size=46_227_172,
            archive_sha256="03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7",
        ),
        DatasetSpec(
            name="cvc_clinicdb",
            title="CVC-ClinicDB",
            license=_RESEARCH_ONLY,
            citation="Bernal et al., WM-DOVA maps for accurate polyp highlighting in colonoscopy, CMIG 43, 2015",
            homepage="https://polyp.grand-challenge.org/CVCClinicDB/",
            count=612,
            image_folder="Original",
            mask_folder="Ground Truth",
            groups={CLIP_COLUMN: clinicdb_sequence},
            locations=("CVC-ClinicDB", "CVC-ClinicDB.zip", "cvc_clinicdb"),
            request=(
                "Register at https://polyp.grand-challenge.org/CVCClinicDB/ and follow the download link there; "
                "extract the archive so that it holds the folders 'Original' and 'Ground Truth'."
            ),
        ),
        DatasetSpec(
            name="hyperkvasir_labelled",
            title="HyperKvasir labeled images",
            license="CC BY 4.0",
            citation="Borgli et al., HyperKvasir, Scientific Data 7:283, 2020",
            homepage="https://datasets.simula.no/hyper-kvasir/",
            count=10_662,
            groups={"class": parent_folder},
            locations=("labeled-images", "hyper-kvasir-labeled-images", "hyper-kvasir-labeled-images.zip"),
            url=f"{_SIMULA}/hyper-kvasir/hyper-kvasir-labeled-images.zip",
            archive_size=3_928_814_344,
            may_be_republished=True,
        ),
        DatasetSpec(
            name="hyperkvasir_unlabelled",
            title="HyperKvasir unlabeled images",
            license="CC BY 4.0",
            citation="Borgli et al., HyperKvasir, Scientific Data 7:283, 2020",
            homepage="https://datasets.simula.no/hyper-kvasir/",
            count=99_417,
            image_folder=".*",
            locations=(
                "unlabeled-images",
                "hyper-kvasir-unlabeled-images",
                "hyper-kvasir-unlabeled-images.zip",
            ),
            url=f"{_SIMULA}/hyper-kvasir/hyper-kvasir-unlabeled-images.zip",
            may_be_republished=True,
        ),
        DatasetSpec(
            name="hyperkvasir_segmented",
            title="HyperKvasir segmented images",
            license="CC BY 4.0 (the same images as Kvasir-SEG, whose terms are narrower)",
            citation="Borgli et al., HyperKvasir, Scientific Data 7:283, 2020",
            homepage="https://datasets.simula.no/hyper-kvasir/",
            count=1000,
            image_folder="images",
            mask_folder="masks",
            locations=(
                "segmented-images",
                "hyper-kvasir-segmented-images",
                "hyper-kvasir-segmented-images.zip",
            ),
            url=f"{_SIMULA}/hyper-kvasir/hyper-kvasir-segmented-images.zip",
        ),
        DatasetSpec(
            name="polypgen",
            title="PolypGen (single frames)",
            license="CC BY 4.0",
            citation="Ali et al., A multi-centre polyp detection and segmentation dataset, Scientific Data, 2023",
            homepage="https://www.synapse.org/Synapse:syn45200214",
            count=1537,
            image_folder=r"images(_C[1-6])?",
            mask_folder=r"masks(_C[1-6])?",
            mask_stem=r"(?P<id>.+?)(_mask)?",
            groups={CENTER_COLUMN: polypgen_center},
            locations=("PolypGen", "PolypGen2021_MultiCenterData_v3", "PolypGen2021_MultiCenterData_v3.zip"),
            request="Create an account, accept the terms at https://www.synapse.org/Synapse:syn45200214 and download.",
            may_be_republished=True,
        ),
        DatasetSpec(
            name="etis_larib",
            title="ETIS-LaribPolypDB",
            license=_RESEARCH_ONLY,
            citation="Silva et al., Toward embedded detection of polyps in WCE images, IJCARS 9, 2014",
            homepage="https://polyp.grand-challenge.org/EtisLarib/",
            count=196,
            image_folder="Original|ETIS-LaribPolypDB|images",
            mask_folder="Ground ?Truth|masks",
            mask_stem=r"p?(?P<id>\d+)",
            image_stem=r"(?P<id>\d+)",
            locations=("ETIS-LaribPolypDB", "ETIS-LaribPolypDB.zip"),
            request="Register at https://polyp.grand-challenge.org/EtisLarib/ and follow the download link there.",
        ),
        DatasetSpec(
            name="cvc_colondb",
            title="CVC-ColonDB",
            license=_RESEARCH_ONLY,
            citation="Bernal et al., Towards automatic polyp detection with a polyp appearance model, PR 45, 2012",
            homepage="http://vi.cvc.uab.es/colon-qa/cvccolondb/",
            count=380,
            image_folder="Original|CVC-ColonDB|images",
            mask_folder="Ground ?Truth|masks",
            mask_stem=r"p?(?P<id>\d+)",
            image_stem=r"(?P<id>\d+)",  # as published: N.tiff, its mask pN.tiff and a contour cpN.tiff in one folder
            locations=("CVC-ColonDB", "CVC-ColonDB.zip"),
            request="Request the set at http://vi.cvc.uab.es/colon-qa/cvccolondb/ (research use, by agreement).",
        ),
        DatasetSpec(
            name="neopolyp",
            title="BKAI-IGH NeoPolyp-Small",
            license="as its competition states; ask the owners before any other use",
            citation="Lan et al., NeoUNet: Towards Accurate Colon Polyp Segmentation and Neoplasm Detection, ISVC 2021",
            homepage="https://www.kaggle.com/competitions/bkai-igh-neopolyp",
            count=1000,
            image_folder="train|images",
            mask_folder="train_gt|masks",
            # Neoplastic red, other polyps green, in JPEG: both are polyp here. Count, colors and folders (train/train,
            # train_gt/train_gt) as the published code of several entrants to the competition reads them.
            mask_values="#ff0000,#00ff00",
            locations=("bkai-igh-neopolyp", "bkai-igh-neopolyp.zip", "neopolyp"),
            request="Join https://www.kaggle.com/competitions/bkai-igh-neopolyp, accept its rules and download.",
        ),
        DatasetSpec(
            name=OWN_FOLDER,
            title="a folder of images and masks",
            license="yours to state",
            citation="",
            homepage="",
            count=None,
            image_folder=ANY_IMAGE_FOLDER,
            mask_folder=ANY_MASK_FOLDER,
            mask_stem=ANY_MASK_STEM,
        ),
        *(
            DatasetSpec(
                name=f"synthetic_{camera}",
                title=f"synthetic frames, camera {camera.upper()}",
                license="Apache-2.0 (procedural images of this package; no patient data)",
                citation="",
                homepage="",
                count=None,
                mask_folder="masks",
            )
            for camera in ("a", "b")
        ),
    )
}


NEGATIVES = "negatives"
"""Test and dataset of a folder of frames without polyps."""
NEGATIVES_TITLE = "frames without polyps"


def title_of(name: str) -> str:
    """What results call a dataset; a set that is not in the table goes by its name."""
    return NEGATIVES_TITLE if name == NEGATIVES else DATASETS[name].title if name in DATASETS else name


def get_spec(name: str) -> DatasetSpec:
    """The row of a dataset. Raises UsageError for another name, with the closest one."""
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    return DATASETS[name]


@dataclass(frozen=True, kw_only=True)
class Population:
    """Whose images a dataset holds, as far as its publishers say."""

    site: str
    annotators: str
    unknown: str
    """What a reader might assume and nobody has stated."""
    caveats: tuple[str, ...] = ()
    reference: str = ""
    """Key in references.bib."""


_NO_PATIENTS = (
    "number, age, sex and origin of the patients, and which frames and endoscope belong to which patient, are not "
    "part of the set"
)


_BAERUM = "Bærum Hospital, Norway"


_HYPERKVASIR_LABELS = Population(
    site=_BAERUM,
    annotators="experienced endoscopists, as far as the set is labeled",
    unknown=_NO_PATIENTS,
    reference="borgli2020hyperkvasir",
)


POPULATIONS: dict[str, Population] = {
    "kvasir_seg": Population(
        site=_BAERUM,
        annotators="outlined by a medical doctor, checked by an experienced gastroenterologist",
        unknown=_NO_PATIENTS,
        caveats=(
            "Every frame shows a polyp: how a model behaves on frames without one cannot be learned from this set.",
            "Three pairs of frames are nearly identical; the study's split puts two of the pairs on both sides of "
            "train and test.",
        ),
        reference="jha2020kvasirseg",
    ),
    "cvc_clinicdb": Population(
        site="Hospital Clínic, Barcelona, Spain",
        annotators="Computer Vision Center, Barcelona",
        unknown=_NO_PATIENTS,
        caveats=(
            "The 612 frames are 29 video clips. Frames of a clip resemble each other: the set is closer to 29 "
            "independent observations than to 612, and an interval over its frames is too narrow.",
            "Every frame shows a polyp.",
        ),
        reference="bernal2015wmdova",
    ),
    "hyperkvasir_unlabelled": Population(
        site=f"{_BAERUM}, from which Kvasir-SEG comes too",
        annotators="none; the frames have no labels",
        unknown=_NO_PATIENTS,
        caveats=("Whether it holds frames of patients who are in Kvasir-SEG is not known here.",),
        reference="borgli2020hyperkvasir",
    ),
    "hyperkvasir_labelled": _HYPERKVASIR_LABELS,
    "hyperkvasir_segmented": _HYPERKVASIR_LABELS,
}


def population_of(spec: DatasetSpec) -> Population:
    """What is known of a dataset's patients; synthetic frames have none."""
    if is_synthetic(spec):
        return Population(
            site="none: procedural frames drawn by this package", annotators="exact by construction", unknown=""
        )
    unstated = Population(
        site="see the publisher",
        annotators="see the publisher",
        unknown="this package records nothing about the patients",
    )
    return POPULATIONS.get(spec.name, unstated)


def is_synthetic(spec: DatasetSpec) -> bool:
    """Whether a dataset is drawn by this package and shows no patient."""
    return is_synthetic_name(spec.name)


def is_synthetic_name(name: str) -> bool:
    """The same by the name, which is all that a receipt has of a dataset."""
    return name.startswith("synthetic_")


def may_be_public(spec: DatasetSpec) -> bool:
    """Whether a dataset's terms let anybody publish it again."""
    return spec.may_be_republished or is_synthetic(spec)
