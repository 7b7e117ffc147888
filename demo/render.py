"""Draws scenes of the demo world with OpenCV: frames for training, and real video files."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from demo.scene import SIDE, STEPS_PER_CHUNK, Scene, Sprite
from framesink.runtime.arrays import AnyArray, Float32Array, UInt8Array
from framesink.runtime.errors import VideoError

_SUBPIXEL_BITS = 4
_SUBPIXEL = 1 << _SUBPIXEL_BITS

# Hue (OpenCV: 0 to 179), saturation and value of the colours.
_HSV = {
    "red": (0, 225, 215),
    "green": (60, 215, 165),
    "blue": (114, 225, 215),
    "yellow": (28, 225, 235),
    "purple": (146, 190, 175),
    "cyan": (90, 200, 225),
}


class Renderer:
    """Draws one scene at one size. Style (background, noise, light) follows the scene's seed."""

    def __init__(self, scene: Scene, size: int = SIDE) -> None:
        self.scene, self.size = scene, size
        self.scale = size / SIDE
        self.random = np.random.default_rng([scene.seed, 7])
        self.background = _background(self.random, size)
        self.paint = {
            id(sprite): {colour: _paint(self.random, colour) for colour in set(sprite.colours)}
            for sprite in scene.sprites
        }
        sigma = float(self.random.uniform(0.0, 7.0))
        tile = self.random.normal(0.0, sigma, (size + 64, size + 64, 3))
        self.noise = tile.astype(np.int16)
        self.flicker = float(self.random.uniform(0.0, 0.15))
        self.flicker_rate = float(self.random.uniform(0.1, 1.5))
        self.phase = float(self.random.uniform(0, 2 * np.pi))

    def frame(self, seconds: float) -> UInt8Array:
        """The picture at a time of the video, uint8 RGB `[size, size, 3]`."""
        position = seconds * STEPS_PER_CHUNK
        step = int(position)
        picture = self.background.copy()
        for sprite in self.scene.sprites:
            if sprite.first_step <= position <= sprite.last_step:
                self._draw(picture, sprite, step, position - step)
        light = 1.0 + self.flicker * float(np.sin(self.flicker_rate * seconds + self.phase))
        picture = cv2.convertScaleAbs(picture, alpha=light)
        dx, dy = (int(value) for value in self.random.integers(0, 64, 2))
        grain = self.noise[dy : dy + self.size, dx : dx + self.size]
        noisy: UInt8Array = cv2.add(picture, grain, dtype=cv2.CV_8U)
        return noisy

    def _draw(self, picture: UInt8Array, sprite: Sprite, step: int, part: float) -> None:
        x, y = sprite.centre(step)
        colour = sprite.colour(step)
        if part > 0:
            next_x, next_y = sprite.centre(step + 1)
            x, y = x + (next_x - x) * part, y + (next_y - y) * part
            colour = colour if part < 0.5 else sprite.colour(step + 1)
        paint = self.paint[id(sprite)][colour]
        if len(sprite.outline):
            corners = (sprite.outline + np.array([x, y], np.float32)) * self.scale - 0.5
            points = np.round(corners * _SUBPIXEL).astype(np.int32)
            cv2.fillPoly(picture, [points], paint, cv2.LINE_AA, _SUBPIXEL_BITS)
            return
        centre = tuple(round((value * self.scale - 0.5) * _SUBPIXEL) for value in (x, y))
        radius = round(sprite.radius * self.scale * _SUBPIXEL)
        cv2.circle(picture, centre, radius, paint, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)


def render_chunks(
    scene: Scene, *, drawn_at: int = SIDE, shown_at: int = SIDE, jpeg_quality: int | None = None
) -> UInt8Array:
    """The frames the model is shown: uint8 `[chunks, 2, shown_at, shown_at, 3]`.

    They are drawn at `drawn_at` pixels, compressed as JPEG if a quality is given, and resized.
    """
    renderer = Renderer(scene, drawn_at)
    frames = np.empty((scene.seconds, STEPS_PER_CHUNK, shown_at, shown_at, 3), np.uint8)
    for chunk in range(scene.seconds):
        for step in range(STEPS_PER_CHUNK):
            frame = renderer.frame(chunk + step / STEPS_PER_CHUNK)
            if jpeg_quality is not None:
                frame = _through_jpeg(frame, jpeg_quality)
            if drawn_at != shown_at:
                frame = cv2.resize(frame, (shown_at, shown_at), interpolation=cv2.INTER_AREA)
            frames[chunk, step] = frame
    return frames


def write_video(scene: Scene, path: Path, *, size: int = 336, fps: int = 8) -> None:
    """Write the whole scene as an MP4 file. `fps` must be even. Raises VideoError if it cannot."""
    write_scenes([scene], path, size=size, fps=fps)


def write_scenes(scenes: Sequence[Scene], path: Path, *, size: int, fps: int) -> None:
    """Write scenes one after another as one MP4 file; see `write_video`."""
    if fps % STEPS_PER_CHUNK:
        raise VideoError(f"{fps} frames a second do not meet the half seconds; use an even number.")
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), fourcc, float(fps), (size, size))
    if not writer.isOpened():
        raise VideoError(f"OpenCV cannot write {path}; check the folder and OpenCV's codecs.")
    for scene in scenes:
        renderer = Renderer(scene, size)
        for index in range(scene.seconds * fps):
            writer.write(cv2.cvtColor(renderer.frame(index / fps), cv2.COLOR_RGB2BGR))
    writer.release()


def _through_jpeg(frame: UInt8Array, quality: int) -> UInt8Array:
    _, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded: UInt8Array = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return decoded


def _paint(random: np.random.Generator, colour: str) -> tuple[int, ...]:
    """One shade of a colour, RGB."""
    hue, saturation, value = _HSV[colour]
    shade = np.array(
        [
            (hue + random.integers(-3, 4)) % 180,
            np.clip(saturation + random.integers(-25, 26), 0, 255),
            np.clip(value + random.integers(-25, 21), 0, 255),
        ],
        np.uint8,
    )
    rgb = cv2.cvtColor(shade.reshape(1, 1, 3), cv2.COLOR_HSV2RGB).reshape(3)
    return tuple(int(channel) for channel in rgb)


def _grey(random: np.random.Generator) -> Float32Array:
    """A dull colour, RGB."""
    value = float(random.choice([random.uniform(20, 95), random.uniform(150, 225)]))
    tinted: Float32Array = (value + random.uniform(-14, 14, 3)).astype(np.float32)
    return tinted


def _background(random: np.random.Generator, size: int) -> UInt8Array:
    """Flat, gradient, stripes, checks or clouds in dull colours, uint8 `[size, size, 3]`."""
    first = _grey(random)
    second = first + random.uniform(-40, 40) + random.uniform(-8, 8, 3).astype(np.float32)
    axis = np.linspace(0.0, 1.0, size, dtype=np.float32)
    columns, rows = np.meshgrid(axis, axis)
    angle = random.uniform(0, 2 * np.pi)
    slope = columns * np.cos(angle) + rows * np.sin(angle)
    kind = random.choice(["flat", "gradient", "stripes", "checks", "clouds"])
    blend: AnyArray
    if kind == "flat":
        blend = np.zeros((size, size), np.float32)
    elif kind == "gradient":
        blend = (slope - slope.min()) / np.ptp(slope)
    elif kind == "stripes":
        blend = 0.3 + 0.3 * np.sin(slope * random.uniform(15, 60))
    elif kind == "checks":
        cells = int(random.integers(4, 12))
        blend = 0.6 * ((columns * cells).astype(int) + (rows * cells).astype(int) & 1)
    else:
        coarse = random.uniform(0, 1, (7, 7)).astype(np.float32)
        blend = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    picture = first + (second - first) * blend[..., None].astype(np.float32)
    clipped: UInt8Array = np.clip(picture, 0, 255).astype(np.uint8)
    return clipped
