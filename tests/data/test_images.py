"""What a user may rely on when frames and masks are read: right pixels, or a sentence that names the file."""

import io
import struct
import tarfile
import time
import warnings
import zipfile

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from polypseg.data.images import (
    MaskValues,
    as_frame,
    check_same_size,
    decode_frame,
    decode_gray_mask,
    decode_mask,
    describe_file,
    encode_png,
)
from polypseg.errors import PolypSegError, UsageError

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


def palette_image(indices, *colors):
    """A palette image whose index 0 and 1 have the given RGB colors."""
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([value for color in colors for value in color])
    return image


# Masks


@pytest.mark.parametrize(("gray", "inside"), [(126, 0), (127, 0), (128, 1), (255, 1)])
def test_decode_mask_takes_gray_above_127_as_polyp(gray, inside):
    pixels = POLYP * np.uint8(255)
    pixels[0, 0] = gray
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


def test_decode_gray_mask_keeps_what_is_stored():
    """The reference trains on interpolated gray masks, so nothing may be rounded here."""
    pixels = np.linspace(0, 255, 24 * 32).astype(np.uint8).reshape(24, 32)
    assert decode_gray_mask(encode(pixels), name="m.png").tolist() == pixels.tolist()


MASK_FILES = {
    "palette": encode(palette_image(POLYP, (0, 0, 0), (255, 255, 255))),
    "palette with white first": encode(palette_image(1 - POLYP, (255, 255, 255), (0, 0, 0))),
    "1-bit PNG": encode(Image.fromarray(POLYP * np.uint8(255)).convert("1")),
    "RGB": encode(np.repeat(POLYP[..., None] * np.uint8(255), 3, axis=2)),
    "RGBA": encode(np.dstack([POLYP * np.uint8(255)] * 3 + [np.full_like(POLYP, 255)])),
    "gray with alpha": encode(Image.fromarray(POLYP * np.uint8(255)).convert("LA")),
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
def test_decode_mask_refuses_color_codes_by_file_name(data):
    """Red has gray 76, so it would silently become background."""
    with pytest.raises(PolypSegError, match=r"masks/p7\.png is a color-coded mask: convert .* to white"):
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


def test_decode_frame_drops_alpha_and_widens_gray():
    rgba = np.dstack([NOISE, np.full((24, 32), 9, dtype=np.uint8)])
    assert np.array_equal(np.asarray(decode_frame(encode(rgba), name="a.png")), NOISE)
    assert np.array_equal(np.asarray(decode_frame(encode_tiff(rgba, photometric="rgb"), name="a.tif")), NOISE)
    gray = decode_frame(encode(NOISE[..., 0]), name="a.png")
    assert np.array_equal(np.asarray(gray), np.repeat(NOISE[..., :1], 3, axis=2))


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


# Every coding of a file is undone, or refused by name


LOOK = np.stack([np.add.outer(np.arange(96) * 2, np.arange(128)) % 256] * 3, -1).astype(np.uint8)
LOOK[..., 1] //= 2
LOOK[20:60, 30:80] = (200, 120, 110)


def lab_image():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(LOOK), srgb, lab, outputMode="LAB")


def icc_lab_tiff():
    """Photometric 9: a and b are stored with an offset instead of signed."""
    pixels = np.frombuffer(lab_image().tobytes(), np.uint8).reshape(LOOK.shape) ^ np.uint8([0, 128, 128])
    return encode_tiff(pixels, photometric="icclab")


GRAY_LOOK = np.asarray(Image.fromarray(LOOK).convert("L"))
CODINGS = {
    "palette": (encode(Image.fromarray(LOOK).quantize(256), "TIFF"), LOOK, 8),
    "palette LZW": (encode(Image.fromarray(LOOK).quantize(256), "TIFF", compression="tiff_lzw"), LOOK, 8),
    "cmyk": (encode(Image.fromarray(LOOK).convert("CMYK"), "TIFF"), LOOK, 2),
    "ycbcr": (encode(Image.fromarray(LOOK).convert("YCbCr"), "TIFF"), LOOK, 2),
    "JPEG in TIFF": (encode(Image.fromarray(LOOK), "TIFF", compression="jpeg", quality=95), LOOK, 8),
    "lab": (encode(lab_image(), "TIFF"), LOOK, 4),
    "icclab": (icc_lab_tiff(), LOOK, 4),
    "white is zero": (encode_tiff(255 - GRAY_LOOK, photometric="miniswhite"), GRAY_LOOK[..., None], 0),
}


@pytest.mark.parametrize("kind", CODINGS)
@pytest.mark.filterwarnings("ignore")
def test_decode_frame_undoes_the_color_space_of_a_tiff(kind):
    data, wanted, tolerance = CODINGS[kind]
    found = np.asarray(decode_frame(data, name="a.tif")).astype(int)
    assert np.abs(found - wanted).mean() <= tolerance


def subsampled_tiff():
    """Uncompressed YCbCr in blocks of 2x2 pixels with one color: four of Y, one of Cb, one of Cr."""
    y, cb, cr = np.moveaxis(np.asarray(Image.fromarray(LOOK).convert("YCbCr")), 2, 0)
    blocks = y.reshape(48, 2, 64, 2).transpose(0, 2, 1, 3).reshape(48, 64, 4)
    data = np.concatenate([blocks, cb[::2, ::2, None], cr[::2, ::2, None]], 2).tobytes()
    place = 8 + 2 + 12 * 10 + 4
    tags = [(256, 3, 1, 128), (257, 3, 1, 96), (258, 3, 3, place), (259, 3, 1, 1), (262, 3, 1, 6)]
    tags += [(273, 4, 1, place + 6), (277, 3, 1, 3), (278, 3, 1, 96), (279, 4, 1, len(data)), (530, 3, 2, 2 | 2 << 16)]
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return header + struct.pack("<IHHH", 0, 8, 8, 8) + data


def test_frames_whose_colors_are_multiplied_by_their_alpha_are_divided_again():
    """They were read dark: at half the alpha, half the brightness."""
    alpha = np.full((96, 128, 1), 128, dtype=np.uint8)
    half = (LOOK.astype(int) * 128 // 255).astype(np.uint8)
    data = encode_tiff(np.concatenate([half, alpha], 2), photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(np.asarray(decode_frame(data, name="a.tif")).astype(int) - LOOK).max() <= 2
    data = encode_tiff(np.concatenate([half[..., :1], alpha], 2), photometric="minisblack", extrasamples=["assocalpha"])
    assert np.abs(np.asarray(decode_frame(data, name="a.tif"))[..., 0].astype(int) - LOOK[..., 0]).max() <= 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encode_tiff(255 - LOOK, photometric="miniswhite", planarconfig="contig"), "has 3 samples .* zero as white"),
        (subsampled_tiff(), r"stores the colors of 2x2 pixels together \(YCbCr\)"),
        (
            encode_tiff(np.dstack([LOOK, LOOK[..., :2]]), photometric="separated", extrasamples=["assocalpha"]),
            "has colors multiplied by their alpha",
        ),
    ],
    ids=["white as zero in three channels", "raw YCbCr of 2x2", "CMYK with its alpha multiplied in"],
)
@pytest.mark.parametrize("decode", [decode_frame, decode_mask])
def test_tiffs_that_are_rare_are_refused_for_what_they_are(decode, data, words):
    """The first was inverted in one channel, the second called truncated."""
    with pytest.raises(PolypSegError, match=rf"^a\.tif {words}.*: convert it to RGB"):
        decode(data, name="a.tif")


def test_decode_frame_names_a_color_space_that_it_does_not_know():
    data = encode_tiff(NOISE[..., 0], photometric="cfa")
    with pytest.raises(PolypSegError, match=r"raw\.tif has the color space CFA: convert it to RGB"):
        decode_frame(data, name="raw.tif")


@pytest.mark.parametrize("suffix", ["tif", "webp", "anything"])
def test_a_file_is_what_its_bytes_say(suffix):
    """A JPEG named .tif was told to be downloaded again."""
    wanted = np.asarray(Image.open(io.BytesIO(JPEG)))
    assert np.array_equal(np.asarray(decode_frame(JPEG, name=f"a.{suffix}")), wanted)
    assert np.array_equal(np.asarray(decode_frame(TIFF, name="a.jpg")), NOISE)


@pytest.mark.parametrize("kind", ["GIF", "JPEG2000", "TGA", "PPM", "PCX", "WEBP", "SGI", "DDS"])
def test_decode_frame_reads_what_pillow_reads(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(NOISE).quantize(256) if kind == "GIF" else Image.fromarray(NOISE)
    found = decode_frame(encode(image, kind, **options), name="a.xyz")
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_animations_are_refused_by_name():
    data = encode(Image.fromarray(NOISE), "GIF", save_all=True, append_images=[Image.fromarray(255 - NOISE)])
    with pytest.raises(PolypSegError, match=r"film\.gif has 2 pages: save each page"):
        decode_frame(data, name="film.gif")


def deep_png(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encode(NOISE[..., 0].astype(np.uint16) * 257),
        deep_png(NOISE.astype(np.uint16) * 257),
        b"P6 32 24 65535\n" + (NOISE.astype(">u2") * 257).tobytes(),
        b"P5 32 24 4095\n" + (NOISE[..., 0].astype(">u2") * 16).tobytes(),
        encode(NOISE[..., 0].astype(np.uint16) * 257, "JPEG2000"),
        encode(NOISE[..., 0].astype(np.float32), "TIFF"),
    ],
    ids=["gray PNG", "RGB PNG", "PPM", "PGM", "JPEG 2000", "float TIFF"],
)
def test_frames_of_more_than_8_bits_are_refused_whatever_the_format(data):
    """Which value is white nobody says: 12 bits in 16 would be nearly black, and Pillow clips gray to white."""
    with pytest.raises(PolypSegError, match=r"deep\.png has .*(pixels|more than 8 bits per channel): convert it to 8"):
        decode_frame(data, name="deep.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "HSV"])
def test_as_frame_takes_every_mode_of_8_bits(mode):
    assert as_frame(Image.fromarray(LOOK).convert(mode)).mode == "RGB"


def test_as_frame_converts_lab_and_refuses_deep_images_and_strangers():
    assert np.abs(np.asarray(as_frame(lab_image())).astype(int) - LOOK).mean() < 4
    for image in (Image.fromarray(NOISE[..., 0].astype(np.uint16)), Image.fromarray(NOISE[..., 0].astype(np.float32))):
        with pytest.raises(PolypSegError, match="more than 8 bits per channel"):
            as_frame(image)
    for stranger in (NOISE[..., 0], NOISE.astype(float), None, b"frame.png"):
        with pytest.raises(UsageError, match="give PIL images, RGB arrays"):
            as_frame(stranger)
    np.testing.assert_array_equal(np.asarray(as_frame(NOISE)), NOISE)


# Sizes are checked before anything is decoded


def test_pixel_limit_is_stated_and_can_be_changed(monkeypatch):
    monkeypatch.setenv("POLYPSEG_MAX_PIXELS", "767")
    for data in (encode(NOISE), TIFF, JPEG):
        with pytest.raises(PolypSegError, match=r"a\.png is too large .*32x24 pixels.* 767\..*POLYPSEG_MAX_PIXELS"):
            decode_frame(data, name="a.png")
    monkeypatch.setenv("POLYPSEG_MAX_PIXELS", "768")
    decode_frame(TIFF, name="a.tif")
    for wrong in ("0", "-5", "many", "9" * 11, "1e6"):
        monkeypatch.setenv("POLYPSEG_MAX_PIXELS", wrong)
        with pytest.raises(UsageError, match="POLYPSEG_MAX_PIXELS is a number of pixels"):
            decode_frame(TIFF, name="a.tif")


def test_a_large_image_is_refused_without_being_decoded():
    """13000 x 13000 pixels took 4 GB."""
    huge = encode(Image.new("1", (9_000, 9_000)))
    began = time.perf_counter()
    with pytest.raises(PolypSegError, match=r"huge\.png is too large to be a frame: 9000x9000 pixels"):
        decode_mask(huge, name="huge.png")
    assert time.perf_counter() - began < 0.5


# Masks: right, or refused with the option that resolves them


BIG = np.zeros((96, 128), dtype=np.uint8)
BIG[20:60, 30:80] = 1
REGIONS = np.zeros((96, 128), dtype=np.uint8)
for _k in range(6):
    REGIONS[10:20, 5 + 20 * _k : 15 + 20 * _k] = _k + 1
BORDERED = (cv2.dilate(BIG, np.ones((5, 5), np.uint8)) - BIG) * np.uint8(255)
"""A border of two pixels around the polyp, as of "ignored" pixels."""
NUMBERED_FROM_2 = BORDERED + BIG * np.uint8(2)
NUMBERED_FROM_2[80:84, 10:16] = 3
BLURRED = cv2.GaussianBlur(BIG * np.float32(100), (0, 0), 2)

AMBIGUOUS = {
    "JPEG of 0 and 1": (encode(BIG, "JPEG"), "1-"),
    "JPEG of 0 and 38": (encode(BIG * np.uint8(38), "JPEG"), "22-44"),
    "instances": (encode(REGIONS), "1-6"),
    "percent": (encode(BLURRED.round().astype(np.uint8)), "50-100"),
    "16 bits of 0 and 1": (encode(BIG.astype(np.uint16)), "1"),
    "16 bits of 0 and 255": (encode(BIG.astype(np.uint16) * np.uint16(255)), "255"),
    "16-bit RGB of 0 and 1": (deep_png(np.repeat(BIG[..., None].astype(np.uint16), 3, axis=2)), "1"),
    "4-bit palette gray": (encode(palette_image(BIG, (0, 0, 0), (1, 1, 1))), "1"),
    "32 bits": (encode(BIG.astype(np.int32) * 7, "TIFF"), "7"),
    "instances above the threshold": (encode(REGIONS * np.uint8(40)), "40,80,120,160,200,240"),
    "polyp and ignored": (encode(np.where(REGIONS == 6, 255, REGIONS == 1).astype(np.uint8)), "1,255"),
    "polyp of 2 in a border of 255": (encode(BORDERED + BIG * np.uint8(2)), "2,255"),
    "polyp of 31 in a border of 255": (encode(BORDERED + BIG * np.uint8(31)), "31,255"),
    "numbers from 2 on, a small one and 255": (encode(NUMBERED_FROM_2), "2,255"),
    "16 bits of 2 and 65535": (
        encode(BORDERED.astype(np.uint16) * np.uint16(257) + BIG.astype(np.uint16) * np.uint16(2)),
        "2,65535",
    ),
    "20 and 255 in JPEG": (encode(BORDERED + BIG * np.uint8(20), "JPEG", quality=95), "1[01]?-255"),
    "trimap in JPEG": (encode(np.where(REGIONS == 6, 255, BIG * 128).astype(np.uint8), "JPEG", quality=95), "64-255"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_masks_that_may_be_coded_are_refused_with_the_option(kind):
    """After > 127 they would be empty, or hold some polyps and not others."""
    data, hint = AMBIGUOUS[kind]
    with pytest.raises(PolypSegError, match=rf"masks/p7\.png .* the \S*\s?values .*--mask-values {hint}"):
        decode_mask(data, name="masks/p7.png")


CLEAR = {
    "16 bits": encode(BIG.astype(np.uint16) * np.uint16(65535)),
    "16 bits, just above half": encode(BIG.astype(np.uint16) * np.uint16(32768)),
    "16-bit RGB": deep_png(np.repeat(BIG[..., None].astype(np.uint16) * 65535, 3, axis=2)),
    "float TIFF of 0 and 1": encode(BIG.astype(np.float32), "TIFF"),
    "TIFF white is zero": encode_tiff((1 - BIG) * np.uint8(255), photometric="miniswhite"),
    "1-bit TIFF white is zero": encode_tiff(BIG == 0, photometric="miniswhite"),
    "16-bit TIFF white is zero": encode_tiff((1 - BIG).astype(np.uint16) * np.uint16(65535), photometric="miniswhite"),
    "big-endian TIFF": encode_tiff(BIG.astype(">u2") * np.uint16(65535), byteorder=">"),
    "palette TIFF": encode(palette_image(BIG, (0, 0, 0), (255, 255, 255)), "TIFF"),
    "CMYK TIFF": encode(Image.fromarray(BIG * np.uint8(255)).convert("CMYK"), "TIFF"),
    "YCbCr TIFF": encode(Image.fromarray(BIG * np.uint8(255)).convert("RGB").convert("YCbCr"), "TIFF"),
    "PGM of 0 and 1": b"P5 128 96 1\n" + BIG.tobytes(),
    "GIF": encode(BIG * np.uint8(255), "GIF"),
}


@pytest.mark.parametrize("kind", CLEAR)
@pytest.mark.filterwarnings("ignore")
def test_masks_whose_white_is_known_are_read(kind):
    assert decode_mask(CLEAR[kind], name="m.png").tolist() == BIG.tolist()


@pytest.mark.parametrize(
    "data",
    [
        encode(BIG * 0, "JPEG"),
        encode(BIG * 0 + 1, "JPEG"),
        encode(BIG.astype(np.float32) * 0, "TIFF"),
        encode(BIG.astype(np.uint16) * 0),
    ],
    ids=["JPEG", "JPEG whose black is 1", "float", "16 bits"],
)
def test_masks_that_are_black_are_empty(data):
    assert decode_mask(data, name="m").sum() == 0


def test_antialiased_masks_are_no_class_numbers():
    soft = cv2.GaussianBlur(BIG * np.uint8(255), (0, 0), 3)
    small = np.asarray(Image.fromarray(BIG * np.uint8(255)).resize((64, 48), Image.Resampling.BICUBIC))
    for pixels in (soft, small, soft // 86 * 85):
        assert decode_gray_mask(encode(pixels), name="m.png").tolist() == pixels.tolist()


def test_dark_areas_are_noise_where_stray_pixels_come_with_them():
    """As in 19 masks of CVC-ClinicDB: an area of 11 or 12, and single pixels of 5 to 15."""
    pixels = BIG * np.uint8(255)
    pixels[70:, :60] = 12
    pixels[70, 10:15] = (7, 8, 9, 10, 15)
    assert decode_mask(encode(pixels), name="m.png").tolist() == BIG.tolist()


@pytest.mark.parametrize("quality", [10, 30, 75])
def test_what_jpeg_leaves_beside_soft_edges_is_noise(quality):
    """At quality 10, areas of 8."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        pixels = np.zeros((200, 300), np.uint8)
        center, axes = rng.integers(0, 200, 2).tolist(), rng.integers(20, 100, 2).tolist()
        cv2.ellipse(pixels, center, axes, rng.uniform(0, 180), 0, 360, 255, -1)
        soft = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(1, 6))
        found = decode_mask(encode(soft, "JPEG", quality=quality), name="m.jpg")
        assert (found != (soft > 127)).mean() < 0.02


@pytest.mark.parametrize("black", [0, 12, 16])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_black_need_not_be_zero(black, kind):
    """Video ranges begin at 16."""
    pixels = np.where(BIG, 235, black).astype(np.uint8)
    options = {"quality": 95} if kind == "JPEG" else {}
    assert decode_mask(encode(pixels, kind, **options), name="m").tolist() == BIG.tolist()


NEOPOLYP = np.zeros((96, 128, 3), dtype=np.uint8)
NEOPOLYP[20:60, 30:80] = (255, 0, 0)
NEOPOLYP[70:90, 90:120] = (0, 255, 0)
RED, GREEN = (NEOPOLYP[..., 0] > 0), (NEOPOLYP[..., 1] > 0)


@pytest.mark.parametrize(
    ("data", "values", "wanted"),
    [
        (encode(NEOPOLYP), "#ff0000", RED),
        (encode(NEOPOLYP), "#ff0000,#00ff00", RED | GREEN),
        (encode(NEOPOLYP, "JPEG", quality=95, subsampling=0), "#FF0000, #00ff00", RED | GREEN),
        (encode(NEOPOLYP, "JPEG", quality=95, subsampling=0), "#00ff00", GREEN),
        (encode(palette_image(BIG, (0, 0, 0), (128, 0, 0))), "#800000", BIG),
        (encode(palette_image(BIG, (0, 0, 0), (128, 0, 0))), "1", BIG),
        (encode(REGIONS), "1-6", REGIONS > 0),
        (encode(REGIONS), "2,5", np.isin(REGIONS, (2, 5))),
        (encode(BIG, "JPEG"), "1-255", BIG),
        (encode(BIG.astype(np.uint16) * np.uint16(300)), "300", BIG),
        (encode(BIG.astype(np.int32) * 7, "TIFF"), "7", BIG),
        (encode(Image.fromarray(BIG * np.uint8(255)).convert("1")), "1", BIG),
        (encode(REGIONS), "128-255", BIG * 0),
    ],
)
def test_mask_values_choose_what_is_polyp(data, values, wanted):
    found = decode_mask(data, name="m.png", values=MaskValues.parse(values))
    assert (found != wanted).mean() < 0.02  # JPEG moves edges
    assert found.any() == np.any(wanted)


def test_numbers_do_not_apply_to_colors_and_the_error_names_one():
    with pytest.raises(PolypSegError, match=r"p7\.png is a color-coded mask.*--mask-values '#ff0000'"):
        decode_mask(encode(NEOPOLYP), name="p7.png", values=MaskValues.parse("1"))


@pytest.mark.parametrize("text", ["", "red", "1,", "6-1", "#ff00", "1,#ff0000", "-3", "1.5", "9" * 20])
def test_mask_values_refuse_other_words(text):
    with pytest.raises(UsageError, match="mask values"):
        MaskValues.parse(text)


def test_mask_values_are_written_as_they_are_read():
    for text in ("1", "1-6", "2,5-7", "#00ff00,#ff0000"):
        assert str(MaskValues.parse(text)) == text


def test_describe_file_tells_the_coding():
    assert describe_file(CLEAR["TIFF white is zero"], name="m") == "TIFF, white is zero"
    assert describe_file(MASK_FILES["palette"], name="m") == "PNG, palette"
    assert describe_file(CLEAR["16 bits"], name="m").endswith("16 bits")


def archive_bytes(kind: str) -> bytes:
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("images/a.png", b"pixels")
    else:
        with tarfile.open(fileobj=packed, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("images/a.png"))
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["zip", "w:", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_called_one_and_not_a_truncated_image(kind):
    for decode in (decode_frame, decode_mask):
        with pytest.raises(PolypSegError, match=r"set\.zip is an archive, not an image: extract it"):
            decode(archive_bytes(kind), name="set.zip")
