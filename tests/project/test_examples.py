"""The examples search and pictures: their functions alone, then each on six real processes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import overlay
from overlay import BadRequest
from overlay.client.sync import CallFailed
from overlay.model import config as configuration
from overlay.model.segments import Code, Part
from overlay.workers.api import Context
from tests.harness.cluster import ROOT, Overlay, free_port, run_without, running

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import pictures  # noqa: E402
import search  # noqa: E402
from PIL import Image  # noqa: E402

STDLIB = Path(sysconfig.get_path("stdlib"))
PHOTOS = sorted((EXAMPLES / "photos").glob("*.jpg"))
NO_LIMIT = 1_000_000


def at(process_id: str = "C", remaining_s: float = 60, **options) -> Context:
    return Context(process_id, "green", 1, 0, time.monotonic() + remaining_s, options)


def found(pattern: str, context: Context) -> list[str]:
    return search.search(pattern.encode(), context).decode().split("\n")


def folder_with(tmp_path: Path, **files: bytes) -> str:
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    return str(tmp_path)


# Search: shares


@given(name=st.text(min_size=1), shares=st.integers(1, 50))
def test_every_file_belongs_to_exactly_one_share(name, shares):
    owners = [n for n in range(1, shares + 1) if search.Scope(STDLIB, (n, shares)).has(name)]
    assert len(owners) == 1


@pytest.mark.parametrize(
    ("name", "share"),
    [("abc.py", 1), ("json/decoder.py", 2), ("json/encoder.py", 3), ("m\u00fcll.txt", 2)],
)
def test_a_file_has_the_same_share_on_every_machine(name, share):
    assert search.Scope(STDLIB, (share, 3)).has(name)


@pytest.mark.parametrize("pattern", ["class JSONDecoder", "re:^import json$", "\u00e9"])
def test_three_merged_shares_equal_one_search_over_the_whole(pattern):
    whole = found(pattern, at("X", most=NO_LIMIT))

    workers = [at(w, share=f"{n}/3", most=NO_LIMIT) for n, w in enumerate("CDF", 1)]
    parts = [Part(w.process_id, result=search.search(pattern.encode(), w)) for w in workers]
    merged = search.merge(parts).decode().split("\n")

    assert whole[0]
    assert [line.partition(": ")[2] for line in merged] == [
        line.partition(": ")[2] for line in whole
    ]


def test_a_file_name_is_shown_alike_however_a_system_writes_its_accents(tmp_path):
    (tmp_path / "mu\u0308ll.txt").write_bytes(b"needle")
    assert found("needle", at(folder=str(tmp_path))) == ["C: m\u00fcll.txt:1: needle"]


def test_the_shares_of_the_standard_library_are_of_similar_size():
    counts = [len(list(search._files(search.Scope(STDLIB, (n, 3)), []))) for n in (1, 2, 3)]
    assert min(counts) > 0.8 * max(counts)


# Search: answers


def test_a_line_names_the_worker_the_file_and_the_line_number():
    lines = found("class JSONDecoder(", at("C"))
    number = (
        (STDLIB / "json/decoder.py")
        .read_text(encoding="utf-8")
        .split("\n")
        .index("class JSONDecoder(object):")
    )
    assert f"C: json/decoder.py:{number + 1}: class JSONDecoder(object):" in lines


def test_the_answer_is_empty_when_nothing_matches(tmp_path):
    assert search.search(b"needle", at(folder=folder_with(tmp_path, a=b"hay"))) == b""


def test_line_numbers_agree_with_those_of_an_editor(tmp_path):
    folder = folder_with(tmp_path, a=b"\xef\xbb\xbffirst\r\n\x0cpage two\r\nneedle\r\n")
    assert found("re:^(first|needle)$", at(folder=folder)) == [
        "C: a.txt:1: first",
        "C: a.txt:3: needle",
    ]


def test_an_empty_file_has_no_empty_line(tmp_path):
    assert found("re:^$", at(folder=folder_with(tmp_path, a=b"", b=b"x\n\n"))) == ["C: b.txt:2: "]


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    folder = folder_with(tmp_path, a=b"needle \x1b[31m \xc2\x9b \x07 \t end")
    assert found("needle", at(folder=folder)) == ["C: a.txt:1: needle ?[31m ? ? \t end"]


def test_bytes_that_are_not_utf_8_do_not_end_a_search(tmp_path):
    folder = folder_with(tmp_path, a=b"\xff\xfe needle")
    assert found("needle", at(folder=folder)) == ["C: a.txt:1: \ufffd\ufffd needle"]


def test_a_long_line_is_cut(tmp_path):
    (line,) = found("needle", at(folder=folder_with(tmp_path, a=b"needle" + b"." * 10_000)))
    assert len(line) < 250
    assert line.endswith("...")


def test_an_answer_cut_at_option_most_says_so(tmp_path):
    folder = folder_with(tmp_path, a=b"needle\n" * 4)
    assert len(found("needle", at(folder=folder, most=4))) == 4
    assert found("needle", at(folder=folder, most=3))[3:] == [
        "# C: more lines match than the 3 of option most; these are the first"
    ]


def test_a_file_that_is_too_large_is_named(tmp_path):
    folder = folder_with(tmp_path, big=b"needle" * 1000, small=b"needle")
    assert found("needle", at(folder=folder, largest_mib=0.001)) == [
        "C: small.txt:1: needle",
        "# C: larger than 1048 bytes, not searched: big.txt",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_searched(tmp_path):
    folder = folder_with(tmp_path, b=b"needle")
    os.mkfifo(tmp_path / "a.txt")
    assert found("needle", at(folder=folder)) == [
        "C: b.txt:1: needle",
        "# C: could not be read: a.txt",
    ]


def test_only_text_files_outside_skipped_folders_are_searched(tmp_path):
    for name in ("a.txt", "b.exe", "C.TXT", ".git/d.txt", "e/f.md", "e/__pycache__/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("needle")
    assert found("needle", at(folder=str(tmp_path))) == [
        "C: C.TXT:1: needle",
        "C: a.txt:1: needle",
        "C: e/f.md:1: needle",
    ]


@dataclass
class Hurried:
    """A context whose time is up after it was asked for `looks` times."""

    looks: int
    process_id: str = "C"
    options: dict = field(default_factory=dict)
    cancelled: bool = False

    def remaining_s(self) -> float:
        self.looks -= 1
        return 10.0 if self.looks >= 0 else 0.01


def test_a_search_that_runs_out_of_time_returns_what_it_has_and_says_so(tmp_path):
    folder = folder_with(tmp_path, a=b"needle", b=b"needle", c=b"needle")
    assert found("needle", Hurried(2, options={"folder": folder})) == [
        "C: a.txt:1: needle",
        "C: b.txt:1: needle",
        "# C: time was up after 2 of 3 files; the rest is not searched",
    ]


def test_a_cancelled_search_stops(tmp_path):
    context = Hurried(99, options={"folder": folder_with(tmp_path, a=b"needle")}, cancelled=True)
    assert found("needle", context) == [
        "# C: time was up after 0 of 1 files; the rest is not searched"
    ]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"re:(", "'re:(' is not a regular expression: missing )"),
        (b"re:a{99999999999999}", "is not a regular expression"),
        (b"", "the pattern is empty"),
        (b"\n", "the pattern is empty"),
        (b"a\nb", "the pattern has a line break"),
        (b"\xff", "the pattern is not UTF-8 text"),
    ],
)
def test_a_pattern_that_cannot_be_searched_for_is_rejected_with_the_reason(payload, words):
    with pytest.raises(BadRequest, match=re.escape(words)):
        search.search(payload, at("C"))


def test_colons_and_brackets_have_no_special_meaning_in_plain_text(tmp_path):
    folder = folder_with(tmp_path, a=b"f(x): 1\nf.x.: 1\nre:x\n")
    assert found("f(x):", at(folder=folder)) == ["C: a.txt:1: f(x): 1"]
    assert found("re:re:", at(folder=folder)) == ["C: a.txt:3: re:x"]


@pytest.mark.parametrize("share", ["4/3", "0/3", "1", "1/0", "a/b", "1/3/3", "-1/3", ""])
def test_an_invalid_share_is_named(share):
    with pytest.raises(ValueError, match=f"option share: '{share}' is not like"):
        search.search(b"needle", at(share=share))


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"option folder: '.*nowhere' is not a folder"):
        search.search(b"needle", at(folder=str(tmp_path / "nowhere")))


def test_a_relative_folder_is_looked_for_beside_the_example():
    assert search.Scope.of({"folder": "photos"}).folder == EXAMPLES / "photos"


def test_merged_lines_are_sorted_by_path_and_number_and_notes_come_last():
    parts = [
        Part("C", result=b"C: b.py:9: x\nC: b.py:10: x\n# C: note"),
        Part("D", result=b""),
        Part("F", result=b"F: a.py:2: C: z.py:1: x"),
    ]
    assert search.merge(parts).decode().split("\n") == [
        "F: a.py:2: C: z.py:1: x",
        "C: b.py:9: x",
        "C: b.py:10: x",
        "# C: note",
    ]


def test_empty_parts_merge_to_an_empty_answer():
    assert search.merge([Part("C"), Part("D")]) == b""


# Pictures


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def thumbnail(payload: bytes, **options) -> Image.Image:
    image = Image.open(io.BytesIO(pictures.thumbnail(payload, at(**options))))
    assert image.format == "JPEG"
    return image


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.stem)
def test_a_photograph_fits_into_the_size_and_looks_the_same(photo):
    small = thumbnail(photo.read_bytes())
    with Image.open(photo) as original:
        width, height = original.size
        wanted = original.convert("RGB").resize(small.size, Image.Resampling.BOX)
    assert max(small.size) == 160
    assert small.width / small.height == pytest.approx(width / height, rel=0.01)
    distance = sum(abs(a - b) for a, b in zip(small.tobytes(), wanted.tobytes(), strict=True))
    assert distance / len(wanted.tobytes()) < 8  # of 255, on average


@pytest.mark.parametrize(
    ("original", "option", "size"),
    [
        ((400, 200), "160x160", (160, 80)),
        ((200, 400), "160x160", (80, 160)),
        ((400, 200), "300x50", (100, 50)),
        ((40, 20), "160x160", (40, 20)),
        ((5000, 1), "160x160", (160, 1)),
    ],
)
def test_a_thumbnail_keeps_its_shape_and_is_never_enlarged(original, option, size):
    assert thumbnail(encoded(Image.new("RGB", original)), size=option).size == size


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_upright(turn):
    # How a camera that is held this way stores a narrow picture with red at the top.
    stored = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}[turn]
    upright = Image.new("RGB", (200, 400), "blue")
    upright.paste("red", (0, 0, 200, 200))
    for step in stored:
        upright = upright.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = turn

    small = thumbnail(encoded(upright, "JPEG", exif=exif, quality=95))

    assert small.size == (80, 160)
    assert small.getpixel((40, 20))[0] > 200
    assert small.getpixel((40, 140))[2] > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    glass = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    glass.paste((0, 0, 0, 255), (150, 0, 300, 300))

    small = thumbnail(encoded(glass.convert(mode)))

    assert min(small.getpixel((40, 80))) > 250
    assert max(small.getpixel((120, 80))) < 5


@pytest.mark.parametrize(
    ("mode", "grey", "kind"),
    [
        ("L", 100, "PNG"),
        ("I;16", 100 * 256, "PNG"),
        ("CMYK", (155, 155, 155, 0), "JPEG"),
        ("RGB", (100, 100, 100), "WEBP"),
        ("P", 100, "GIF"),
    ],
)
def test_a_grey_stays_the_same_in_every_kind_of_file(mode, grey, kind):
    image = Image.new(mode, (200, 200), grey)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in "rgb"])
    middle = thumbnail(encoded(image, kind)).getpixel((50, 50))
    assert middle == pytest.approx((100, 100, 100), abs=2)


def test_a_thumbnail_does_not_say_where_the_picture_was_taken():
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010F] = "a camera"
    whole = encoded(
        Image.new("RGB", (300, 300)), "JPEG", exif=exif, comment=b"at home", dpi=(99, 99)
    )
    small = thumbnail(whole)
    assert not small.getexif()
    assert not {"exif", "comment", "dpi"} & set(small.info)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "0 bytes that are no JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bytes that are no JPEG or PNG"),
        (PHOTOS[0].read_bytes()[:3000], "the picture is damaged: image file is truncated"),
        (png_that_claims(100, 100), "the picture is damaged"),
        (png_that_claims(10_000, 10_000), "the picture is too large"),
        (png_that_claims(60_000, 60_000), "the picture is too large"),
    ],
    ids=["nothing", "PostScript", "truncated", "no pixels", "large", "enormous"],
)
def test_a_payload_that_is_not_a_picture_is_rejected_with_the_reason(payload, words):
    with pytest.raises(BadRequest, match=words):
        pictures.thumbnail(payload, at())


@pytest.mark.parametrize("size", ["160", "0x160", "160x", "axb", "", "99999x99999"])
def test_an_invalid_size_is_named(size):
    with pytest.raises(ValueError, match=f"option size: '{size}' is not like"):
        pictures.thumbnail(PHOTOS[0].read_bytes(), at(size=size))


def test_without_pillow_the_import_says_what_to_install():
    script = "import sys; sys.modules['PIL'] = None; import pictures"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "the pictures example needs Pillow" in done.stderr.splitlines()[-1]


# Configurations and photographs


@pytest.mark.parametrize("name", ["search", "pictures"])
def test_an_example_has_the_processes_of_the_two_hosts_configuration(name):
    six = configuration.load(ROOT / "two_hosts_config.json").processes
    ours = configuration.load(EXAMPLES / f"{name}.json").processes

    def shape(processes):
        return {p.id: (p.role, p.team, p.neighbors) for p in processes.values()}

    assert shape(ours) == shape(six)
    # Below the ports of outgoing connections: from 32768 on Linux, from 49152 elsewhere.
    assert all(1024 < process.port < 32768 for process in ours.values())


def test_the_two_examples_can_run_side_by_side():
    both = [configuration.load(EXAMPLES / f"{name}.json") for name in ("search", "pictures")]
    ports = [process.port for topology in both for process in topology.processes.values()]
    assert len(set(ports)) == 12


def test_every_photograph_is_small_and_credited():
    credits = (EXAMPLES / "photos" / "CREDITS.md").read_text(encoding="utf-8")
    assert [photo.name for photo in PHOTOS if f"`{photo.name}`" not in credits] == []
    assert max(photo.stat().st_size for photo in PHOTOS) < 150_000
    assert sum(photo.stat().st_size for photo in PHOTOS) < 600_000


# On six real processes


def shipped(name: str) -> dict[str, Any]:
    """The example's own configuration with free ports, its logs beside it."""
    config = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    ports: set[int] = set()
    while len(ports) < 6:
        ports.add(free_port())
    for process, port in zip(config["processes"].values(), ports, strict=True):
        process["port"] = port
    return {**config, "log_dir": "logs"}


def folder_of(name: str, folder: Path) -> Path:
    shutil.copy(EXAMPLES / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def searchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = folder_of("search", tmp_path_factory.mktemp("search"))
    with running(folder, shipped("search")) as six:
        yield six


@pytest.fixture(scope="module")
def painters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = folder_of("pictures", tmp_path_factory.mktemp("pictures"))
    with running(folder, shipped("pictures")) as six:
        yield six


def unlabelled(lines: list[str]) -> list[str]:
    return [line.partition(": ")[2] for line in lines]


@pytest.mark.parametrize("pattern", ["class JSONDecoder", "re:^import json$", "\u00e9"])
def test_a_search_through_the_leader_equals_one_search_over_the_whole(searchers, pattern):
    whole = found(pattern, at("X"))

    with overlay.connect(searchers.address("A")) as client:
        answer = client.call(pattern)

    assert unlabelled(answer.result.decode().split("\n")) == unlabelled(whole)
    assert answer.coverage == (3, 3)


def test_a_broken_pattern_is_a_bad_request(searchers):
    with (
        overlay.connect(searchers.address("A")) as client,
        pytest.raises(CallFailed, match=r"'re:\(' is not a regular expression") as refused,
    ):
        client.call("re:(")
    assert refused.value.code == Code.INVALID_ARGUMENT


def test_every_worker_finds_a_part_of_what_is_in_many_files(searchers):
    with overlay.connect(searchers.address("A")) as client:
        lines = client.call("import os").result.decode().split("\n")
    assert {line.partition(": ")[0] for line in lines} == {"C", "D", "F"}


def test_a_pattern_that_takes_forever_costs_only_its_own_request(searchers):
    with overlay.connect(searchers.address("A")) as client:
        # There are 2 to the 60th ways through any line, and none of them matches.
        with pytest.raises(CallFailed):
            client.call(r"re:(?:|){60}\x00", timeout=1.5)
        answer = client.call("class JSONDecoder(", timeout=20)
    assert answer.coverage == (3, 3)
    assert b"json/decoder.py" in answer.result


def test_without_one_worker_the_answer_names_it_and_the_rest_is_right(searchers):
    shares = [at(w, share=f"{n}/3") for n, w in ((1, "C"), (2, "D"))]
    parts = [Part("", result=search.search(b"deadlock", share)) for share in shares]

    searchers.kill("F")
    try:
        with overlay.connect(searchers.address("A")) as client:
            answer = client.call("deadlock")
    finally:
        searchers.start("F")

    assert answer.coverage == (2, 3)
    assert [part.process_id for part in answer.missing] == ["F"]
    assert answer.result == search.merge(parts)


def test_a_worker_without_the_folder_costs_only_its_part_and_its_log_says_why(tmp_path):
    config = shipped("search")
    config["processes"]["D"]["options"]["folder"] = str(tmp_path / "nowhere")

    with running(folder_of("search", tmp_path), config) as six:
        with overlay.connect(six.address("A")) as client:
            answer = client.call("deadlock")
        log = six.log("D")

    assert [(part.process_id, part.code) for part in answer.missing] == [("D", Code.INTERNAL)]
    assert "nowhere' is not a folder on this machine" in log


def test_pictures_are_shared_among_the_workers(painters):
    with overlay.connect(painters.address("A")) as client, ThreadPoolExecutor(8) as eight:
        answers = list(eight.map(lambda p: client.call(p.read_bytes(), mode="any"), PHOTOS * 4))

    for photo, answer in zip(PHOTOS * 4, answers, strict=True):
        assert answer.result == pictures.thumbnail(photo.read_bytes(), at())
        assert max(Image.open(io.BytesIO(answer.result)).size) == 160
        assert answer.coverage == (1, 1)
    assert len({answer.parts[0].process_id for answer in answers}) > 1


def test_a_damaged_picture_is_a_bad_request_and_the_next_one_is_answered(painters):
    good = PHOTOS[0].read_bytes()
    with overlay.connect(painters.address("A")) as client:
        with pytest.raises(CallFailed, match="the picture is damaged: image file is tr") as refused:
            client.call(good[:3000], mode="any")
        after = client.call(good, mode="any")

    assert refused.value.code == Code.INVALID_ARGUMENT
    assert after.result == pictures.thumbnail(good, at())


def thumbnails(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "thumbnails.py"), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_the_script_makes_a_thumbnail_of_every_picture(painters, tmp_path):
    done = thumbnails("127.0.0.1", painters.port("A"), EXAMPLES / "photos", tmp_path / "out")

    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"(\S+): made by [CDF]\n", done.stdout) == [photo.name for photo in PHOTOS]
    for photo in PHOTOS:
        with Image.open(tmp_path / "out" / f"{photo.name}.thumb.jpg") as small:
            assert max(small.size) == 160


def test_the_script_names_a_damaged_picture_and_goes_on(painters, tmp_path):
    shutil.copy(PHOTOS[0], tmp_path / "good.jpg")
    (tmp_path / "bad.png").write_bytes(b"not a picture")

    done = thumbnails("127.0.0.1", painters.port("A"), tmp_path, tmp_path / "out")

    assert done.returncode == 1
    assert re.search(r"bad.png: no thumbnail: .*13 bytes that are no JPEG", done.stdout)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["good.jpg.thumb.jpg"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "python examples/thumbnails.py HOST PORT FOLDER OUT"),
        (("127.0.0.1", "1", "nowhere", "out"), "thumbnails.py: .*nowhere"),
        (("127.0.0.1", "x", EXAMPLES / "search.py", "out"), "thumbnails.py: .*search.py"),
    ],
)
def test_the_script_says_what_is_wrong_without_a_traceback(arguments, words):
    done = thumbnails(*arguments)
    assert done.returncode == 1
    assert re.search(words, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_worker_without_pillow_says_so_when_it_starts(tmp_path):
    (folder_of("pictures", tmp_path) / "overlay.json").write_text(json.dumps(shipped("pictures")))

    done = run_without("PIL", tmp_path / "overlay.json")

    assert done.returncode == 2
    assert "the pictures example needs Pillow" in done.stderr
    assert "Traceback" not in done.stderr
