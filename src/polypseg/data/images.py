"""Decoding of frames and masks, the same way everywhere: RGB frames, masks 0/1 after grey > 127."""

import io

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from polypseg.errors import PolypSegError

MASK_THRESHOLD = 127  # JPEG and resampled masks are not binary; nonzero would grow them by up to 9 % Dice


def _open(data: bytes, name: str) -> Image.Image:
    """A decoded PIL image. TIFFs go through tifffile: the official CVC-ClinicDB ones are mis-tagged for Pillow."""
    try:
        if name.lower().endswith((".tif", ".tiff")):
            return _open_tiff(data, name)
        image = Image.open(io.BytesIO(data))
        image.load()
    except PolypSegError:
        raise
    except Image.DecompressionBombError as error:
        raise PolypSegError(f"{name} is too large to be a frame: {error}") from error
    except UnidentifiedImageError as error:  # its text holds an address of memory
        raise PolypSegError(
            f"{name} is truncated or not an image (no known format): download it again or remove it"
        ) from error
    except Exception as error:  # damaged files fail in a dozen ways: TypeError, MemoryError, the codecs' own errors
        raise PolypSegError(f"{name} is truncated or not an image ({error}): download it again or remove it") from error
    if image.mode.startswith(("I", "F")):
        raise PolypSegError(f"{name} has more than 8 bits per channel: convert it to 8")
    return image


def _open_tiff(data: bytes, name: str) -> Image.Image:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) != 1:
            raise PolypSegError(f"{name} has {len(file.pages)} pages: save each page as an image of its own")
        page = file.pages.first
        pixels = page.asarray()
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, 2)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        raise PolypSegError(f"{name} has {pixels.dtype} pixels: convert it to 8 bits per channel")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :4] if pixels.ndim == 3 else pixels))


def stored_upright(data: bytes) -> bool:
    """Whether every reader shows the pixels as they are stored: no TIFF, and no EXIF orientation that turns them."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def decode_frame(data: bytes, *, name: str) -> Image.Image:
    """Bytes of an image file -> RGB image. Raises PolypSegError naming the file when they cannot be decoded."""
    return _open(data, name).convert("RGB")


def decode_mask(data: bytes, *, name: str) -> NDArray[np.uint8]:
    """Bytes of a mask file -> (H, W) uint8, 1 where the grey value exceeds 127, else 0; errors as decode_grey_mask."""
    return (decode_grey_mask(data, name=name) > MASK_THRESHOLD).astype(np.uint8)


def decode_grey_mask(data: bytes, *, name: str) -> NDArray[np.uint8]:
    """Bytes of a mask file -> (H, W) uint8 grey values as stored, 0 to 255: the reference trains on these.

    Raises PolypSegError for a file that cannot be decoded, a mask in colours or in transparency, or one coded with
    small class numbers.
    """
    image = _open(data, name)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise PolypSegError(f"{name} codes the polyp in transparency: save black and white without alpha")
    lossless = image.format != "JPEG"
    if image.mode in ("P", "RGBA", "PA", "CMYK"):
        image = image.convert("RGB")
    if image.mode == "RGB":
        red, green, blue = (np.asarray(channel) for channel in image.split())
        spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
        if (spread > 64).mean() > 1e-3:
            raise PolypSegError(
                f"{name} is a colour-coded mask: convert the polyp's colour to white, the rest to black"
            )
    grey = np.asarray(image.convert("L"))
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    if lossless and 0 < values[-1] <= MASK_THRESHOLD and len(values) <= 4:
        raise PolypSegError(
            f"{name} is coded with the values {values.tolist()}: masks need 0 (background) and 255 (polyp)"
        )
    return grey


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
