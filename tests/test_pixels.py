"""What a file states of how it is to be shown: orientation, shape of pixels, colours, fields, transparency.

Each kind of statement is made with ffmpeg in every container that can hold it, and the decoded pixels have their right
values; ``canary`` tests show what would be trained on without the rule.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import av
import numpy as np
import pytest
from decoding import decode, load_image, probe
from fuzz import boxes
from PIL import Image

from finetune.core.errors import DataError
from finetune.core.types import CORRECTIONS, Bucket, ClipPlan, VideoProbe
from finetune.datasets import pictures

HEIGHT, WIDTH, FRAMES = 32, 64, 4
H264 = ["-c:v", "libx264", "-qp", "4", "-pix_fmt", "yuv444p", "-preset", "ultrafast"]
VP9 = ["-c:v", "libvpx-vp9", "-crf", "4", "-b:v", "0", "-cpu-used", "8", "-pix_fmt", "yuv444p"]


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Red grows to the right, green downwards: all of its eight orientations differ. uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([20 + 3 * x, 20 + 3 * y, np.full_like(x, 60)], -1).astype(np.uint8)


def encode(folder: Path, name: str, frames: np.ndarray, *arguments: str, layout: str = "rgb24") -> Path:
    """Write frames, uint8 or uint16 [F, H, W, C], to a video of 10 frames per second."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    (folder / "frames.raw").write_bytes(frames.tobytes())
    source = ["-f", "rawvideo", "-pix_fmt", layout, "-s", size, "-r", "10", "-i", "frames.raw"]
    boxes.ffmpeg(*source, *arguments, name, cwd=folder)
    return folder / name


def copied(source: Path, name: str, *before: str, after: tuple[str, ...] = ()) -> Path:
    """The same stream in another container, or with another statement."""
    boxes.ffmpeg(*before, "-i", source.name, "-c", "copy", *after, name, cwd=source.parent)
    return source.parent / name


def shown(path: Path, header: VideoProbe | None = None, indices: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """Frames as a clip holds them where nothing is cut, uint8 [F, H, W, 3]."""
    header = header or probe(path)
    bucket = Bucket(len(indices), header.height, header.width)
    clip = decode(path, header, ClipPlan(indices, (header.height, header.width), (0, 0), bucket))
    return clip.pixels.permute(1, 2, 3, 0).numpy()


def unguarded(path: Path) -> np.ndarray:
    """The first frame as PyAV gives it where nobody asks what the file states: what would be trained on."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean absolute difference in levels."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(int) - theirs.astype(int)).mean())


# --- orientation ------------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p.transpose(1, 0, 2), 2),
    8: lambda p: np.rot90(p),
}
STATED = {2: (0, True), 3: (180, False), 4: (180, True), 5: (270, True), 6: (270, False), 7: (90, True), 8: (90, False)}
"""EXIF's number -> ffmpeg's ``-display_rotation`` (counter-clockwise) and whether ``-display_hflip`` follows."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A folder with the picture in H.264 and VP9, and a square one."""
    folder = tmp_path_factory.mktemp("pixels")
    frames = np.repeat(picture()[None], FRAMES, 0)
    encode(folder, "plain.mp4", frames, *H264)
    encode(folder, "plain.webm", frames, *VP9)
    encode(folder, "square.mp4", frames[:, :, :HEIGHT], *H264)
    return folder


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_of_every_container(plain, suffix, orientation):
    degrees, mirrored = STATED.get(orientation, (0, False))
    source = plain / ("plain.webm" if suffix == "webm" else "plain.mp4")
    path = copied(
        source,
        f"turned{orientation}.{suffix}",
        *("-display_rotation", str(degrees)),
        *(["-display_hflip"] if mirrored else []),
    )
    header = probe(path)
    assert header.orientation == orientation
    theirs = UPRIGHT[orientation](shown(source)[0])
    assert (header.height, header.width) == theirs.shape[:2]
    assert np.array_equal(shown(path, header)[0], theirs)
    assert off(theirs, UPRIGHT[orientation](picture())) < 3
    assert header.corrections == (("turned-1",) if orientation == 3 else ())


def test_the_canary_of_orientation(plain):
    path = copied(plain / "plain.mp4", "half.mkv", "-display_rotation", "180")
    ours = unguarded(path)
    assert off(ours, picture()) < 3 and off(ours, np.rot90(picture(), 2)) > 20


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
@pytest.mark.parametrize(("flags", "orientation"), [("rotate=180", 3), ("rotate=90", 8), ("flip=horizontal", 2)])
def test_orientation_that_only_the_stream_states(plain, suffix, flags, orientation):
    filters = f"{'h264_mp4toannexb,' if suffix == 'ts' else ''}h264_metadata=display_orientation=insert:{flags}"
    path = copied(plain / "plain.mp4", f"stream{orientation}.{suffix}", after=("-bsf:v", filters))
    assert probe(path).orientation == orientation
    assert off(shown(path)[1], UPRIGHT[orientation](picture())) < 3


@pytest.mark.parametrize("suffix", ["avi", "mov", "mkv"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_orientation_in_the_exif_of_motion_jpeg(plain, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(plain / "turned.jpg", exif=exif, quality=98, subsampling=0)
    path = copied(plain / "turned.jpg", f"exif{orientation}.{suffix}", "-loop", "1", "-t", "0.4", "-r", "10")
    assert probe(path).orientation == orientation
    assert off(shown(path)[1], UPRIGHT[orientation](picture())) < 3


def test_the_rotate_tag_that_old_versions_of_ffmpeg_left(plain):
    for degrees, orientation in ((90, 6), (180, 3), (-90, 8), (0, 1)):
        path = copied(plain / "plain.mp4", f"tag{degrees}.mkv", after=("-metadata:s:v", f"rotate={degrees}"))
        assert probe(path).orientation == orientation
        assert off(shown(path)[0], UPRIGHT[orientation](picture())) < 3
    for nonsense in ("--90", "upside down", "9" * 5000, "", "90.5"):
        assert (
            probe(copied(plain / "plain.mp4", "n.mkv", after=("-metadata:s:v", f"rotate={nonsense}"))).orientation == 1
        )
    with pytest.raises(DataError, match="turns the picture by 45 degrees"):
        probe(copied(plain / "plain.mp4", "tag45.mkv", after=("-metadata:s:v", "rotate=45")))


def test_a_turn_that_keeps_the_size_gets_another_address(plain):
    """A quarter turn of other shapes changes the size: caches of older versions hold it upright."""
    corrections = {
        name: probe(copied(plain / source, name, "-display_rotation", degrees)).corrections
        for name, source, degrees in (
            ("square.mkv", "square.mp4", "90"),
            ("quarter.mkv", "plain.mp4", "90"),
            ("half.mov", "plain.mp4", "180"),
        )
    }
    assert corrections == {"square.mkv": ("turned-1",), "quarter.mkv": (), "half.mov": ("turned-1",)}


def test_an_orientation_that_changes_is_named(plain, tmp_path):
    raw = b""
    for flags in ("rotate=180", "rotate=0:flip=horizontal"):
        filters = f"h264_mp4toannexb,h264_metadata=display_orientation=insert:{flags}"
        raw += boxes.ffmpeg("-i", plain / "plain.mp4", "-c", "copy", "-bsf:v", filters, "-f", "h264", "-")
    (tmp_path / "raw.h264").write_bytes(raw)
    boxes.ffmpeg("-f", "h264", "-r", "10", "-i", "raw.h264", "-c", "copy", "changes.mp4", cwd=tmp_path)
    assert shown(tmp_path / "changes.mp4", indices=(1, 3)).shape[0] == 2
    with pytest.raises(DataError, match="its orientation changes in frame 4"):
        shown(tmp_path / "changes.mp4", indices=(1, 4))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_of_images(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(picture()).save(tmp_path / f"still.{suffix}", exif=exif, **options)
    ours = load_image(tmp_path / f"still.{suffix}").permute(1, 2, 0).numpy()
    assert off(ours, UPRIGHT[orientation](picture())) < 1


# --- pixels that are not square ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("vp9.webm", VP9),
        ("vp8.webm", ["-c:v", "libvpx", "-pix_fmt", "yuv420p"]),
        ("h264.mp4", H264),
        ("h264.mkv", H264),
        ("h264.ts", H264),
        ("mpeg4.mp4", ["-c:v", "mpeg4", "-pix_fmt", "yuv420p"]),
        ("mjpeg.mov", ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"]),
        ("ffv1.mkv", ["-c:v", "ffv1"]),
        ("av1.mp4", ["-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p"]),
        ("mpeg2.mpg", ["-c:v", "mpeg2video", "-pix_fmt", "yuv420p", "-r", "25", "-aspect", "2"]),
    ],
)
def test_the_shape_of_pixels_is_the_containers_or_the_codecs(tmp_path, name, codec):
    # Twice as wide; MPEG-2 knows no other than three shapes of the whole picture.
    frames = np.repeat(picture(64, 64)[None], FRAMES, 0)
    path = encode(tmp_path, name, frames, "-vf", "setsar=4/3", *codec)
    expected = {"mpeg2.mpg": 141}.get(name, 85)  # 64 * 4/3; 2.21:1, which is what MPEG-2 calls 2
    header = probe(path)
    assert (header.height, header.width) == (64, expected)
    theirs = np.asarray(Image.fromarray(picture(64, 64)).resize((expected, 64), Image.Resampling.BICUBIC))
    assert off(shown(path, header)[0], theirs) < 6


# --- colours ----------------------------------------------------------------------------------------------------------

GREYS = (0, 64, 128, 192, 255)
COLOURS = [*((grey,) * 3 for grey in GREYS), (255, 0, 0), (0, 255, 0), (0, 0, 255), (96, 128, 160)]
PATCH = 32

ZSCALE = {"pq": "smpte2084", "hlg": "arib-std-b67", "sdr": "bt709"}
"""Its names of transfers. It makes light of SDR with BT.1886, and HLG by luminance if not told to approximate."""


def patches(colours: list[tuple[int, int, int]]) -> np.ndarray:
    """Three frames with a square of each colour side by side, uint8 [F, H, W, 3]."""
    row = np.repeat(np.array(colours, np.uint8), PATCH, 0)
    return np.broadcast_to(row, (3, PATCH, *row.shape)).copy()


def centres(frame: np.ndarray) -> np.ndarray:
    """The colour in the middle of each square, [N, 3]."""
    return frame[PATCH // 2, PATCH // 2 :: PATCH].astype(int)


def in_hdr(folder: Path, transfer: str, primaries: str = "2020", container: str = "mp4", matrix: str = "") -> Path:
    """SDR colours as HDR holds them: white at 203 cd/m2, in 10 bits."""
    name = {"2020": "bt2020", "709": "bt709", "smpte432": "smpte432"}[primaries]
    light = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr,zscale=t=linear:npl=203,format=gbrpf32le"
    coded = f"zscale=p={primaries}:t={ZSCALE[transfer]}:m=2020_ncl:r=limited:npl=203:agamma=false,format=yuv444p10le"
    tags = f"setparams=color_primaries={name}:color_trc={ZSCALE[transfer]}:colorspace={matrix or 'bt2020nc'}"
    filters = f"format=gbrp,{light},{coded},{tags}"
    codec = ["-c:v", "libx265", "-x265-params", "log-level=none:lossless=1", "-preset", "ultrafast"]
    return encode(folder, f"{transfer}{primaries}.{container}", patches(COLOURS), "-vf", filters, *codec)


@pytest.mark.parametrize(
    ("primaries", "container"), [("2020", "mp4"), ("2020", "mkv"), ("709", "mp4"), ("smpte432", "mp4")]
)
@pytest.mark.parametrize("transfer", ["pq", "hlg", "sdr"])
def test_hdr_and_wide_colours_become_sdr(tmp_path, transfer, primaries, container):
    path = in_hdr(tmp_path, transfer, primaries, container)
    header = probe(path)
    name = {"2020": "bt2020", "709": "bt709", "smpte432": "p3"}[primaries]
    plain_sdr = (transfer, name) == ("sdr", "bt709")
    assert header.corrections == (() if plain_sdr else (f"{transfer}-{name}-1",))
    assert set(header.corrections) <= set(CORRECTIONS)
    ours, theirs = centres(shown(path, header)[0]), np.array(COLOURS)
    if transfer == "sdr":
        assert np.abs(ours - theirs).max() <= 14  # of a channel that is nearly black: 10 bits of a wider gamut
        assert np.abs(ours - theirs)[: len(GREYS)].max() <= 1
        return
    # Greys stay grey; up to 128 cd/m2 or so nothing is rolled off. White is where BT.2390's curve puts 203 of 1000.
    assert np.ptp(ours[: len(GREYS)], axis=1).max() <= 1
    assert np.abs(ours[: len(GREYS), 0] - [0, 64, 128, 191, 231]).max() <= 2
    # Saturated colours by their largest channel, so primaries of BT.709, which are muted in BT.2020, lose less.
    assert (ours[5:8].max(1) >= 229).all() and np.sort(ours[5:8], 1)[:, :2].max() <= 30
    assert np.abs(ours[8] - theirs[8]).max() <= 2


def test_the_canary_of_hdr(tmp_path):
    """What is trained on without the rule: the codes themselves, in which white is a grey."""
    for transfer, white in (("pq", 147), ("hlg", 190)):
        assert np.abs(centres(unguarded(in_hdr(tmp_path, transfer)))[4] - white).max() <= 2


@pytest.mark.parametrize(("transfer", "primaries"), [("pq", "2020"), ("hlg", "2020"), ("sdr", "2020"), ("pq", "709")])
@pytest.mark.parametrize("suffix", ["avif", "png"])
def test_hdr_images_become_the_sdr_that_videos_become(tmp_path, suffix, transfer, primaries):
    path = in_hdr(tmp_path, transfer, primaries)
    codec = {"avif": ["-c:v", "libaom-av1", "-still-picture", "1", "-crf", "1"], "png": ["-pix_fmt", "rgb48be"]}[suffix]
    boxes.ffmpeg("-i", path, "-frames:v", "1", *codec, tmp_path / f"still.{suffix}")
    ours = centres(load_image(tmp_path / f"still.{suffix}").permute(1, 2, 0).numpy())
    theirs = centres(shown(path)[0])
    # Pillow reads 8 bits, and the blue of an AVIF in BT.2020 up to 12 levels too dark (libyuv).
    assert np.abs(ours - theirs)[[*range(len(GREYS)), -1]].max() <= 10
    assert np.abs(ours.max(1) - theirs.max(1)).max() <= 30


def test_hdr_that_states_its_transfer_only_is_taken_for_bt2020(tmp_path):
    codec = ["-c:v", "libx265", "-x265-params", "log-level=none:lossless=1", "-preset", "ultrafast"]
    tagged = in_hdr(tmp_path, "pq")
    tags = "setparams=color_primaries=unknown:colorspace=unknown:color_trc=smpte2084"
    boxes.ffmpeg("-i", tagged, "-vf", tags, *codec, tmp_path / "bare.mkv")
    assert probe(tmp_path / "bare.mkv").corrections == ("pq-bt2020-1",)
    assert np.abs(centres(shown(tmp_path / "bare.mkv")[0]) - centres(shown(tagged)[0])).max() <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_tone_mapping_is_monotone_and_ends_in_white(transfer):
    codes = np.repeat(np.arange(0, 65281, 16, np.uint16)[None, :, None], 3, 2)
    ours = pictures.to_bt709(codes, transfer, "bt2020")[0].astype(int)
    assert (np.ptp(ours, axis=1) <= 1).all() and (np.diff(ours[:, 1]) >= 0).all()
    assert (ours[0] == 0).all() and (ours[-1] == 255).all()
    assert np.diff(ours[:, 1]).max() <= 1  # no step is left out: dark gradients stay smooth


def test_the_curves_are_those_of_the_standards():
    # BT.2408: the white of graphics, 203 cd/m2, is 58 % of PQ and 75 % of HLG; BT.2100: 50 % of HLG is 1/12.
    assert pictures.from_pq(np.array([0.58068888, 1.0])) == pytest.approx([203, 10000], rel=1e-5)
    assert pictures.from_hlg(np.array([0.5, 1.0])) == pytest.approx([1 / 12, 1], rel=1e-6)
    assert 1000 * pictures.from_hlg(np.array(0.75)) ** 1.2 == pytest.approx(203, abs=1)
    # BT.2390: below the knee nothing changes, the source's peak is the target's.
    assert pictures.tone_map(np.array([0.0, 1, 50, 1000, 4000])) == pytest.approx([0, 1, 50, 203, 203], rel=1e-6)
    # BT.2087's matrix from BT.2020 to BT.709.
    theirs = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert np.abs(pictures.conversion("bt2020") - theirs).max() < 1e-4


def test_no_pyav_that_reads_bt709_as_bt601_is_installed_with_this_package():
    """14.2 to 16.1 do: green 0, 255, 0 becomes 19, 255, 8. What is installed here is tested below."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (floor,) = [name for name in project["dependencies"] if name.startswith("av>")]
    assert int(floor.removeprefix("av>=").split(".")[0]) >= 17


MATRICES = ["bt709", "smpte170m", "bt470bg", "smpte240m", "fcc"]


@pytest.mark.parametrize("levels", ["tv", "pc"])
def test_every_matrix_and_range_is_read(tmp_path, levels):
    colours = [(0, 255, 0), (255, 0, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (16, 16, 16), (200, 100, 50)]
    for matrix in MATRICES:
        for name, codec in ((f"{matrix}.mp4", ["-c:v", "libx264", "-qp", "1"]), (f"{matrix}10.mp4", X265)):
            layout = "yuv420p10le" if codec is X265 else "yuv420p"
            filters = (
                f"scale=out_color_matrix={matrix}:out_range={levels},format={layout},setparams=colorspace={matrix}"
            )
            path = encode(
                tmp_path, name, patches(colours), "-vf", filters, *codec, "-colorspace", matrix, "-color_range", levels
            )
            assert probe(path).corrections == ()
            ours = shown(path)[1]
            assert np.abs(centres(ours) - colours).max() <= 3, (name, centres(ours).tolist())


X265 = ["-c:v", "libx265", "-x265-params", "log-level=none:bframes=0", "-crf", "1", "-preset", "ultrafast"]


@pytest.mark.parametrize("size", [(64, 96), (720, 1280)])
def test_a_matrix_that_is_not_stated_is_bt601_at_every_size(tmp_path, size):
    """FFmpeg's rule, by which FFmpeg and most programs on top of it write such files."""
    frames = np.broadcast_to(np.array([0, 255, 0], np.uint8), (2, *size, 3)).copy()
    filters = "scale=out_color_matrix=smpte170m,format=yuv420p,setparams=colorspace=unknown"
    path = encode(tmp_path, "bare.mp4", frames, "-vf", filters, "-c:v", "libx264", "-qp", "1", "-preset", "ultrafast")
    assert np.abs(shown(path)[:, 20, 20].astype(int) - [0, 255, 0]).max() <= 2


REFUSED = {
    "YCgCo": "zscale=pin=709:tin=709:p=709:t=709:m=ycgco,format=yuv444p",
    "constant luminance": "zscale=pin=709:tin=709:p=709:t=709:m=2020_cl,format=yuv444p",
    "linear light": "zscale=pin=709:tin=709:p=709:t=linear,format=gbrp16",
    "ICtCp": "zscale=pin=709:tin=709:p=2020:t=smpte2084:m=ictcp:npl=203,format=yuv444p10le",
}


@pytest.mark.parametrize("name", REFUSED)
def test_colours_that_are_not_read_are_refused_with_the_command_that_converts_them(tmp_path, name):
    path = encode(tmp_path, "colours.mkv", patches(COLOURS), "-vf", f"format=gbrp,{REFUSED[name]}", "-c:v", "ffv1")
    with pytest.raises(DataError, match=name) as caught:
        probe(path)
    program, *arguments = shlex.split(caught.value.fix.removeprefix("convert it: "))
    assert program == "ffmpeg"
    boxes.ffmpeg(*arguments, cwd=tmp_path)
    ours = centres(shown(tmp_path / "converted.mp4")[0])
    theirs = np.array([*((grey,) * 3 for grey in (0, 64, 128, 191, 231 if name == "ICtCp" else 255))])
    assert np.abs(ours[: len(GREYS)] - theirs).max() <= 3
    assert (ours[5:8].argmax(1) == [0, 1, 2]).all() and np.sort(ours[5:8], 1)[:, :2].max() <= 50


def test_dolby_vision_without_a_base_is_refused(tmp_path):
    tags = "format=yuv420p10le,setparams=color_primaries=unknown:color_trc=unknown:colorspace=unknown"
    boxes.ffmpeg(
        "-i", in_hdr(tmp_path, "pq"), "-vf", tags, *X265, "-tag:v", "dvh1", "-strict", "-2", tmp_path / "5.mp4"
    )
    with pytest.raises(DataError, match="profile 5"):
        probe(tmp_path / "5.mp4")
    boxes.ffmpeg("-i", in_hdr(tmp_path, "pq"), "-c", "copy", "-tag:v", "dvh1", "-strict", "-2", tmp_path / "8.mp4")
    assert probe(tmp_path / "8.mp4").corrections == ("pq-bt2020-1",)  # one with a base of HDR10


def test_colours_that_change_are_named(tmp_path):
    raw = b""
    for number in (1, 9):
        encode(tmp_path, "part.mp4", patches(COLOURS), *H264, "-bsf:v", f"h264_metadata=colour_primaries={number}")
        raw += boxes.ffmpeg("-i", tmp_path / "part.mp4", "-c", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "h264", "-")
    (tmp_path / "raw.h264").write_bytes(raw)
    copy = ["-c", "copy", "-bsf:v", "dump_extra=freq=k", "changes.mp4"]
    boxes.ffmpeg("-f", "h264", "-r", "10", "-i", "raw.h264", *copy, cwd=tmp_path)
    with pytest.raises(DataError, match="its colours change in frame 4"):
        shown(tmp_path / "changes.mp4", indices=(1, 4))


# --- fields -----------------------------------------------------------------------------------------------------------

INTERLACED = {
    "h264.mp4": ["-c:v", "libx264", "-flags", "+ilme+ildct", "-qp", "8"],
    "h264.mkv": ["-c:v", "libx264", "-flags", "+ilme+ildct", "-qp", "8"],
    "h264.ts": ["-c:v", "libx264", "-flags", "+ilme+ildct", "-qp", "8"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "2", "-r", "25"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-flags", "+ilme+ildct", "-q:v", "2"],
    "ffv1.mkv": ["-c:v", "ffv1"],
}
BY_CONTAINER = {"prores.mov": ["-c:v", "prores_ks"], "mjpeg.mov": ["-c:v", "mjpeg", "-q:v", "2"]}
"""Codecs whose frames do not say it."""


def interlaced(folder: Path, name: str, codec: list[str], first: str = "top") -> Path:
    source = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=20:d=1"]
    filters = f"format=yuv422p,tinterlace=interleave_{first},setfield={first[0]}ff,format=yuv420p"
    boxes.ffmpeg(*source, "-vf", filters, *codec, name, cwd=folder)
    return folder / name


def by_ffmpeg(path: Path, filters: str) -> np.ndarray:
    raw = boxes.ffmpeg("-i", path, "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, 64, 96, 3)


@pytest.mark.parametrize("first", ["top", "bottom"])
@pytest.mark.parametrize("name", [*INTERLACED, *BY_CONTAINER])
def test_interlaced_video_is_made_progressive(tmp_path, name, first):
    if name in BY_CONTAINER and not hasattr(av.VideoCodecContext, "field_order"):
        pytest.skip("PyAV tells the container's word from 18.1 on")
    path = interlaced(tmp_path, name, {**INTERLACED, **BY_CONTAINER}[name], first)
    header = probe(path)
    field = "auto" if name in INTERLACED else f"{first[0]}ff"
    assert header.corrections == (f"bwdif-{field}-1",)
    theirs = by_ffmpeg(path, f"bwdif=mode=send_frame:parity={field}")
    combed = by_ffmpeg(path, "null")
    assert header.frames == len(theirs) == len(combed)
    last = header.frames - 1
    for indices in (tuple(range(header.frames)), (2, 5), (last,)):
        ours, chosen = shown(path, header, indices), list(indices)
        assert off(ours, theirs[chosen]) < 0.5 < 1.5 < off(ours, combed[chosen])


def test_interlaced_video_of_one_frame(tmp_path):
    path = interlaced(tmp_path, "one.mkv", ["-frames:v", "1", "-c:v", "ffv1"])
    assert probe(path).frames == 1 and shown(path, indices=(0, 0)).shape == (2, 64, 96, 3)


def test_fields_that_begin_later_are_named(tmp_path):
    progressive = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=10:d=1", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
    boxes.ffmpeg(*progressive, "-f", "h264", "a.h264", cwd=tmp_path)
    boxes.ffmpeg("-i", interlaced(tmp_path, "b.mkv", INTERLACED["h264.mkv"]), "-c", "copy", "b.h264", cwd=tmp_path)
    (tmp_path / "raw.h264").write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    copy = ["-c", "copy", "-bsf:v", "dump_extra=freq=k", "changes.mp4"]
    boxes.ffmpeg("-f", "h264", "-r", "10", "-i", "raw.h264", *copy, cwd=tmp_path)
    header = probe(tmp_path / "changes.mp4")
    with pytest.raises(DataError, match="it becomes interlaced in frame 15"):
        shown(tmp_path / "changes.mp4", header, (1, 15))


def test_interlaced_hevc_is_refused_with_the_command_that_converts_it(tmp_path):
    path = interlaced(tmp_path, "fields.mp4", [*X265[:3], "interlace=tff:log-level=none"])
    with pytest.raises(DataError, match="each field is a picture") as caught:
        probe(path)
    boxes.ffmpeg(*shlex.split(caught.value.fix.removeprefix("convert it: "))[1:], cwd=tmp_path)
    assert probe(tmp_path / "converted.mp4").corrections == ()


# --- transparency -----------------------------------------------------------------------------------------------------

TRANSPARENT = {
    "vp9.webm": [*VP9[:-1], "yuva420p"],
    "vp8.webm": ["-c:v", "libvpx", "-crf", "4", "-b:v", "2M", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0"],
    "prores.mov": ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"],
    "animation.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "png.mov": ["-c:v", "png", "-pix_fmt", "rgba"],
    "ffv1.mkv": ["-c:v", "ffv1", "-pix_fmt", "yuva420p"],
    "utvideo.avi": ["-c:v", "utvideo", "-pix_fmt", "gbrap"],
    "raw.avi": ["-c:v", "rawvideo", "-pix_fmt", "bgra"],
}


def veiled() -> np.ndarray:
    """Opaque green, red of which half shows, and blue that is hidden: uint8 [F, H, W, 4]."""
    row = np.repeat(np.array([(0, 255, 0, 255), (255, 0, 0, 128), (0, 0, 255, 0)], np.uint8), PATCH, 0)
    return np.broadcast_to(row, (FRAMES, PATCH, *row.shape)).copy()


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_video_is_laid_on_black(tmp_path, name):
    path = encode(tmp_path, name, veiled(), *TRANSPARENT[name], layout="rgba")
    header = probe(path)
    assert header.corrections == ("on-black-1",)
    for frame in shown(path, header, (0, 3)):
        assert np.abs(centres(frame) - [(0, 255, 0), (128, 0, 0), (0, 0, 0)]).max() <= 6, name


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
@pytest.mark.parametrize("codec", ["vp8", "vp9"])
def test_what_the_container_states_of_transparent_webm(tmp_path, codec, suffix):
    """It is decoded by another decoder than FFmpeg's own; and Matroska's tag is in upper case after a copy."""
    path = encode(tmp_path, "alpha.webm", veiled(), *TRANSPARENT[f"{codec}.webm"], layout="rgba")
    colours = ["-color_trc", "arib-std-b67", "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    path = copied(path, f"copy.{suffix}", "-display_rotation", "180", after=tuple(colours))
    header = probe(path)
    assert header.corrections == ("turned-1", "hlg-bt2020-1", "on-black-1")
    hidden, half, opaque = centres(shown(path, header)[0])
    assert hidden.max() <= 6 and 60 < half[0] < opaque[1]


def test_transparent_hevc_is_refused(tmp_path):
    layers = [*X265[:2], "-pix_fmt", "yuva420p", "-x265-params", "log-level=none"]
    with pytest.raises(DataError, match="HEVC with transparency") as caught:
        probe(encode(tmp_path, "layers.mov", veiled(), *layers, layout="rgba"))
    boxes.ffmpeg(*shlex.split(caught.value.fix.partition("convert it: ")[2])[1:], cwd=tmp_path)
    assert probe(tmp_path / "converted.mp4").corrections == ()


def test_the_canary_of_transparency(tmp_path):
    """FFmpeg's own VP9 shows what was hidden."""
    path = encode(tmp_path, "vp9.webm", veiled(), *TRANSPARENT["vp9.webm"], layout="rgba")
    assert centres(unguarded(path))[2][2] > 240


@pytest.mark.parametrize("transparency", [None, 0])
def test_a_palette_is_transparent_only_if_it_says_so(tmp_path, transparency):
    still = Image.new("P", (32, 32), 1)
    still.putpalette([255, 0, 0, 9, 200, 30])
    still.paste(0, (0, 0, 16, 32))
    still.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    path = copied(tmp_path / "palette.png", "palette.mov", "-loop", "1", "-t", "0.4", "-r", "10")
    assert probe(path).corrections == (() if transparency is None else ("on-black-1",))
    left, right = shown(path)[0, 9, [4, 24]]
    assert left.tolist() == ([255, 0, 0] if transparency is None else [0, 0, 0]) and right.tolist() == [9, 200, 30]


def test_several_corrections_at_once(tmp_path):
    """Transparent HLG, turned by half a turn."""
    light = "zscale=pin=709:tin=709:min=709:p=2020:t=arib-std-b67:m=2020_ncl:npl=203"
    graph = f"[0:v]split[a][b];[a]format=yuv444p,{light},format=yuv444p10le[c];[b]alphaextract[d];[c][d]alphamerge"
    tags = "format=yuva444p10le,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc"
    codec = ["-c:v", "prores_ks", "-profile:v", "4444"]
    path = encode(tmp_path, "all.mov", veiled(), "-filter_complex", f"{graph},{tags}", *codec, layout="rgba")
    path = copied(path, "turned.mov", "-display_rotation", "180")
    header = probe(path)
    assert header.corrections == ("turned-1", "hlg-bt2020-1", "on-black-1")
    hidden, half, opaque = centres(shown(path, header)[0])
    assert hidden.max() <= 4 and opaque[1] > 200 and 90 < half[0] < 135
