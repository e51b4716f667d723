"""What a user may rely on when frames and masks are read: right pixels, or a sentence that names the file."""

import io
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

from polypseg.data.images import check_same_size, decode_frame, decode_grey_mask, decode_mask, encode_png
from polypseg.errors import PolypSegError

POLYP = np.zeros((24, 32), dtype=np.uint8)
POLYP[5:14, 7:20] = 1
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    """Bytes of an image file of the given kind, from pixels or a PIL image."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def encode_tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def palette_image(indices, *colours):
    """A palette image whose index 0 and 1 have the given RGB colours."""
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return image


# Masks


@pytest.mark.parametrize(("grey", "inside"), [(126, 0), (127, 0), (128, 1), (255, 1)])
def test_decode_mask_takes_grey_above_127_as_polyp(grey, inside):
    pixels = POLYP * np.uint8(255)
    pixels[0, 0] = grey
    assert decode_mask(encode(pixels), name="m.png")[0, 0] == inside


def test_decode_mask_gives_zero_and_one_in_uint8():
    mask = decode_mask(encode(POLYP * np.uint8(255)), name="m.png")
    assert mask.dtype == np.uint8
    assert mask.tolist() == POLYP.tolist()


def test_decode_mask_removes_the_ringing_of_jpeg():
    """Kvasir-SEG's masks are JPEG: "nonzero" would count the ringing around the edge as polyp."""
    data = encode(np.repeat(POLYP[..., None] * np.uint8(255), 3, axis=2), "JPEG", quality=60)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert (stored > 0).sum() > POLYP.sum(), "this JPEG does not ring, so the test proves nothing"
    assert decode_mask(data, name="m.jpg").tolist() == POLYP.tolist()


def test_decode_grey_mask_keeps_what_is_stored():
    """The reference trains on interpolated grey masks, so nothing may be rounded here."""
    pixels = np.linspace(0, 255, 24 * 32).astype(np.uint8).reshape(24, 32)
    assert decode_grey_mask(encode(pixels), name="m.png").tolist() == pixels.tolist()


MASK_FILES = {
    "palette": encode(palette_image(POLYP, (0, 0, 0), (255, 255, 255))),
    "palette with white first": encode(palette_image(1 - POLYP, (255, 255, 255), (0, 0, 0))),
    "1-bit PNG": encode(Image.fromarray(POLYP * np.uint8(255)).convert("1")),
    "RGB": encode(np.repeat(POLYP[..., None] * np.uint8(255), 3, axis=2)),
    "RGBA": encode(np.dstack([POLYP * np.uint8(255)] * 3 + [np.full_like(POLYP, 255)])),
    "grey with alpha": encode(Image.fromarray(POLYP * np.uint8(255)).convert("LA")),
    "BMP": encode(POLYP * np.uint8(255), "BMP"),
    "TIFF": encode_tiff(POLYP * np.uint8(255)),
    "RGBA TIFF": encode_tiff(
        np.dstack([POLYP * np.uint8(255)] * 3 + [np.full_like(POLYP, 255)]), photometric="rgb", extrasamples=[2]
    ),
    "1-bit TIFF": encode(Image.fromarray(POLYP * np.uint8(255)).convert("1"), "TIFF"),
    "LZW TIFF": encode(POLYP * np.uint8(255), "TIFF", compression="tiff_lzw"),
    "Deflate TIFF": encode(POLYP * np.uint8(255), "TIFF", compression="tiff_adobe_deflate"),
}


@pytest.mark.parametrize("kind", MASK_FILES)
def test_decode_mask_reads_every_black_and_white_form(kind):
    name = "m.tif" if "TIFF" in kind else "m.png"
    assert decode_mask(MASK_FILES[kind], name=name).tolist() == POLYP.tolist()


def test_decode_mask_accepts_an_empty_mask():
    """PolypGen has frames without a polyp."""
    assert decode_mask(encode(POLYP * 0), name="m.png").sum() == 0


@pytest.mark.parametrize(
    "data",
    [
        encode(np.stack([POLYP * np.uint8(255), POLYP * 0, POLYP * 0], axis=2)),
        encode(np.stack([POLYP * 0, POLYP * np.uint8(200), POLYP * 0], axis=2), "JPEG"),
        encode(palette_image(POLYP, (0, 0, 0), (128, 0, 0))),  # the PASCAL VOC palette
    ],
    ids=["red PNG", "green JPEG", "VOC palette"],
)
def test_decode_mask_refuses_colour_codes_by_file_name(data):
    """Red has grey 76, so it would silently become background."""
    with pytest.raises(PolypSegError, match=r"masks/p7\.png is a colour-coded mask: convert .* to white"):
        decode_mask(data, name="masks/p7.png")


@pytest.mark.parametrize("values", [(0, 1), (0, 127), (0, 1, 2)])
def test_decode_mask_refuses_small_class_numbers_with_the_remedy(values):
    """After > 127 such a mask would be empty, and training would go on with it."""
    pixels = np.take(np.array(values, dtype=np.uint8), POLYP)
    pixels[0, 0] = values[-1]
    with pytest.raises(PolypSegError, match=r"p7\.png is coded with the values .*need 0 .* and 255"):
        decode_mask(encode(pixels), name="p7.png")


def test_check_same_size_names_both_files_and_sizes():
    with pytest.raises(PolypSegError) as raised:
        check_same_size(Image.new("RGB", (32, 24)), POLYP.T, frame_name="images/a.jpg", mask_name="masks/a.png")
    for part in ("images/a.jpg", "masks/a.png", "32x24", "24x32"):
        assert part in str(raised.value)


def test_check_same_size_accepts_equal_sizes():
    check_same_size(Image.new("RGB", (32, 24)), POLYP, frame_name="a", mask_name="b")


WHITE = np.full((24, 32), 255, dtype=np.uint8)
TRANSPARENT = {
    "RGBA PNG": encode(np.dstack([WHITE, WHITE, WHITE, POLYP * np.uint8(255)])),
    "LA PNG": encode(Image.merge("LA", [Image.fromarray(WHITE), Image.fromarray(POLYP * np.uint8(255))])),
    "palette PNG": encode(palette_image(POLYP, (0, 0, 0), (0, 0, 0)), transparency=0),
    "LA TIFF": encode_tiff(np.dstack([WHITE, POLYP * np.uint8(255)]), photometric="minisblack", extrasamples=[2]),
    "RGBA TIFF": encode_tiff(
        np.dstack([WHITE, WHITE, WHITE, POLYP * np.uint8(255)]), photometric="rgb", extrasamples=[2]
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_decode_mask_refuses_a_polyp_in_transparency(kind):
    """Without its alpha such a mask is white, or black, all over."""
    name = f"p7.{'tif' if 'TIFF' in kind else 'png'}"
    with pytest.raises(PolypSegError, match=rf"{name} codes the polyp in transparency: save black and white"):
        decode_mask(TRANSPARENT[kind], name=name)


# Frames


def test_decode_frame_reads_clinicdb_tiffs_that_pillow_refuses():
    """CVC-ClinicDB's official TIFFs have 3 samples per pixel but say "BlackIsZero"."""
    data = encode_tiff(NOISE, photometric="minisblack", planarconfig="contig")
    with pytest.raises(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.open(io.BytesIO(data)).load()
    frame = decode_frame(data, name="1.tif")
    assert frame.mode == "RGB"
    assert np.array_equal(np.asarray(frame), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_decode_frame_keeps_lossless_pixels(kind):
    assert np.array_equal(np.asarray(decode_frame(encode(NOISE, kind), name=f"a.{kind.lower()}")), NOISE)


def test_decode_frame_drops_alpha_and_widens_grey():
    rgba = np.dstack([NOISE, np.full((24, 32), 9, dtype=np.uint8)])
    assert np.array_equal(np.asarray(decode_frame(encode(rgba), name="a.png")), NOISE)
    assert np.array_equal(np.asarray(decode_frame(encode_tiff(rgba, photometric="rgb"), name="a.tif")), NOISE)
    grey = decode_frame(encode(NOISE[..., 0]), name="a.png")
    assert np.array_equal(np.asarray(grey), np.repeat(NOISE[..., :1], 3, axis=2))


JPEG = encode(NOISE, "JPEG", quality=95)
TIFF = encode_tiff(NOISE, photometric="rgb")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jpg", JPEG[: len(JPEG) // 2]),
        ("cut.png", encode(NOISE)[:900]),
        ("cut.tif", TIFF[: len(TIFF) // 2]),
        ("text.jpg", b"<html>404 Not Found</html>"),
        ("text.png", b"<html>404 Not Found</html>"),
        ("text.tif", b"<html>404 Not Found</html>"),
        ("empty.jpg", b""),
        ("empty.tif", b""),
    ],
)
@pytest.mark.parametrize("decode", [decode_frame, decode_mask])
def test_decode_refuses_broken_files_by_name(decode, name, data):
    with pytest.raises(PolypSegError, match=rf"folder/{name} is truncated or not an image .*download it again"):
        decode(data, name=f"folder/{name}")


def test_decode_frame_refuses_16_bit_tiff_with_the_remedy():
    data = encode_tiff(NOISE.astype(np.uint16) * 257, photometric="rgb")
    with pytest.raises(PolypSegError, match=r"deep\.tif has uint16 pixels: convert it to 8 bits"):
        decode_frame(data, name="deep.tif")


def test_encode_png_is_lossless():
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(NOISE)))), NOISE)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(Image.fromarray(NOISE))))), NOISE)


# Faults that were found once and must not come back


def test_decode_frame_reads_planar_tiff():
    data = encode_tiff(np.moveaxis(NOISE, 2, 0).copy(), photometric="rgb", planarconfig="separate")
    assert np.array_equal(np.asarray(decode_frame(data, name="a.tif")), NOISE)


def test_decode_frame_refuses_multi_page_tiff_by_name():
    with pytest.raises(PolypSegError, match=r"stack\.tif"):
        decode_frame(encode_tiff(np.stack([NOISE, NOISE]), photometric="rgb"), name="stack.tif")


def test_decode_mask_refuses_multi_page_tiff_by_name():
    with pytest.raises(PolypSegError, match=r"stack\.tif"):
        decode_mask(encode_tiff(np.stack([POLYP * np.uint8(255)] * 2)), name="stack.tif")


@pytest.mark.parametrize("size", [3, 6])
def test_decode_frame_refuses_tiff_cut_in_the_header(size):
    with pytest.raises(PolypSegError, match=r"cut\.tif"):
        decode_frame(TIFF[:size], name="cut.tif")


LZW = encode(NOISE, "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize(
    "data",
    [
        LZW[:8] + b"\0" * 8 + LZW[16:],
        TIFF[:14] + b"\0" + TIFF[15:],  # the type of a tag
        TIFF[:21] + b"\xff" + TIFF[22:],  # a width of billions
    ],
    ids=["ImcdError", "TypeError", "MemoryError"],
)
@pytest.mark.parametrize("decode", [decode_frame, decode_mask])
def test_decode_refuses_damaged_tiffs_whatever_the_decoder_raises(decode, data):
    with pytest.raises(PolypSegError, match=r"bad\.tif is truncated or not an image .*download it again"):
        decode(data, name="bad.tif")


def test_decode_frame_refuses_16_bit_png_or_scales_it():
    """Most pixels of a 16-bit frame exceed 255, so clipping gives a white frame."""
    try:
        frame = decode_frame(encode(np.full((8, 8), 257 * 40, dtype=np.uint16)), name="deep.png")
    except PolypSegError as error:
        assert "deep.png" in str(error)
    else:
        assert np.asarray(frame).max() == 40


def test_decode_frame_refuses_gigantic_image_by_name():
    with pytest.raises(PolypSegError, match=r"bomb\.png"):
        decode_frame(encode(Image.new("1", (20_000, 20_000))), name="bomb.png")
