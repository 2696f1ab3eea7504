"""Training images made from cut-outs: objects and drawn thin structures over photographs or generated backgrounds.

Every function draws from the `numpy.random.Generator` it is given and from nothing else: the same generator state gives
the same picture. Pictures are 8-bit PIL images, sizes are (height, width), lengths are pixels unless said otherwise.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageStat

from .image_loading import IMAGE_SUFFIXES, load_image


# Thin structures are drawn this many times larger and averaged down: an alpha of 16 steps per pixel, exact enough.
_SUPERSAMPLING = 3

_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, by name; hidden files and other files are left out, any case of suffix.

    Links that lead nowhere are among them, so that whoever opens them can name them.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or path.is_symlink())
    )


def random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """An RGB colour; about half are greyish, as most surfaces are."""
    colour = rng.integers(0, 256, 3).astype(float)
    saturation = 1.0 if rng.random() < 0.5 else rng.uniform(0.0, 0.4)
    return tuple(int(value) for value in colour.mean() + saturation * (colour - colour.mean()))


def palette(rng: np.random.Generator) -> np.ndarray:
    """A smooth run of colours, (256, 3) uint8: two to four stops, unrelated or shades of one colour."""
    stops = rng.integers(2, 5)
    if rng.random() < 0.5:
        colours = np.array([random_colour(rng) for _ in range(stops)], dtype=float)
    else:
        colours = np.array(random_colour(rng)) * rng.uniform(0.5, 1.5, (stops, 1)) + rng.normal(0, 15, (stops, 3))
    positions = np.linspace(0, 255, stops)
    channels = [np.interp(np.arange(256), positions, colours[:, channel]) for channel in range(3)]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def colourise(rng: np.random.Generator, field: np.ndarray) -> Image.Image:
    """An RGB picture of a field of values in [0, 1] through a random palette."""
    return Image.fromarray(palette(rng)[(np.clip(field, 0, 1) * 255).astype(np.uint8)])


def smooth_field(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Bicubic noise with `cells` random values along each side: (height, width) float32, about [0, 1]."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC))


def noise_field(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Several octaves of `smooth_field`, stretched to [0, 1]: clouds, stone, foliage from afar."""
    cells, persistence = int(rng.integers(2, 9)), rng.uniform(0.4, 0.75)
    field = smooth_field(rng, size, cells).copy()
    amplitude = 1.0
    while (cells := cells * 2) < min(size) and amplitude > 0.1:
        amplitude *= persistence
        field += np.float32(amplitude) * smooth_field(rng, size, cells)
    field -= field.min()
    return field / max(float(field.max()), 1e-6)


def _lighting(rng: np.random.Generator, image: Image.Image, darkest: float) -> Image.Image:
    """Multiplies by a slowly varying, faintly coloured light between about `darkest` and 1 (somewhere full)."""
    light = rng.uniform(darkest, 1.0, (3, 3, 1)) * rng.uniform(0.93, 1.0, (3, 3, 3))
    light = Image.fromarray((light * (255 / light.max())).astype(np.uint8))
    light = light.resize(image.size, Image.Resampling.BICUBIC)
    return ImageChops.multiply(image, light)


def _colour_shift(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB picture by one colour matrix."""
    hue = rng.uniform(-math.pi, math.pi) if rng.random() < 0.15 else rng.normal(0, 0.15)
    saturation, contrast = rng.uniform(0.4, 1.4), rng.uniform(0.65, 1.3)
    rotation = saturation * np.array([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    in_yiq = np.eye(3)
    in_yiq[1:, 1:] = rotation
    matrix = contrast * np.linalg.inv(_RGB_TO_YIQ) @ in_yiq @ _RGB_TO_YIQ
    offset = 128 * (1 - contrast) + rng.uniform(-30, 30)
    return image.convert("RGB", np.hstack([matrix, np.full((3, 1), offset)]).ravel().tolist())


def background_colour(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """One flat colour; white and black are frequent, as in product pictures."""
    colour = random_colour(rng)
    if rng.random() < 0.3:
        colour = (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
    return Image.new("RGB", size[::-1], colour)


def background_gradient(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A linear or radial run of colours: studio paper, sky."""
    y, x = np.mgrid[0:1:96j, 0:1:96j].astype(np.float32)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        field = x * math.cos(angle) + y * math.sin(angle)
    else:
        field = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1))
    field = (field - field.min()) / (field.max() - field.min())
    return colourise(rng, field).resize(size[::-1], Image.Resampling.BICUBIC)


def background_noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Coloured clouds."""
    return colourise(rng, noise_field(rng, size))


def background_texture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A repeated pattern, turned and bent: stripes, checks, bricks, dots, weave or wood."""
    scale = 1 / min(size)
    y, x = np.meshgrid(
        np.arange(size[0], dtype=np.float32) * scale, np.arange(size[1], dtype=np.float32) * scale, indexing="ij"
    )
    angle, frequency = rng.uniform(-0.6, 0.6), np.float32(rng.uniform(3, 25))
    u = (x * math.cos(angle) + y * math.sin(angle)) * frequency
    v = (y * math.cos(angle) - x * math.sin(angle)) * frequency
    if rng.random() < 0.5:
        u += np.float32(rng.uniform(0.2, 2)) * smooth_field(rng, size, 4)
    match rng.integers(0, 6):
        case 0:  # stripes
            field = np.sin(2 * np.pi * u) * np.float32(rng.uniform(0.5, 4))
        case 1:  # checks
            field = 2.0 * ((np.floor(u) + np.floor(v)) % 2) - 1
        case 2:  # bricks: every other row moved by half a brick, mortar between
            row = np.floor(v)
            along, across = (u / 2 + row / 2) % 1, v % 1
            field = (
                2.0 * ((along > 0.05) & (across > 0.1)) - 1 + 0.4 * np.sin(7 * row + 13 * np.floor(u / 2 + row / 2))
            )
        case 3:  # dots
            field = 8 * (np.float32(rng.uniform(0.15, 0.45)) - np.hypot(u % 1 - 0.5, v % 1 - 0.5))
        case 4:  # weave
            field = np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v)
        case _:  # wood: rings bent by noise, long along one direction
            field = np.sin(u + 6 * smooth_field(rng, size, 5) + 0.15 * v)
    field = 0.5 + 0.35 * np.clip(field, -1.2, 1.2)
    if rng.random() < 0.7:
        field = field + np.float32(rng.uniform(0.05, 0.4)) * (smooth_field(rng, size, int(rng.integers(8, 128))) - 0.5)
    return colourise(rng, field)


def background_bokeh(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Lights far out of focus: soft bright discs on a darker gradient."""
    half = (max(1, size[0] // 2), max(1, size[1] // 2))
    image = background_gradient(rng, half).point(lambda value: value * 0.5)
    light = Image.new("RGB", image.size)
    draw = ImageDraw.Draw(light)
    colours = [random_colour(rng) for _ in range(3)]
    largest = rng.uniform(0.03, 0.12) * min(half)
    for _ in range(rng.integers(15, 60)):
        radius = largest * rng.uniform(0.4, 1.0)
        y, x = rng.uniform(0, 1, 2) * half
        colour = tuple(int(value * rng.uniform(0.3, 0.9)) for value in colours[rng.integers(0, 3)])
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    light = light.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return ImageChops.screen(image, light).resize(size[::-1], Image.Resampling.BICUBIC)


def background_shapes(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Overlapping flat shapes: posters, walls, furniture seen without detail."""
    image = background_gradient(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 16)):
        centre = rng.uniform(0, 1, 2) * size[::-1]
        corners = rng.integers(3, 7)
        # Spread around the centre: slivers would look like the thin structures that are foreground.
        angles = 2 * math.pi * (np.arange(corners) + rng.uniform(0, 0.6, corners)) / corners
        radii = rng.uniform(0.15, 0.5, corners) * min(size)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * radii[:, None] + centre
        draw.polygon([tuple(point) for point in points.tolist()], fill=random_colour(rng))
    return image


def background_room(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A wall and a floor that meet in a line: something for objects to stand before."""
    surfaces = (background_colour, background_gradient, background_noise, background_texture)
    wall, floor = (surfaces[rng.integers(0, len(surfaces))](rng, size) for _ in range(2))
    horizon, slope = rng.uniform(0.4, 0.8) * size[0], rng.normal(0, 0.05) * size[0]
    mask = Image.new("L", size[::-1])
    corners = [(0, horizon - slope), (size[1], horizon + slope), (size[1], size[0]), (0, size[0])]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    wall.paste(_lighting(rng, floor, 0.5), mask=mask)
    return wall


GENERATED_BACKGROUNDS: tuple[Callable[[np.random.Generator, tuple[int, int]], Image.Image], ...] = (
    background_colour,
    background_gradient,
    background_noise,
    background_texture,
    background_bokeh,
    background_shapes,
    background_room,
)


def generated_background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """One of `GENERATED_BACKGROUNDS`, often unevenly lit. RGB of the given size."""
    image = GENERATED_BACKGROUNDS[rng.integers(0, len(GENERATED_BACKGROUNDS))](rng, size)
    return _lighting(rng, image, 0.4) if rng.random() < 0.6 else image


def photo_background(rng: np.random.Generator, size: tuple[int, int], photo: Image.Image) -> Image.Image:
    """A random part of a photograph with the canvas' shape, at least half of what fits; often mirrored, recoloured."""
    scale = rng.uniform(0.5, 1.0) * min(photo.width / size[1], photo.height / size[0])
    width, height = size[1] * scale, size[0] * scale
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    image = photo.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
    return _colour_shift(rng, image) if rng.random() < 0.5 else image


@functools.lru_cache(maxsize=8)  # for pictures of 2304 pixels up to 340 MB in each process
def _open_photo(path: Path, largest: int) -> Image.Image:
    """A photograph no larger than needed, kept: decoding a camera's picture costs more than the composite."""
    photo = load_image(str(path))
    photo.thumbnail((largest, largest), reducing_gap=2.0)
    return photo


# Thin structures: each function draws white on a black square of the given side.
def _visible(width: float) -> int:
    """A line's width, not under one pixel of the picture: nobody sees such a line."""
    return max(_SUPERSAMPLING, round(width))


def _line(draw: ImageDraw.ImageDraw, points: np.ndarray, width: float) -> None:
    draw.line([tuple(point) for point in points.tolist()], fill=255, width=_visible(width), joint="curve")


def _draw_wires(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """Hanging cables, from side to side or between two poles."""
    along = np.linspace(0, 1, 40)
    for _ in range(rng.integers(2, 8)):
        start, end = rng.uniform(0.1, 0.6, 2)
        sag = rng.uniform(0.02, 0.35)
        points = np.stack([along, start + (end - start) * along + 4 * sag * along * (1 - along)], axis=-1)
        _line(draw, points * side, side * rng.uniform(0.004, 0.015))
    if rng.random() < 0.5:
        for x in (rng.uniform(0.02, 0.3), rng.uniform(0.7, 0.98)):
            _line(draw, np.array([[x, 0.05], [x, 1.0]]) * side, side * rng.uniform(0.015, 0.03))
            _line(draw, np.array([[x - 0.08, 0.12], [x + 0.08, 0.12]]) * side, side * 0.012)


def _draw_net(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A mesh that hangs in folds."""
    count, width = rng.integers(6, 20), side * rng.uniform(0.003, 0.009)
    phase, depth, waves = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0, 0.06, 2), rng.uniform(0.5, 2.5, 2)
    along = np.linspace(0, 1, 40)
    for position in np.linspace(0, 1, count):
        for column in (True, False):
            x, y = (np.full_like(along, position), along) if column else (along, np.full_like(along, position))
            bent_x = x + depth[0] * np.sin(2 * math.pi * waves[0] * y + phase[0])
            bent_y = y + depth[1] * np.sin(2 * math.pi * waves[1] * x + phase[1])
            _line(draw, (0.08 + 0.84 * np.stack([bent_x, bent_y], axis=-1)) * side, width)


def _draw_branches(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A bare tree: each branch splits into two or three thinner ones."""
    branches = [(np.array([0.5, 0.98]), -math.pi / 2, rng.uniform(0.18, 0.28), rng.uniform(0.02, 0.045))]
    for _ in range(rng.integers(4, 7)):
        split = []
        for root, angle, length, width in branches:
            tip = root + length * np.array([math.cos(angle), math.sin(angle)])
            middle = (root + tip) / 2 + rng.normal(0, 0.06 * length, 2)
            _line(draw, np.stack([root, middle, tip]) * side, side * width)
            for _ in range(rng.integers(2, 4)):
                split.append((tip, angle + rng.normal(0, 0.5), length * rng.uniform(0.6, 0.85), width * 0.62))
        branches = split[:120]


def _draw_wheel(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A rim, a hub and spokes, straight or laced."""
    width, hub, rim = side * rng.uniform(0.003, 0.008), rng.uniform(0.03, 0.09), rng.uniform(0.38, 0.48)
    spokes, lacing = rng.integers(6, 33), rng.choice([0.0, 0.0, 0.5])
    for number, angle in enumerate(np.linspace(0, 2 * math.pi, spokes, endpoint=False)):
        inner = angle + lacing * (-1) ** number
        points = [[hub * math.cos(inner), hub * math.sin(inner)], [rim * math.cos(angle), rim * math.sin(angle)]]
        _line(draw, (0.5 + np.array(points)) * side, width)
    for radius, thickness in ((rim, side * rng.uniform(0.008, 0.035)), (hub, side * 0.012)):
        box = [(0.5 - radius) * side, (0.5 - radius) * side, (0.5 + radius) * side, (0.5 + radius) * side]
        draw.ellipse(box, outline=255, width=_visible(thickness))


def _draw_text(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """One to three lines of letters and digits, filled or as outlines."""
    lines = ["".join(rng.choice(list("ABCDEFGHKLMNPRSTUVXYZabcdeghknorsu023456789&"), rng.integers(3, 8)))]
    lines += ["".join(rng.permutation(list(lines[0]))) for _ in range(rng.integers(0, 3))]
    font = ImageFont.load_default(size=side * 1.5 / max(len(lines[0]), 2 * len(lines)))
    stroke = _visible(side * rng.uniform(0.003, 0.01))
    outline = rng.random() < 0.5
    draw.multiline_text(
        (side / 2, side / 2),
        "\n".join(lines),
        font=font,
        anchor="mm",
        align="center",
        fill=0 if outline else 255,
        stroke_width=stroke,
        stroke_fill=255,
    )


def _draw_lattice(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A tapering mast with crossed braces."""
    bottom, top, levels = rng.uniform(0.12, 0.35), rng.uniform(0.02, 0.12), rng.integers(4, 12)
    width = side * rng.uniform(0.004, 0.012)
    heights = 1 - np.cumsum(np.r_[0, rng.uniform(0.7, 0.95) ** np.arange(levels)])
    heights = 0.03 + 0.95 * (heights - heights.min()) / (heights.max() - heights.min())
    half_widths = top + (bottom - top) * (heights - heights.min()) / (heights.max() - heights.min())
    left, right = np.stack([0.5 - half_widths, heights], -1), np.stack([0.5 + half_widths, heights], -1)
    _line(draw, left * side, 1.6 * width)
    _line(draw, right * side, 1.6 * width)
    for level in range(levels):
        _line(draw, np.stack([left[level], right[level + 1]]) * side, width)
        _line(draw, np.stack([right[level], left[level + 1]]) * side, width)
        _line(draw, np.stack([left[level + 1], right[level + 1]]) * side, width)


def _draw_fence(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """Upright bars between rails: fence, cage, ladder."""
    count, width, top = rng.integers(4, 24), side * rng.uniform(0.004, 0.015), rng.uniform(0.1, 0.5)
    for x in np.linspace(0.06, 0.94, count):
        _line(draw, np.array([[x, top - rng.uniform(0, 0.05)], [x, 0.95]]) * side, width)
    for y in np.linspace(top + 0.04, 0.9, rng.integers(2, 4)):
        _line(draw, np.array([[0.04, y], [0.96, y]]) * side, 1.5 * width)


THIN_STRUCTURES: tuple[Callable[[ImageDraw.ImageDraw, np.random.Generator, int], None], ...] = (
    _draw_wires,
    _draw_net,
    _draw_branches,
    _draw_wheel,
    _draw_text,
    _draw_lattice,
    _draw_fence,
)


def thin_structure(rng: np.random.Generator, side: int) -> Image.Image:
    """One of `THIN_STRUCTURES` in a random material. RGBA of about `side` pixels, cut to its contents."""
    large = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    THIN_STRUCTURES[rng.integers(0, len(THIN_STRUCTURES))](ImageDraw.Draw(large), rng, large.width)
    alpha = large.reduce(_SUPERSAMPLING)
    alpha = alpha.crop(alpha.getbbox())
    material = colourise(rng, smooth_field(rng, (24, 24), int(rng.integers(2, 9))))
    image = material.resize(alpha.size, Image.Resampling.BICUBIC)
    image.putalpha(alpha)
    return image


def vary_object(
    rng: np.random.Generator, cutout: Image.Image, side: int, open_photo: Callable[[], Image.Image] | None = None
) -> Image.Image:
    """An RGBA cut-out resized to about `side` pixels, then mirrored, stretched, turned, recoloured, lit, perhaps blurred.

    Half of them get a surface, mostly a part of the photograph that `open_photo` returns, if given: cut-outs that are
    flat drawings would teach that what has texture is background.
    """
    box = cutout.getchannel("A").getbbox()
    if box is None:
        raise ValueError("A cut-out is fully transparent: it has no foreground to compose.")
    stretch = math.exp(rng.normal(0, 0.08))
    scale = side / max(box[2] - box[0], box[3] - box[1])
    width = max(1, round((box[2] - box[0]) * scale * stretch))
    height = max(1, round((box[3] - box[1]) * scale / stretch))
    cutout = cutout.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        cutout = cutout.rotate(float(np.clip(rng.normal(0, 20), -60, 60)), Image.Resampling.BILINEAR, expand=True)
    colour = cutout.convert("RGB")
    if rng.random() < 0.8:
        colour = _colour_shift(rng, colour)
    if rng.random() < 0.5:
        shape = (colour.height, colour.width)
        if open_photo is not None and rng.random() < 0.7:
            surface = photo_background(rng, shape, open_photo())
        else:
            surface = (background_texture if rng.random() < 0.6 else background_noise)(rng, shape)
        colour = Image.blend(colour, surface, rng.uniform(0.15, 0.85))
    if rng.random() < 0.7:
        colour = _lighting(rng, colour, 0.45)
    colour.putalpha(cutout.getchannel("A"))
    if rng.random() < 0.2:
        colour = _blur_cutout(colour, rng.uniform(0.4, 1.5))
    return colour


def _blur_cutout(cutout: Image.Image, radius: float) -> Image.Image:
    """Blurs colour and alpha together, premultiplied so that nothing bleeds in from where the cut-out is transparent."""
    return cutout.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


def _hard_light(rng: np.random.Generator, item: Image.Image) -> Image.Image:
    """A shadow with an edge across an object, or reflections of lamps on it: what is black or white is still the object."""
    shadow = rng.random() < 0.5
    if shadow:
        cells, level, colour = rng.integers(2, 6), rng.uniform(0.35, 0.65), (0, 0, 0)
    else:
        cells, level, colour = rng.integers(3, 12), rng.uniform(0.6, 0.85), (255, 255, 255)
    field = smooth_field(rng, (item.height, item.width), int(cells))
    inside = np.clip((field - np.float32(level)) * np.float32(rng.uniform(2, 40)), 0, 1)
    strength = rng.uniform(0.4, 0.95)
    lit = item.convert("RGB")
    lit.paste(colour, mask=Image.fromarray((inside * (255 * strength)).astype(np.uint8)))
    lit.putalpha(item.getchannel("A"))
    return lit


def _stand_out(item: Image.Image, canvas: Image.Image, coverage: Image.Image) -> Image.Image:
    """Moves an object's colour away from what it covers, where they are alike: a wire nobody sees teaches nothing."""
    own = np.array(ImageStat.Stat(item.convert("RGB"), item.getchannel("A")).mean)
    behind = np.array(ImageStat.Stat(canvas, coverage).mean)
    if np.abs(own - behind).max() > 60:
        return item
    towards = (255, 255, 255) if behind.mean() < 128 else (0, 0, 0)
    moved = Image.blend(item.convert("RGB"), Image.new("RGB", item.size, towards), 0.6)
    moved.putalpha(item.getchannel("A"))
    return moved


def _glass(rng: np.random.Generator, item: Image.Image, behind: Image.Image) -> Image.Image:
    """An object's shape in clear glass: what is behind it, bent and tinted, with rims and reflections.

    `behind` (RGB) has the size of `item` (RGBA). A trace of the object's own picture stays: the edges inside it.
    """
    width, height = item.size
    alpha = item.getchannel("A")
    zoom_x, zoom_y = rng.choice([-1, 1], 2) * rng.uniform(0.6, 1.6, 2)  # a thick glass turns the picture over
    matrix = (zoom_x, 0, width / 2 * (1 - zoom_x), 0, zoom_y, height / 2 * (1 - zoom_y))
    bent = behind.transform(item.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    bent = bent.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.01) * max(item.size)))
    glass = Image.blend(behind, bent, rng.uniform(0.2, 0.9))
    glass = Image.blend(glass, item.convert("L").convert("RGB"), rng.uniform(0, 0.2))
    glass = Image.blend(glass, Image.new("RGB", item.size, random_colour(rng)), rng.uniform(0, 0.15))
    # Darker or lighter towards the outline, where one looks along the wall.
    inner = alpha.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.05) * max(item.size)))
    strength = rng.uniform(0.5, 1.6)
    rim = inner.point(lambda value: (255 - value) * strength)
    glass.paste((255, 255, 255) if rng.random() < 0.5 else (20, 20, 20), mask=rim)
    # Windows and lamps along it.
    streaks = Image.fromarray(rng.random((2, int(rng.integers(4, 14))), dtype=np.float32))
    streaks = np.asarray(streaks.resize(item.size, Image.Resampling.BICUBIC)) * smooth_field(rng, (height, width), 4)
    reflections = Image.fromarray((np.clip((streaks - 0.5) * 5, 0, 1) * rng.uniform(60, 255)).astype(np.uint8))
    glass.paste((255, 255, 255), mask=reflections)
    glass.putalpha(alpha)
    return glass


def _shadow(rng: np.random.Generator, coverage: Image.Image) -> Image.Image:
    """The shadow of an object's coverage (both mode L, same size): on the wall behind or on the ground below it."""
    small = coverage.reduce(4)
    width, height = small.size
    shift_x, shift_y = rng.uniform(-0.06, 0.06) * width, rng.uniform(0.0, 0.06) * height
    box = small.getbbox()
    if rng.random() < 0.5 or box is None:
        matrix = (1, 0, -shift_x, 0, 1, -shift_y)
    else:  # squashed and sheared about the lowest row of the object
        squash, shear, ground = rng.uniform(0.15, 0.4), rng.uniform(-1.5, 1.5), box[3]
        matrix = (1, shear / squash, -ground * shear / squash, 0, 1 / squash, ground - ground / squash)
    cast = small.transform(small.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    cast = cast.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.03) * min(width, height)))
    strength = rng.uniform(0.25, 0.7)
    return cast.point(lambda value: value * strength).resize(coverage.size, Image.Resampling.BILINEAR)


def _camera(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """What a camera adds to everything alike: uneven light, softness, noise, JPEG."""
    if rng.random() < 0.4:
        image = _lighting(rng, image, 0.6)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))
    if rng.random() < 0.3:
        pixels = np.asarray(image).astype(np.int16)
        noise = rng.integers(0, 256, pixels.shape, dtype=np.uint8).astype(np.int16) - 128
        pixels += (noise * np.int16(rng.integers(4, 40))) >> 7
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=int(rng.integers(40, 96)))
        image = Image.open(encoded).convert("RGB")
    return image


@dataclass(frozen=True)
class Compositor:
    """Composes training pictures from cut-outs: `compositor(rng, cutouts, index)` -> RGB picture and L mask.

    The picture shows one to `max_objects` large, mostly sharp objects (the mask is their joint coverage) over a
    background in which up to `max_distractors` other cut-outs stand, small or out of focus: those are not foreground.

    Args:
        size: (height, width) of the pictures.
        backgrounds: photographs to use beside the generated backgrounds, a folder or a list of files; none when absent.
        photo_probability: share of photographs among the backgrounds, where there are any.
        max_objects: most foreground objects in one picture.
        max_distractors: most background cut-outs in one picture.
        thin_probability: chance of each foreground object to be a drawn thin structure instead of a cut-out.
        glass_probability: chance of each other foreground object to be of clear glass. All of it is foreground.
        hard_light_probability: chance of each foreground cut-out to lie in a shadow in part, or to shine.
        shadow_probability: chance of each foreground object to cast a shadow. A shadow is not foreground.

    The photographs serve as the surface of many objects, too.

    Raises:
        ValueError: the folder of backgrounds has no images.
    """

    size: tuple[int, int] = (1024, 1024)
    backgrounds: str | Path | Sequence[str | Path] | None = None
    photo_probability: float = 0.6
    max_objects: int = 3
    max_distractors: int = 4
    thin_probability: float = 0.2
    glass_probability: float = 0.04
    hard_light_probability: float = 0.25
    shadow_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.backgrounds is not None and not self.photos:
            raise ValueError(f"No background images in {self.backgrounds}: give a folder with photographs.")

    @functools.cached_property
    def photos(self) -> list[Path]:
        """The photographs that `backgrounds` stands for."""
        if isinstance(self.backgrounds, str | Path):
            return list_images(self.backgrounds)
        return [Path(path) for path in self.backgrounds or ()]

    def __call__(
        self, rng: np.random.Generator, cutouts: Sequence[Image.Image], index: int
    ) -> tuple[Image.Image, Image.Image]:
        """Composes one picture.

        Args:
            rng: the only source of chance.
            cutouts: RGBA images; only those that are used are taken from the sequence.
            index: the cut-out that becomes the main object (unless a thin structure takes its place).

        Returns:
            The picture (RGB) and the exact coverage of its foreground (L, 0..255), both of `size`.
        """
        canvas = self._background(rng, cutouts)
        mask = Image.new("L", canvas.size)
        for number in range(self._count(rng, 1, self.max_objects)):
            share = rng.uniform(0.4, 0.95) if number == 0 else rng.uniform(0.25, 0.65)
            if number == 0 and rng.random() < 0.2:
                share = rng.uniform(0.95, 1.6)  # as in portraits, of which the frame cuts off a part
            side = round(min(self.size) * share)
            thin = rng.random() < self.thin_probability
            if thin:
                item = thin_structure(rng, side)
            else:
                item = cutouts[index if number == 0 else rng.integers(0, len(cutouts))]
            item = vary_object(rng, item, side, self._choose_photo(rng))
            # The centre stays well inside, so that something is always seen; the rest may be cut off by the frame.
            centre = rng.uniform(0.3, 0.7, 2) if number == 0 else rng.uniform(0.1, 0.9, 2)
            corner = (
                round(centre[1] * self.size[1] - item.width / 2),
                round(centre[0] * self.size[0] - item.height / 2),
            )
            coverage = Image.new("L", canvas.size)
            coverage.paste(item.getchannel("A"), corner)
            if thin:
                item = _stand_out(item, canvas, coverage)
            elif rng.random() < self.glass_probability:
                left, top = corner
                behind = canvas.crop((left, top, left + item.width, top + item.height))
                item = _glass(rng, item, behind)
            elif self.hard_light_probability and rng.random() < self.hard_light_probability:
                item = _hard_light(rng, item)
            if rng.random() < self.shadow_probability:
                canvas.paste((0, 0, 0), mask=_shadow(rng, coverage))
            canvas.paste(item, corner, mask=item)
            mask = ImageChops.screen(mask, coverage)
        return _camera(rng, canvas), mask

    def _background(self, rng: np.random.Generator, cutouts: Sequence[Image.Image]) -> Image.Image:
        # What is out of focus is made at half size: nobody sees the difference, and it takes a quarter of the time.
        out_of_focus = rng.random() < 0.5
        height, width = (-(-length // 2) for length in self.size) if out_of_focus else self.size
        shorter = min(height, width)
        if self.photos and rng.random() < self.photo_probability:
            image = photo_background(rng, (height, width), self._choose_photo(rng)())
        else:
            image = generated_background(rng, (height, width))
        for _ in range(self._count(rng, 0, self.max_distractors)):
            # A background object has to be told from a foreground object by something: size or focus.
            side = round(shorter * (rng.uniform(0.1, 0.5) if out_of_focus else rng.uniform(0.05, 0.15)))
            item = vary_object(rng, cutouts[rng.integers(0, len(cutouts))], max(1, side), self._choose_photo(rng))
            centre = rng.uniform(0, 1, 2)
            image.paste(item, (round(centre[1] * width - side / 2), round(centre[0] * height - side / 2)), mask=item)
        if out_of_focus:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.006, 0.02) * shorter))
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return image

    def _choose_photo(self, rng: np.random.Generator) -> Callable[[], Image.Image] | None:
        """What opens one of the photographs, no larger than needed; None where there are none."""
        if not self.photos:
            return None
        return functools.partial(_open_photo, self.photos[rng.integers(0, len(self.photos))], 2 * max(self.size))

    @staticmethod
    def _count(rng: np.random.Generator, lowest: int, highest: int) -> int:
        """A number in [lowest, highest], smaller ones more often."""
        return lowest + int((highest - lowest + 1) * rng.random() ** 2)
