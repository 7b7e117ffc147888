"""Hostile chunks: pictures that lie, times that run backwards, tensors that do not fit."""

import math
from collections.abc import Callable

import numpy as np

from framesink.serving import contract
from reference import hostile_images as images
from reference.hostile_requests import Attack, Attacker, Content, array, ours, strings

SIDE = 56
# Sizes of the demo model.
HIDDEN, PATCH_DIM = 256, 1176
NO_SECONDS = (math.nan, math.inf, -math.inf, -1.0, -1e-9, 1e9, 1e308)
UNFIT_IMAGE = ours("A frame (is|says|of)")


def _good_frames(attacker: Attacker, count: int = 2) -> Content:
    return strings("FRAMES", *[images.picture(attacker.rng, ".jpg", side=SIDE)] * count)


def _frames(
    name: str, refusal: str, file: bytes, attacker: Attacker, *, sure: bool = True
) -> Attack:
    """A chunk one of whose two frames is this file."""
    files = [images.picture(attacker.rng, ".png", side=SIDE), file]
    attacker.rng.shuffle(files)  # type: ignore[arg-type]
    return attacker.attack(name, refusal, strings("FRAMES", *files), sure=sure)


def cut_picture(attacker: Attacker) -> Attack:
    file = images.picture(attacker.rng, attacker.pick((".png", ".jpg")), side=SIDE)
    return _frames("cut picture", UNFIT_IMAGE, images.cut(attacker.rng, file), attacker)


def flipped_picture(attacker: Attacker) -> Attack:
    file = images.picture(attacker.rng, attacker.pick((".png", ".jpg")), side=SIDE)
    refusal = ours("(A frame|The frames of a chunk)")
    damaged = images.flipped(attacker.rng, file)
    return _frames("flipped picture", refusal, damaged, attacker, sure=False)


def no_picture(attacker: Attacker) -> Attack:
    file = attacker.pick((*images.OTHER_FORMATS, attacker.rng.bytes(500)))
    return _frames("no picture", UNFIT_IMAGE, file, attacker)


def bomb(attacker: Attacker) -> Attack:
    rng = attacker.rng
    side = int(rng.integers(3000, 65_536))
    file = attacker.pick((images.png_bomb(rng), images.jpeg_saying(rng, side, 65_000)))
    return attacker.attack("bomb", ours("A frame of [0-9]+×[0-9]+ pixels"), strings("FRAMES", file))


def lying_picture(attacker: Attacker) -> Attack:
    """It says it is taller, or has more in it, than it is; decoders may fill or drop the rest."""
    rng = attacker.rng
    taller = images.png(SIDE, SIDE, images.rows(SIDE, SIDE // 2))
    fuller = images.png(SIDE, SIDE, images.rows(SIDE, 20_000))
    text = images.png_chunk(b"zTXt", b"a\0\0" + bytes(100_000))
    profile = images.png_chunk(b"iCCP", b"a\0\0" + bytes(100_000))
    extras = images.png(SIDE, SIDE, images.rows(SIDE, SIDE), text, profile)
    larger = images.jpeg_saying(rng, SIDE, 4 * SIDE)
    file = attacker.pick((taller, fuller, extras, larger))
    return attacker.attack("lying picture", UNFIT_IMAGE, strings("FRAMES", file), sure=False)


def many_scans(attacker: Attacker) -> Attack:
    return _frames("scans", ours("A frame .*scans"), images.many_scans(attacker.rng), attacker)


def unlike_frames(attacker: Attacker) -> Attack:
    other = images.picture(attacker.rng, ".png", side=SIDE + 1)
    return _frames(
        "unlike frames", ours("The frames of a chunk must be of one size"), other, attacker
    )


def many_frames(attacker: Attacker) -> Attack:
    frames = _good_frames(attacker, int(attacker.rng.integers(65, 200)))
    return attacker.attack("many frames", ours("A chunk has [0-9]+ frames"), frames)


def shapeless_frames(attacker: Attacker) -> Attack:
    width = int(attacker.rng.integers(1000, 3000))
    raw = array("RAW_FRAMES", np.zeros((1, 2, width, 3)))
    return attacker.attack("a line", ours("[^\n]*(aspect|ratio|pixels|wide)"), raw)


def two_kinds_of_frames(attacker: Attacker) -> Attack:
    raw = array("RAW_FRAMES", np.zeros((1, SIDE, SIDE, 3)))
    refusal = ours("A request has FRAMES or RAW_FRAMES, not both")
    return attacker.attack("two kinds of frames", refusal, _good_frames(attacker), raw)


def empty_frames(attacker: Attacker) -> Attack:
    """Frames without a pixel are no frames."""
    shape = attacker.pick(((0, SIDE, SIDE, 3), (2, 0, 0, 3), (5, 0, SIDE, 3)))
    raw = array("RAW_FRAMES", np.zeros(shape))
    return attacker.attack("empty frames", None, raw)


def no_seconds(attacker: Attacker) -> Attack:
    second = attacker.pick(NO_SECONDS)
    values = attacker.pick(((second, 1.0), (0.0, second)))
    name = attacker.pick(("TIMESTAMPS", "CHUNK_SPAN"))
    refusal = ours(f"({name} holds|The timestamps of a chunk's frames must not run backwards)")
    return attacker.attack("no seconds", refusal, _good_frames(attacker), array(name, values))


def bad_times(attacker: Attacker) -> Attack:
    name, values, sentence = attacker.pick(
        (
            ("TIMESTAMPS", (2.0, 1.0), "The timestamps of a chunk's frames must not run backwards"),
            ("TIMESTAMPS", (1e7, 1e7, 1e7), "2 frames came with 3 timestamps"),
            ("TIMESTAMPS", (1e7,), "2 frames came with 1 timestamps"),
            ("CHUNK_SPAN", (0.0,), "CHUNK_SPAN has 1 numbers"),
            ("CHUNK_SPAN", (0.0, 1.0, 2.0), "CHUNK_SPAN has 3 numbers"),
            ("CHUNK_SPAN", (1.0, 1.0), "A chunk from 1 s to 1 s has no length"),
            ("CHUNK_SPAN", (3.0, 1.0), "A chunk from 3 s to 1 s has no length"),
            ("CHUNK_SPAN", (1e6, 1e7), "The chunk is "),
        )
    )
    times = array(name, values)
    return attacker.attack("bad times", ours(sentence), _good_frames(attacker), times)


def wrong_packing(attacker: Attacker) -> Attack:
    """Shapes inside of the content that it does not have."""
    side = attacker.pick((-1, -SIDE, 0, 1 << 31, 1 << 61, (1 << 63) - 1))
    lies = attacker.pick(
        (
            np.array((2, side, SIDE, 3), "<i8").tobytes() + bytes(99),
            np.array((side, side, side, 3), "<i8").tobytes() + bytes(99),
            np.array((2, 3, 3, 4), "<i8").tobytes() + bytes(72),
            attacker.rng.bytes(200),
            attacker.rng.bytes(31),
        )
    )
    content = ("RAW_FRAMES", "UINT8", (len(lies),), lies)
    refusal = ours("RAW_FRAMES (is not packed as|of the packed shape)")
    return attacker.attack("wrong packing", refusal, content)


def bad_embeddings(attacker: Attacker) -> Attack:
    grid, chunk = ((1, 8, 8),), (math.nan, math.nan, 2.0)
    rows = np.zeros((16, HIDDEN), np.float32)
    spoilt = rows.copy()
    spoilt[3, 5] = attacker.pick((math.nan, math.inf, -math.inf, 1e30))
    given = attacker.pick(
        (
            (spoilt, grid, chunk),
            (rows[1:], grid, chunk),
            (rows[:, 1:], grid, chunk),
            (rows, ((1, 4, 4),), chunk),
            (rows, ((0, 8, 8),), chunk),
            (rows, ((-1, -8, 8),), chunk),
            (rows, ((2**31 - 1, 2**31 - 1, 4),), chunk),
            (rows, ((1, 7, 9),), chunk),
            (rows, np.zeros((0, 3)), chunk),
            (rows, (grid[0], grid[0]), chunk),
            (rows, grid, ()),
            (rows, grid, (0.0, 1.0)),
            (rows, grid, (0.0, 1.0, math.nan)),
            (rows, grid, (0.0, 1.0, 0.0)),
            (rows, grid, (0.0, 1.0, 1e9)),
            (rows, grid, (-1.0, 1.0, 2.0)),
            (rows, grid, (1.0, 0.0, 2.0)),
            (rows, grid, (0.0, math.inf, 2.0)),
            (np.zeros((4096, HIDDEN)), ((1, 128, 128),), chunk),
        )
    )
    names = ("EMBEDDINGS", "GRID", "CHUNK")
    tensors = [array(name, values) for name, values in zip(names, given, strict=True)]
    model = contract.LANGUAGE_MODEL
    return attacker.attack("bad embeddings", ours(""), *tensors, model=model)


def bad_patches(attacker: Attacker) -> Attack:
    patches = np.zeros((64, PATCH_DIM), np.float32)
    spoilt = patches.copy()
    spoilt[7, 11] = attacker.pick((math.nan, math.inf, -math.inf))
    values, grid, refusal = attacker.pick(
        (
            (spoilt, ((1, 8, 8),), ours("PATCHES must be finite")),
            (patches[1:], ((1, 8, 8),), ours("PATCHES .* are not those of a grid")),
            (patches, ((-1, -8, 8),), ours("PATCHES .* are not those of a grid")),
            (patches, ((2**31 - 1,) * 3,), ours("PATCHES .* are not those of a grid")),
            (patches[:0], ((0, 8, 8),), ours("PATCHES .* are not those of a grid")),
            (patches[1:], ((1, 7, 9),), ours("PATCHES .* are not those of a grid")),
            (np.zeros((68, PATCH_DIM)), ((1, 2, 34),), ours("A chunk of 68 patches is larger")),
            (patches, ((1, 8, 8),) * 2, ours("GRID must be of shape")),
            (patches[:, 1:], ((1, 8, 8),), ours("PATCHES .* are not those of a grid")),
        )
    )
    tensors = (array("PATCHES", values), array("GRID", grid))
    return attacker.stray("bad patches", refusal, contract.VISION_ENCODER, *tensors)


def bad_frames_alone(attacker: Attacker) -> Attack:
    """`preprocess` answers with the refusal, which is for `language_model` to say."""
    good = _good_frames(attacker)
    tensors, refusal = attacker.pick(
        (
            ((strings("FRAMES", attacker.rng.bytes(99)),), "A frame is neither"),
            ((strings("FRAMES", images.png_bomb(attacker.rng)),), "A frame of "),
            ((good, array("TIMESTAMPS", (math.nan, 0.0))), "TIMESTAMPS holds nan"),
            ((good, array("CHUNK_SPAN", (2.0, 1.0))), "A chunk from 2 s to 1 s"),
            ((_good_frames(attacker, 65),), "A chunk has 65 frames"),
            ((_good_frames(attacker, 64),), "A chunk of 64 frames makes 2048 patches"),
        )
    )
    sentence = rf"INVALID_ARGUMENT {refusal}[^\n]*\.$"
    return attacker.stray("bad frames alone", sentence, contract.PREPROCESS, *tensors)


CHUNK_ATTACKS: tuple[Callable[[Attacker], Attack], ...] = (
    cut_picture,
    flipped_picture,
    no_picture,
    bomb,
    lying_picture,
    many_scans,
    unlike_frames,
    many_frames,
    shapeless_frames,
    two_kinds_of_frames,
    empty_frames,
    no_seconds,
    bad_times,
    wrong_packing,
    bad_embeddings,
    bad_patches,
    bad_frames_alone,
)
