"""Decoding of frames and masks, the same way everywhere: RGB frames, masks 0/1 after gray > 127.

One reader looks at what a file is, not at what it is called, and undoes the file's own coding (palette, CMYK, YCbCr,
LAB, white as zero, 1 to 16 bits), as viewers do. What it cannot know it refuses by name: values that may be class
numbers (``MaskValues`` says which of them are polyp), more than 8 bits in a frame, several pages, too many pixels.
"""

import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from polypseg.errors import PolypSegError, UsageError

MASK_THRESHOLD = 127  # JPEG and resampled masks are not binary; nonzero would grow them by up to 9 % Dice
MAX_PIXELS = 64_000_000
"""Largest image read, in pixels (8K video has 33 million); the environment variable POLYPSEG_MAX_PIXELS changes it."""
_PILLOWS_LIMIT = 178_956_970  # Pillow itself refuses more, and lifting its limit would change the caller's process
_LONGEST_SIDE = 1_000_000  # a header that says more is damaged
_CODED_EXACTLY = 16  # colors up to which a lossless mask is a coded one, in which colors are matched exactly
_FLAT = np.ones((7, 7), np.uint8)  # antialiased edges and JPEG's ringing hold no area of one value of this size
_DARK, _BRIGHT = 32, 224  # below and from here on, areas may be noise on black or white
_STRAY = 3  # dark values without an area that tell noise from numbers: CVC-ClinicDB's 19 masks of such noise have 6
_BLACK_IN_JPEG = 4  # low qualities store black as a constant up to this
_DARK_IN_JPEG = 18  # and leave areas of up to 16 beside soft edges
_COMPRESSED_TO_RGB = (6, 7, 33007, 34892)  # TIFF's JPEG compressions: their decoder returns RGB
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
"""First bytes of zip, gzip, bzip2, xz, 7z and rar files."""


class _RefusedError(PolypSegError):
    """A file that can be decoded but not understood."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A decoded file. Exactly one of ``image`` and ``deep`` is set."""

    image: Image.Image | None = None
    """8 bits per channel, in any mode of Pillow."""
    deep: NDArray[Any] | None = None
    """(H, W) or (H, W, C) values as stored where a channel has more than 8 bits, or whole or real numbers."""
    white: int = 255
    """The stored value that stands for white: 1 for 1 bit, 15 for 4 bits, 65535 for 16; 0 where nothing says so."""
    lossless: bool = True


@dataclass(frozen=True, kw_only=True)
class MaskValues:
    """Which stored values, or which colors, of a mask file are polyp; everything else is background.

    Values are those in the file: gray levels before any scaling, or a palette's indices.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    """First and last value of each range, both included."""
    colors: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "MaskValues":
        """From ``1``, ``1,2,5``, ``1-6``, ``128-255`` or colors: ``#ff0000,#00ff00``; UsageError for anything else."""
        ranges, colors = [], []
        for word in (word.strip() for word in text.split(",")):
            if re.fullmatch(r"#[0-9a-fA-F]{6}", word):
                colors.append((int(word[1:3], 16), int(word[3:5], 16), int(word[5:7], 16)))
            elif found := re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", word):
                ranges.append((int(found[1]), int(found[2] or found[1])))
            else:
                raise UsageError(f"mask values {text!r}: give values such as 1,2 or 1-6, or colors such as '#ff0000'")
        if ranges and colors:
            raise UsageError(f"mask values {text!r}: give either values or colors")
        if any(first > last for first, last in ranges):
            raise UsageError(f"mask values {text!r}: a range runs from the lower to the higher value")
        return cls(ranges=tuple(sorted(set(ranges))), colors=tuple(sorted(set(colors))))

    def __str__(self) -> str:
        words = [f"{first}" if first == last else f"{first}-{last}" for first, last in self.ranges]
        return ",".join(words + ["#{:02x}{:02x}{:02x}".format(*color) for color in self.colors])


# Opening -----------------------------------------------------------------------------------------------


def max_pixels() -> int:
    """The largest image read, in pixels. Raises UsageError for a POLYPSEG_MAX_PIXELS that is no such number."""
    text = os.environ.get("POLYPSEG_MAX_PIXELS", "")
    if not text:
        return MAX_PIXELS
    if not re.fullmatch(r"\d{1,12}", text) or not 0 < int(text) <= _PILLOWS_LIMIT:
        raise UsageError(f"POLYPSEG_MAX_PIXELS is a number of pixels from 1 to {_PILLOWS_LIMIT}; got {text!r}")
    return int(text)


def check_pixels(width: int, height: int, *, name: str) -> None:
    """Raise PolypSegError for an image of more pixels than ``max_pixels``: before it is decoded, whatever it takes."""
    limit = max_pixels()
    if max(width, height) > _LONGEST_SIDE:
        raise _RefusedError(
            f"{name} is truncated or not an image (its header says {width}x{height} pixels): download it again or "
            "remove it"
        )
    if width * height > limit:
        raise _RefusedError(
            f"{name} is too large to be a frame: {width}x{height} pixels, and the limit is {limit:,}. "
            "Reduce it, or raise the limit with the environment variable POLYPSEG_MAX_PIXELS"
        )


def is_tiff(data: bytes) -> bool:
    """Whether these are the bytes of a TIFF, whatever the file is called."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_picture(data: bytes, *, name: str, load: bool = True) -> Image.Image:
    """The PIL image of a file that is no TIFF, of a size that may be decoded and of one picture.

    With ``load=False`` only its header is read. Raises what Pillow raises for a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is stated and checked below
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise _RefusedError(f"{name} is too large to be a frame: {error}") from error
    check_pixels(*image.size, name=name)
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1 and image.format not in ("MPO", "PSD"):  # a photo with its preview, and a drawing with its layers
        raise _RefusedError(f"{name} has {pictures} pages: save each page as an image of its own")
    if load:
        image.load()
    return image


def _open(data: bytes, name: str) -> _Picture:
    try:
        if is_tiff(data):
            return _open_tiff(data, name)
        return _open_other(data, name)
    except PolypSegError:
        raise
    except UnidentifiedImageError as error:  # its text holds an address of memory
        if data.startswith(_ARCHIVES) or data[257:262] == b"ustar":
            raise PolypSegError(f"{name} is an archive, not an image: extract it and give what comes out") from error
        raise PolypSegError(
            f"{name} is truncated or not an image (no known format): download it again or remove it"
        ) from error
    except Exception as error:  # damaged files fail in a dozen ways: TypeError, MemoryError, the codecs' own errors
        raise PolypSegError(f"{name} is truncated or not an image ({error}): download it again or remove it") from error


def _open_other(data: bytes, name: str) -> _Picture:
    image = open_picture(data, name=name)
    lossless = image.format not in ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
    bits = _bits(image, data)
    if bits <= 8:
        return _Picture(image=image, white=(1 << bits) - 1 if lossless else 255, lossless=lossless)
    if image.format == "PNG" and image.mode not in ("I;16", "I"):  # Pillow has dropped the lower 8 bits
        import cv2  # late: a first mask of a JPEG must not wait for it

        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 3:
            raise _RefusedError(f"{name} has more than 8 bits per channel: convert it to 8")
        order = [2, 1, 0, 3][: pixels.shape[2]]
        return _Picture(deep=pixels[:, :, order], white=65535)
    if image.mode not in ("I;16", "I;16L", "I;16B", "I", "F"):
        raise _RefusedError(f"{name} has more than 8 bits per channel: convert it to 8")
    deep = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # Pillow spreads PGM's values over 16 bits
        deep = deep.astype(np.uint16)
    return _Picture(deep=deep, white=65535 if deep.dtype == np.uint16 else 0, lossless=lossless)


_MODES = {"1": "black and white", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha"}


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of the file, which Pillow's mode does not tell: it reduces 16-bit colors to 8 in silence."""
    if image.mode.startswith("I") or image.mode == "F":
        return 16 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else 32
    if image.format == "PNG":
        return 8 if image.mode in ("P", "PA") else data[24]
    if image.format == "PPM" and data[:2] in (b"P2", b"P3", b"P5", b"P6"):
        header = re.match(rb"P\d(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)", data)
        return 16 if header and int(header[1]) > 255 else 8
    if image.format == "JPEG2000" and (start := data.find(b"\xff\x51")) >= 0:
        return max(8, (data[start + 40] & 0x7F) + 1)  # of the first component, in the codestream's SIZ segment
    return 1 if image.mode == "1" else 8


def _open_tiff(data: bytes, name: str) -> _Picture:
    """TIFFs go through tifffile: Pillow refuses the mis-tagged ones of CVC-ClinicDB and turns others silently."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) != 1:
            raise _RefusedError(f"{name} has {len(file.pages)} pages: save each page as an image of its own")
        page = file.pages.first
        check_pixels(page.imagewidth, page.imagelength, name=name)
        kind = _photometric(page.photometric)
        _refuse_rare(page, kind, name)
        pixels = page.asarray()
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, 2)
        lossless = int(page.compression) not in (*_COMPRESSED_TO_RGB, 34712, 50001)  # JPEG 2000, WebP
        bits = _tiff_bits(page)
        if kind == "ycbcr" and int(page.compression) in _COMPRESSED_TO_RGB:
            kind = "rgb"
        colormap, premultiplied = page.colormap, tuple(page.extrasamples)[:1] == (tifffile.EXTRASAMPLE.ASSOCALPHA,)
    if pixels.dtype == bool:
        pixels, bits = pixels.astype(np.uint8), 1
    white = (1 << bits) - 1 if pixels.dtype.kind == "u" and bits <= 16 else 0
    if kind == "miniswhite":
        if not white:
            raise _RefusedError(
                f"{name} has {pixels.dtype} pixels with zero as white: convert it to 8 bits per channel"
            )
        pixels = np.concatenate([white - pixels[..., :1], pixels[..., 1:]], -1) if pixels.ndim == 3 else white - pixels
    if kind not in _KINDS:
        raise _RefusedError(f"{name} has the color space {kind.upper()}: convert it to RGB with 8 bits per channel")
    if pixels.dtype != np.uint8:
        return _Picture(deep=pixels, white=white, lossless=lossless)
    image = _tiff_image(pixels, kind, white=white, colormap=colormap, name=name)
    if premultiplied and image.mode in ("LA", "RGBA"):
        image = Image.frombytes(image.mode[:-1] + "a", image.size, image.tobytes()).convert(image.mode)
    return _Picture(image=image, white=255 if kind == "palette" else white, lossless=lossless)


def _refuse_rare(page: tifffile.TiffPage, kind: str, name: str) -> None:
    """Raise for a TIFF whose samples cannot be understood one by one."""
    samples = page.samplesperpixel
    if kind == "miniswhite" and samples > 2:
        raise _RefusedError(f"{name} has {samples} samples per pixel with zero as white: convert it to RGB")
    if kind == "ycbcr" and int(page.compression) not in _COMPRESSED_TO_RGB and page.subsampling not in (None, (1, 1)):
        across, down = page.subsampling
        raise _RefusedError(f"{name} stores the colors of {across}x{down} pixels together (YCbCr): convert it to RGB")
    is_alpha = [extra == tifffile.EXTRASAMPLE.ASSOCALPHA for extra in page.extrasamples]
    undone = kind in ("rgb", "minisblack", "miniswhite") and page.dtype == np.uint8 and not any(is_alpha[1:])
    if any(is_alpha) and not undone:
        raise _RefusedError(f"{name} has colors multiplied by their alpha: convert it to RGB without alpha")


_KINDS = {
    "minisblack": "black is zero",
    "miniswhite": "white is zero",
    "rgb": "RGB",
    "palette": "palette",
    "separated": "CMYK",
    "ycbcr": "YCbCr",
    "cielab": "CIE L*a*b*",
    "icclab": "ICC L*a*b*",
}
"""TIFF's color spaces that are read."""


def _photometric(value: Any) -> str:
    return str(getattr(value, "name", value)).lower()


def _tiff_image(
    pixels: NDArray[np.uint8], kind: str, *, white: int, colormap: NDArray[np.uint16] | None, name: str
) -> Image.Image:
    """8-bit samples of a TIFF as an image of Pillow in its mode."""
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    if kind == "palette":
        if samples != 1 or colormap is None:
            raise _RefusedError(f"{name} has a palette and {samples} samples per pixel: convert it to RGB")
        image = Image.frombytes("P", pixels.shape[::-1], np.ascontiguousarray(pixels).tobytes())
        colors = colormap >> 8 if colormap.max() > 255 else colormap  # some writers store 8 bits in TIFF's 16
        image.putpalette(colors.astype(np.uint8).T.tobytes())
        return image
    if white != 255:
        pixels = (pixels.astype(np.uint16) * 255 // white).astype(np.uint8)
    modes = {"separated": (4, "CMYK"), "ycbcr": (3, "YCbCr"), "cielab": (3, "LAB"), "icclab": (3, "LAB")}
    if kind in modes:
        needed, mode = modes[kind]
        if samples < needed:
            raise _RefusedError(f"{name} has {samples} samples of {_KINDS[kind]} per pixel: convert it to RGB")
        pixels = np.ascontiguousarray(pixels[:, :, :needed])
        if kind == "icclab":
            pixels[..., 1:] ^= 128  # zero is 128 there; CIE L*a*b* is signed, as Pillow takes it
        return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :4] if pixels.ndim == 3 else pixels))


def describe_file(data: bytes, *, name: str) -> str:
    """How a file is coded, in words, from its header: ``JPEG, RGB``, ``TIFF, white is zero, 1 bit``."""
    try:
        if is_tiff(data):
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                page = file.pages.first
                kind = _photometric(page.photometric)
                return f"TIFF, {_KINDS.get(kind, kind)}" + _words_of_bits(_tiff_bits(page))
        image = open_picture(data, name=name, load=False)
        return f"{image.format}, {_MODES.get(image.mode, image.mode)}" + _words_of_bits(_bits(image, data))
    except PolypSegError:
        raise
    except Exception as error:
        raise PolypSegError(f"{name} is truncated or not an image ({error}): download it again or remove it") from error


def _words_of_bits(bits: int) -> str:
    return "" if bits == 8 else ", 1 bit" if bits == 1 else f", {bits} bits"


def _tiff_bits(page: Any) -> int:
    return page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)


def stored_upright(data: bytes) -> bool:
    """Whether every reader shows the pixels as they are stored: no TIFF, and no EXIF orientation that turns them."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def read_values(data: bytes, *, name: str) -> NDArray[Any]:
    """Bytes of an image file -> (H, W) or (H, W, C) values, every coding of the file undone.

    uint8 for up to 8 bits (0 to 255: black to white), else the type that is stored. Colors are RGB, with alpha where
    some of it is transparent. Raises PolypSegError naming a file that cannot be decoded.
    """
    picture = _open(data, name)
    if picture.deep is not None:
        return picture.deep
    image = picture.image
    assert image is not None
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("L") if image.mode in ("1", "L", "LA", "La") else _rgb(image, name=name))


# Frames ------------------------------------------------------------------------------------------------


def decode_frame(data: bytes, *, name: str) -> Image.Image:
    """Bytes of an image file -> RGB image. Raises PolypSegError naming the file when they cannot be decoded."""
    picture = _open(data, name)
    if picture.deep is not None:
        raise PolypSegError(f"{name} has {picture.deep.dtype} pixels: convert it to 8 bits per channel")
    return _rgb(picture.image, name=name)


def as_frame(image: Any, *, name: str = "the frame") -> Image.Image:
    """A PIL image of any mode, an RGB array (H, W, 3) uint8 or a path -> RGB, as ``decode_frame`` gives it for a file.

    Raises UsageError for anything else, PolypSegError for an image of more than 8 bits per channel or a broken file.
    """
    if isinstance(image, str | Path):
        try:
            if os.path.lexists(image) and not Path(image).is_file():  # reading a pipe would wait for ever
                from polypseg.data.sources import kind_of_file  # late: a first mask need not wait for archives

                raise UsageError(f"cannot read {image}: it is {kind_of_file(Path(image))}")
            return decode_frame(Path(image).read_bytes(), name=str(image))
        except OSError as error:
            raise UsageError(f"cannot read {image}: {error.strerror}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        found = f"an array {image.shape} of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f"{name} is {found}: give PIL images, RGB arrays (H, W, 3) of uint8 or paths")
    if image.mode.startswith("I") or image.mode == "F":
        raise PolypSegError(f"{name} has more than 8 bits per channel (mode {image.mode}): convert it to 8")
    return _rgb(image, name=name)


def _rgb(image: Image.Image | None, *, name: str) -> Image.Image:
    assert image is not None
    if image.mode == "RGB":
        return image
    try:
        if image.mode == "LAB":
            lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
            assert converted is not None
            return converted
        if image.mode in ("RGBa", "La"):  # premultiplied
            image = image.convert(image.mode.upper())
        return image.convert("RGB")
    except (ValueError, ImageCms.PyCMSError) as error:
        raise PolypSegError(f"{name} has the color space {image.mode}: convert it to RGB") from error


# Masks -------------------------------------------------------------------------------------------------


def decode_mask(data: bytes, *, name: str, values: MaskValues | None = None) -> NDArray[np.uint8]:
    """Bytes of a mask file -> (H, W) uint8, 1 where the gray value exceeds 127 or is one of ``values``, else 0."""
    return (decode_gray_mask(data, name=name, values=values) > MASK_THRESHOLD).astype(np.uint8)


def decode_gray_mask(data: bytes, *, name: str, values: MaskValues | None = None) -> NDArray[np.uint8]:
    """Bytes of a mask file -> (H, W) uint8 gray values as stored, 0 to 255: the reference trains on these.

    With ``values`` 255 where the file holds one of them, else 0. Raises PolypSegError for a file that cannot be
    decoded, a mask in transparency and, without ``values``, one in colors or coded with class numbers: all whose
    values lie below the threshold but are not all 0, and those with areas of three values or more.
    """
    picture = _open(data, name)
    _refuse_transparency(picture, name)
    if values is not None:
        return _chosen(picture, values, name).astype(np.uint8) * np.uint8(255)
    stored = _single_channel(picture)
    if stored is None:
        raise PolypSegError(
            f"{name} is a color-coded mask: convert the polyp's color to white, the rest to black, or name the "
            f"polyp's colors, e.g. --mask-values '{_main_color(picture)}'"
        )
    if not stored.any():
        return np.zeros(stored.shape, dtype=np.uint8)
    if not picture.white and not (stored.dtype.kind == "f" and stored.min() >= 0 and stored.max() == 1):
        raise PolypSegError(_coded(name, stored, lossless=picture.lossless, what=f"{stored.dtype} values"))
    gray = _gray(stored, white=picture.white or 1)
    if gray.max() <= MASK_THRESHOLD:
        black = not picture.lossless and gray.min() == gray.max() <= _BLACK_IN_JPEG
        if not black:
            raise PolypSegError(_coded(name, stored, lossless=picture.lossless))
    elif areas := _areas(seen := _with_small_numbers(gray, stored), lossless=picture.lossless):
        if stored.dtype == np.uint8:
            areas = [round(area * picture.white / 255) for area in areas]
        else:
            areas = [int(stored.flat[np.abs(seen.astype(int) - area).argmin()]) for area in areas]
        hint = _as_range(areas[1:]) if picture.lossless else f"{areas[1] // 2}-255"
        raise PolypSegError(
            f"{name} holds areas of the values {areas}: say which values are polyp, e.g. --mask-values {hint}"
        )
    return gray


def _refuse_transparency(picture: _Picture, name: str) -> None:
    deep, image = picture.deep, picture.image
    if deep is not None:
        transparent = deep.ndim == 3 and deep.shape[2] in (2, 4) and deep[..., -1].min() < (picture.white or 1)
    else:
        assert image is not None
        transparent = image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    if transparent:
        raise PolypSegError(f"{name} codes the polyp in transparency: save black and white without alpha")


def _single_channel(picture: _Picture) -> NDArray[Any] | None:
    """(H, W) values of a mask in black, white and gray, 8-bit ones as shown (0 to 255); None for one in colors."""
    if picture.deep is not None:
        deep = picture.deep
        if deep.ndim == 2 or deep.shape[2] <= 2:
            return deep if deep.ndim == 2 else deep[..., 0]
        spread = np.ptp(deep[..., :3].astype(np.float64), axis=2)
        scale = (picture.white or max(float(deep.max()), 1.0)) / 255
        return None if (spread > 64 * scale).mean() > 1e-3 else deep[..., :3].max(axis=2)
    image = picture.image
    assert image is not None
    if image.mode not in ("1", "L", "LA", "La"):
        image = _rgb(image, name="")
        red, green, blue = (np.asarray(channel) for channel in image.split())
        spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
        if (spread > 64).mean() > 1e-3 or _few_colors(image, picture):
            return None
    return np.asarray(image.convert("L"))


def _few_colors(image: Image.Image, picture: _Picture) -> bool:
    """Whether a lossless RGB mask is coded in colors too dark or too pale to be told by their saturation."""
    colors = image.getcolors(_CODED_EXACTLY) if picture.lossless else None
    return colors is not None and any(max(color) - min(color) > 16 for _, color in colors)


def _gray(stored: NDArray[Any], *, white: int) -> NDArray[np.uint8]:
    """Stored values as 0 to 255; 8-bit ones are that already."""
    if stored.dtype == np.uint8:
        return stored
    return np.round(stored.astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)


def _with_small_numbers(gray: NDArray[np.uint8], stored: NDArray[Any]) -> NDArray[np.uint8]:
    """1 instead of 0 where a number of 16 bits is too small for a gray of its own: a 2 beside 65535."""
    return gray if stored.dtype.kind == "f" else np.maximum(gray, stored != 0).astype(np.uint8)


def _areas(gray: NDArray[np.uint8], *, lossless: bool) -> list[int]:
    """Values that fill areas, black and white included, where they are three or more: class or instance numbers.

    Antialiasing, resampling and JPEG leave other values at edges only. Areas near black are noise where stray pixels of
    other dark values come with them (in some of CVC-ClinicDB's masks), else class numbers too; near white they are
    noise.
    """
    counts = np.bincount(gray.ravel(), minlength=256)
    numbered = lossless and np.count_nonzero(counts) <= _CODED_EXACTLY
    lowest = 1 if numbered else _DARK if lossless else _DARK_IN_JPEG
    between = [v for v in range(lowest, _BRIGHT) if counts[v] >= _FLAT.size]
    if not between:
        return []
    flat = [v for v in between if _fills_an_area(gray == v)]
    if lossless and len(set(np.flatnonzero(counts[:_DARK])) - {0, *flat}) >= _STRAY:
        flat = [v for v in flat if v == 1 or v >= _DARK]
    if not flat:
        return []
    areas = [v for v, before in zip(flat, [-99, *flat], strict=False) if numbered or v - before > 16]
    if counts[: min(areas[0], _DARK)].any() if lossless else _fills_an_area(gray < areas[0] - _DARK_IN_JPEG // 2):
        areas.insert(0, 0)
    if counts[_BRIGHT:].any():
        areas.append(255 if not numbered else int(np.flatnonzero(counts)[-1]))
    return areas if len(areas) > 2 else []


def _fills_an_area(where: NDArray[np.bool_]) -> bool:
    import cv2  # late: a first mask of a JPEG must not wait for it

    return bool(cv2.erode(where.astype(np.uint8), _FLAT, borderValue=0).any())


def _chosen(picture: _Picture, values: MaskValues, name: str) -> NDArray[np.bool_]:
    """(H, W) where a mask holds one of the values or colors."""
    if values.colors:
        if picture.deep is not None:
            raise PolypSegError(f"{name} has {picture.deep.dtype} pixels: name values instead of colors")
        return _of_colors(np.asarray(_rgb(picture.image, name=name)), values, lossless=picture.lossless)
    stored = _stored_values(picture)
    if stored is None:
        raise PolypSegError(
            f"{name} is a color-coded mask: name colors, e.g. --mask-values '{_main_color(picture)}', instead of values"
        )
    chosen = np.zeros(stored.shape, dtype=np.bool_)
    for first, last in values.ranges:
        chosen |= (stored >= first) & (stored <= last)
    return chosen


def _stored_values(picture: _Picture) -> NDArray[Any] | None:
    """(H, W) numbers as they stand in the file; None for a mask in colors."""
    if picture.image is not None and picture.image.mode in ("P", "PA"):
        return np.asarray(picture.image if picture.image.mode == "P" else picture.image.getchannel("P"))
    stored = _single_channel(picture)
    if stored is None or picture.deep is not None or picture.white == 255:
        return stored
    return np.round(stored * (picture.white / 255)).astype(np.uint8)


def _of_colors(pixels: NDArray[np.uint8], values: MaskValues, *, lossless: bool) -> NDArray[np.bool_]:
    """Exactly the colors in a coded file. Else each within half the range of every channel and nearer than black."""
    chosen = np.zeros(pixels.shape[:2], dtype=np.bool_)
    coded = lossless and Image.fromarray(pixels).getcolors(_CODED_EXACTLY) is not None
    wide = pixels.astype(np.int32)
    for color in values.colors:
        distance = np.abs(wide - np.array(color))
        if coded:
            chosen |= (distance == 0).all(axis=2)
        else:
            nearer = (distance**2).sum(axis=2) < (wide**2).sum(axis=2)
            chosen |= (distance <= MASK_THRESHOLD).all(axis=2) & (nearer | (sum(color) == 0))
    return chosen


def _coded(name: str, stored: NDArray[Any], *, lossless: bool, what: str = "values") -> str:
    """The refusal of a mask whose values may be class numbers."""
    found = np.unique(stored)
    deep = " in 16 bits" if stored.dtype == np.uint16 else ""
    if not lossless or len(found) > 8:
        listed, hint = f"{found[0]} to {found[-1]}", f"{max(1, round(float(found[-1]) / 2))}-{max(1, int(found[-1]))}"
    else:
        listed, hint = str(found.tolist()), _as_range([int(v) for v in found if v > 0])
    return (
        f"{name} is coded with the {what} {listed}{deep}: masks need 0 (background) and 255 (polyp). Say which values "
        f"are polyp, e.g. --mask-values {hint}"
    )


def _as_range(values: list[int]) -> str:
    """``1-6`` for consecutive values, else ``1,3``."""
    if len(values) > 1 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ",".join(map(str, values))


def _main_color(picture: _Picture) -> str:
    """The most frequent color of a mask besides black, white and gray, as ``#rrggbb``."""
    if picture.image is None:
        return "#ff0000"
    pixels = np.asarray(_rgb(picture.image, name="")).reshape(-1, 3)
    colored = pixels[np.ptp(pixels, axis=1) > 16]
    colors, counts = np.unique(colored, axis=0, return_counts=True)
    return "#{:02x}{:02x}{:02x}".format(*colors[counts.argmax()]) if len(colors) else "#ff0000"


def check_same_size(frame: Image.Image, mask: NDArray[np.uint8], *, frame_name: str, mask_name: str) -> None:
    """Raise PolypSegError unless the mask has the frame's size."""
    if frame.size != (mask.shape[1], mask.shape[0]):
        raise PolypSegError(
            f"{mask_name} is {mask.shape[1]}x{mask.shape[0]} but {frame_name} is {frame.width}x{frame.height}: "
            "give the mask in the image's size"
        )


def encode_png(pixels: NDArray[np.uint8] | Image.Image) -> bytes:
    """A lossless PNG of an image or of (H, W[, 3]) uint8 pixels."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
