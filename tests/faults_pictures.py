"""Faults in pictures: files that are damaged, that are something else, that lie elsewhere."""

import io
import os
import struct
import zlib

from PIL import Image

from tests.faults_bench import Bench, Ended, Outcome, fault, holds, refused, used, worst

SECTION = "Pictures"


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (60, 40), **more) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(out, kind, **more)
    return out.getvalue()


def refused_everywhere(bench: Bench, check: Ended, *words: str) -> Outcome:
    """By check; by train without --skip-bad; left out and counted with it."""
    stopped = bench.train(data=bench.folder / "pairs" / "pairs.jsonl")
    skipped = bench.train("--skip-bad", data=bench.folder / "pairs" / "pairs.jsonl")
    return worst(
        {
            "check": refused(check, *words),
            "train": refused(stopped, *words),
            "--skip-bad": used(skipped, "1 of 5 rows cannot be used"),
        }
    )


@fault("41", SECTION, "JPEG cut in half, by 2 bytes; PNG cut")
def cut(bench: Bench) -> Outcome:
    jpeg, png = encoded("JPEG"), encoded("PNG")
    cases = {"half": jpeg[: len(jpeg) // 2], "2 bytes": jpeg[:-2], "PNG": png[: len(png) // 2]}
    return worst({name: refused(bench.check(bench.with_picture(data)), "broken", ":2") for name, data in cases.items()})


@fault("41b", SECTION, "JPEG cut in half: check, train, --skip-bad")
def cut_everywhere(bench: Bench) -> Outcome:
    jpeg = encoded("JPEG")
    return refused_everywhere(bench, bench.check(bench.with_picture(jpeg[: len(jpeg) // 2])), "broken", "p1")


@fault("43", SECTION, "PNG with flipped bits")
def flipped(bench: Bench) -> Outcome:
    png = bytearray(encoded("PNG"))
    png[len(png) // 2] ^= 255
    return refused(bench.check(bench.with_picture(bytes(png))), "broken", ":2")


@fault("44", SECTION, "zero bytes, a text, a web page, SVG, PDF called .jpg")
def no_picture(bench: Bench) -> Outcome:
    cases = {"empty": b"", "text": b"hello", "html": b"<html>403</html>", "svg": b"<svg/>", "pdf": b"%PDF-1.4\n"}
    outcomes = {}
    for name, data in cases.items():
        outcomes[name] = refused(bench.check(bench.with_picture(data, f"{name}.jpg")), f"{name}.jpg", ":2")
    return worst(outcomes)


@fault("45", SECTION, "a header that says 60,000 x 60,000")
def bomb(bench: Bench) -> Outcome:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")
    return refused(bench.check(bench.with_picture(png)), "more than", ":2")


@fault("46", SECTION, "190 KB that unpack to 14,000 x 14,000", slow=True)
def small_bomb(bench: Bench) -> Outcome:
    out = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(out, "PNG")
    ended = bench.check(bench.with_picture(out.getvalue()))
    return used(ended) if ended.status == 0 else refused(ended, "more than")


@fault("47", SECTION, "30,000 x 1, 1 x 30,000, 1 x 1")
def shapes(bench: Bench) -> Outcome:
    sizes = ((30_000, 1), (1, 30_000), (1, 1))
    outcomes = {}
    for size in sizes:
        data = bench.with_picture(encoded("PNG", size=size))
        outcomes[str(size)] = worst({"check": used(bench.check(data)), "train": used(bench.train(data=data))})
        bench.out = bench.folder / f"out-{len(outcomes)}"
    return worst(outcomes)


@fault("48", SECTION, "alpha, CMYK, 16 bits, a palette, greys, a GIF")
def modes(bench: Bench) -> Outcome:
    cases = {mode: encoded("PNG", mode) for mode in ("RGBA", "LA", "P", "L", "I;16")}
    cases |= {"CMYK": encoded("JPEG", "CMYK"), "GIF": encoded("GIF", "P"), "webp": encoded("WEBP")}
    return worst({name: used(bench.check(bench.with_picture(data))) for name, data in cases.items()})


@fault("49", SECTION, "a link out of the folder; one inside it")
def links(bench: Bench) -> Outcome:
    pairs = bench.folder / "pairs"
    (bench.folder / "secret.png").write_bytes(bench.picture())
    (pairs / "out.png").symlink_to(bench.folder / "secret.png")
    (pairs / "in.png").symlink_to(pairs / "1.png")
    outside = refused(bench.check(bench.with_row(image="out.png")), "not inside", ":2")
    return worst({"out": outside, "inside": used(bench.check(bench.with_row(image="in.png")))})


@fault("50", SECTION, "a link that points to itself")
def loop(bench: Bench) -> Outcome:
    (bench.folder / "pairs" / "loop.png").symlink_to("loop.png")
    return refused_everywhere(bench, bench.check(bench.with_row(image="loop.png")), "loop.png", "p1")


@fault("51", SECTION, "a FIFO as a picture")
def fifo(bench: Bench) -> Outcome:
    os.mkfifo(bench.folder / "pairs" / "fifo.png")
    return refused_everywhere(bench, bench.check(bench.with_row(image="fifo.png")), "fifo.png", "p1")


@fault("51b", SECTION, "a device as a picture: a link to /dev/zero, with --image-root /")
def device(bench: Bench) -> Outcome:
    rows = [row | {"image": str(bench.folder / "pairs" / row["image"])} for row in bench.pairs]
    rows[1]["image"] = "/dev/zero"
    return refused(bench.check(bench.data(rows), "--image-root", "/"), "/dev/zero", ":2")


@fault("52", SECTION, "PostScript called .jpg, with a `gs` on PATH")
def postscript(bench: Bench) -> Outcome:
    marker, bin = bench.folder / "gs-ran", bench.folder / "bin"
    bin.mkdir()
    (bin / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (bin / "gs").chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{bin}:{before}"
    try:
        outcome = refused(bench.check(bench.with_picture(eps, "evil.jpg")), "evil.jpg", ":2")
    finally:
        os.environ["PATH"] = before
    return outcome if not marker.exists() else Outcome("BUG", "gs was run")


@fault("53", SECTION, "AVIF, one byte flipped at 30 places")
def avif(bench: Bench) -> Outcome:
    whole = encoded("AVIF")
    outcomes = {}
    for i in range(0, len(whole), len(whole) // 29):
        data = bytearray(whole)
        data[i] ^= 255
        ended = bench.check(bench.with_picture(bytes(data), "x.avif"))
        outcomes[f"byte {i}"] = used(ended) if ended.status == 0 else refused(ended, "cannot be used: 1", ":2:")
    return worst(outcomes)


@fault("54", SECTION, "../../etc/passwd, /etc/passwd, an absolute path outside")
def escape(bench: Bench) -> Outcome:
    paths = ("../../../../../../etc/passwd", "/etc/passwd", str(bench.folder / "base" / "config.json"))
    return worst({path: refused(bench.check(bench.with_row(image=path)), "not inside", ":2") for path in paths})


@fault("55", SECTION, "http:// and file:// as a picture")
def address(bench: Bench) -> Outcome:
    paths = ("http://127.0.0.1:9/a.png", "file:///etc/passwd")
    return worst({path: refused(bench.check(bench.with_row(image=path)), ":2", "://") for path in paths})


@fault("56", SECTION, "a folder, 300 letters, a newline, RTL override, %6f, ?x=1, a NUL as a path")
def odd_paths(bench: Bench) -> Outcome:
    paths = (".", "a" * 300, "1\n.png", "\u202e1.png", "%31.png", "1.png?x=1", "1.png\x00", "")
    return worst(
        {
            repr(path)[:12]: refused(bench.check(bench.with_row(image=path)), "cannot be used: 1", ":2:")
            for path in paths
        }
    )


@fault("30", SECTION, "a picture that is cut while the run goes on")
def cut_in_a_run(bench: Bench) -> Outcome:
    return changed_in_a_run(bench, lambda file: file.write_bytes(file.read_bytes()[:80]))


@fault("29", SECTION, "a picture that is deleted while the run goes on")
def deleted_in_a_run(bench: Bench) -> Outcome:
    return changed_in_a_run(bench, lambda file: file.unlink())


def changed_in_a_run(bench: Bench, change) -> Outcome:
    from unittest import mock

    import train

    decide = train.usable

    def then_change(*rest):
        pairs = decide(*rest)
        for i in range(5):
            change(bench.folder / "pairs" / f"{i}.png")
        return pairs

    with mock.patch.object(train, "usable", then_change):
        return refused(bench.train(), ".png", "pairs.jsonl:")


@fault("58", SECTION, "300 mutated files of six formats", slow=True)
def mutated(bench: Bench) -> Outcome:
    import random

    import pictures

    draw, uncaught = random.Random(0), []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(kind, "P" if kind == "GIF" else "RGB")
        for _ in range(50):
            data = bytearray(whole)
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            try:
                pictures.open_image(bytes(data))
            except ValueError:
                pass
            except Exception as error:  # what is looked for
                uncaught.append(f"{kind}: {error!r}")
    return holds(not uncaught, "0 uncaught", f"{len(uncaught)} uncaught, such as {uncaught[:1]}")
