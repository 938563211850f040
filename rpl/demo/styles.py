"""How the web draws things: fourteen styles, as arithmetic on batches of sprite layers.

Knows nothing of which object is drawn, of captions or files. One code serves both ends: the small CLIP's
training pictures (64 pixels, made on the fly) and the demo's web pictures (160-400 pixels, JPEG). The
scenes of the demo's data set are *not* drawn here: their printed look is in scenes.py and the CLIP never
trains on it.

B pictures of H x W pixels; colours are float32 in 0..1; every draw comes from the given generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

INK, FILL = 4, 3


@dataclass(frozen=True)
class Placed:
    """Sprites laid on an empty canvas: colour [B,3,H,W] and opacities [B,1,H,W] of fill and ink."""

    rgb: Tensor
    fill: Tensor
    ink: Tensor

    @property
    def mask(self) -> Tensor:
        return 1 - (1 - self.fill) * (1 - self.ink)


def uniform(gen: Generator, batch: int, low: float, high: float, channels: int = 1) -> Tensor:
    """[B, channels, 1, 1] in [low, high)."""
    return torch.rand(batch, channels, 1, 1, generator=gen) * (high - low) + low


def place(
    sprites: Tensor,
    size: int,
    gen: Generator,
    *,
    low: float,
    high: float,
    shift: float,
    centre: Tensor | None = None,
) -> Placed:
    """Lays uint8 sprites [B, 5, S, S] on a canvas of `size`, each flipped, turned, scaled and shifted at will.

    `low` to `high` is the side of the sprite's square as a part of the canvas; `shift` the largest random
    offset from `centre` [B, 2], in half canvases (the default is the middle).
    """
    batch = len(sprites)
    scale = uniform(gen, batch, low, high).flatten()
    angle = (torch.rand(batch, generator=gen) - 0.5) * 0.5
    flip = torch.where(torch.rand(batch, generator=gen) < 0.5, -1.0, 1.0)
    offset = (torch.rand(batch, 2, generator=gen) * 2 - 1) * shift
    if centre is not None:
        offset = offset + centre
    stretch = 1 + (torch.rand(batch, generator=gen) - 0.5) * 0.2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [
        torch.stack([flip * cos * stretch, flip * sin, -flip * (cos * offset[:, 0] + sin * offset[:, 1])], 1),
        torch.stack([-sin, cos / stretch, sin * offset[:, 0] - cos * offset[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), [batch, 1, size, size], align_corners=False)
    layers = sprites.float().div_(255)
    layers[:, :3] *= layers[:, FILL : FILL + 1]  # premultiplied, so that edges do not darken
    out = functional.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    fill = out[:, FILL : FILL + 1]
    return Placed(out[:, :3] / fill.clamp(min=1e-3), fill, out[:, INK : INK + 1])


def stack(top: Placed, below: Placed) -> Placed:
    """`top` drawn over `below`: its body hides what is under it."""
    hidden = 1 - top.mask
    fill = top.fill + below.fill * hidden
    colour = (top.rgb * top.fill + below.rgb * below.fill * hidden) / fill.clamp(min=1e-3)
    return Placed(colour, fill, top.ink + below.ink * hidden)


def noise(gen: Generator, batch: int, size: int, cells: int, channels: int = 1) -> Tensor:
    """[B, channels, H, W] in 0..1: smooth noise with `cells` knots a side."""
    knots = torch.rand(batch, channels, cells, cells, generator=gen)
    if cells >= size:
        return functional.interpolate(knots, size=(size, size), mode="area")
    return functional.interpolate(knots, size=(size, size), mode="bilinear", align_corners=False)


def _over(below: Tensor, colour: Tensor, opacity: Tensor) -> Tensor:
    return below + (colour - below) * opacity


def _grow(mask: Tensor, part: float) -> Tensor:
    """The mask grown by a part of the picture's side."""
    radius = max(1, round(mask.shape[-1] * part))
    side = 2 * radius + 1
    down = functional.max_pool2d(mask, (side, 1), stride=1, padding=(radius, 0))
    return functional.max_pool2d(down, (1, side), stride=1, padding=(0, radius))


def _blur(image: Tensor, part: float) -> Tensor:
    """A box blur twice over; a radius below half a pixel leaves the picture alone."""
    radius = round(image.shape[-1] * part)
    if radius < 1:
        return image
    side = 2 * radius + 1
    for _ in range(2):
        padded = functional.pad(image, (radius, radius, radius, radius), mode="replicate")
        image = functional.avg_pool2d(functional.avg_pool2d(padded, (side, 1), stride=1), (1, side), stride=1)
    return image


def _shadow(canvas: Tensor, mask: Tensor, strength: float, part: float = 0.04) -> Tensor:
    soft = _blur(mask, part)
    step = max(1, round(canvas.shape[-1] * part))
    soft = functional.pad(soft, (step, 0, step, 0))[..., :-step, :-step]
    return canvas * (1 - strength * soft)


def _grey(rgb: Tensor) -> Tensor:
    return (rgb * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def turn_hue(rgb: Tensor, angle: Tensor) -> Tensor:
    """Turns every colour about the grey axis by `angle` [B] radians."""
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    third = torch.full((3, 3), 1 / 3)
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    matrix = cos * torch.eye(3) + (1 - cos) * third + sin * axis
    return torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(0, 1)


def _vivid(gen: Generator, batch: int, low: float = 0.0) -> Tensor:
    """[B,3,1,1]: strong colours; `low` lifts them towards white."""
    hue = torch.rand(batch, 1, generator=gen) * 2 * math.pi
    waves = torch.cos(hue + torch.tensor([[0.0, 2.1, 4.2]])) * 0.5 + 0.5
    return (low + (1 - low) * waves).view(batch, 3, 1, 1)


def _ground(gen: Generator, batch: int, size: int) -> Tensor:
    """Out-of-focus surroundings: two colours mixed by smooth noise, some with a horizon."""
    first, second = (
        _over(uniform(gen, batch, 0.15, 0.95), uniform(gen, batch, 0.1, 0.95, 3), torch.tensor(0.45)) for _ in "12"
    )
    mix = noise(gen, batch, size, 3) * 0.6 + noise(gen, batch, size, 8) * 0.4
    height = torch.linspace(0, 1, size).view(1, 1, size, 1)
    horizon = torch.sigmoid((height - uniform(gen, batch, 0.3, 0.9)) * 30)
    has_horizon = (uniform(gen, batch, 0, 1) < 0.4).float()
    mix = mix * (1 - has_horizon * 0.6) + horizon * has_horizon * 0.6
    return _over(first, second, mix) + (noise(gen, batch, size, size // 2) - 0.5) * 0.12


def photo(p: Placed, gen: Generator) -> Tensor:
    """Shaded volumes without outlines on textured surroundings, with a shadow and a camera's grain."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    angle = (torch.rand(batch, generator=gen) - 0.5) * 0.5
    colour = turn_hue(p.rgb, angle) * uniform(gen, batch, 0.7, 1.05)
    axis = torch.linspace(-1, 1, size)
    lean = uniform(gen, batch, -1, 1)
    light = 0.95 + 0.3 * (lean * axis.view(1, 1, 1, size) - axis.view(1, 1, size, 1))
    depth = _blur(p.mask, 0.06) * p.mask  # darker towards the rim: a round body
    colour = colour * light * (0.45 + 0.55 * depth) + 0.25 * (depth - 0.8).clamp(min=0)
    canvas = _shadow(_ground(gen, batch, size), p.mask, 0.5)
    canvas = _over(canvas, colour, p.fill)
    canvas = _over(canvas, colour.new_tensor(0.12), p.ink * uniform(gen, batch, 0.35, 0.8))
    return canvas + (torch.rand(batch, 3, size, size, generator=gen) - 0.5) * uniform(gen, batch, 0.02, 0.14)


def old_photo(p: Placed, gen: Generator) -> Tensor:
    """A black and white photo, a little yellowed."""
    grey = _grey(photo(p, gen).clamp(0, 1))
    tint = torch.tensor([1.0, 0.95, 0.85]).view(1, 3, 1, 1)
    return grey * _over(torch.ones_like(tint), tint, uniform(gen, len(grey), 0, 1))


def cartoon(p: Placed, gen: Generator) -> Tensor:
    """Flat colours and black outlines, as the drawings come, on a plain or two-tone ground."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    canvas = uniform(gen, batch, 0.45, 1.0, 3).expand(-1, -1, size, size)
    second = (canvas + uniform(gen, batch, -0.2, 0.2, 3)).clamp(0, 1)
    height = torch.linspace(0, 1, size).view(1, 1, size, 1)
    canvas = torch.where(height < uniform(gen, batch, 0.3, 1.4), canvas, second)
    canvas = _over(canvas, turn_hue(p.rgb, (torch.rand(batch, generator=gen) - 0.5) * 0.3), p.fill)
    return _over(canvas, canvas.new_tensor(0.05), p.ink)


def line_drawing(p: Placed, gen: Generator) -> Tensor:
    """Black or dark lines, thin or bold, on white paper."""
    batch = len(p.rgb)
    bold = (uniform(gen, batch, 0, 1) < 0.4).float()
    ink = _over(p.ink, _grow(p.ink, 0.008), bold)
    paper = uniform(gen, batch, 0.9, 1.0, 3)
    return _over(paper.expand_as(p.rgb), uniform(gen, batch, 0.0, 0.25, 3), ink)


def sketch(p: Placed, gen: Generator) -> Tensor:
    """Grey pencil with broken strokes and hatching on paper."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    paper = uniform(gen, batch, 0.82, 0.98) + (noise(gen, batch, size, size // 2) - 0.5) * 0.08
    axis = torch.arange(size, dtype=torch.float32) * (64 / size)
    slant = uniform(gen, batch, -1.2, 1.2)
    hatch = torch.sin((axis.view(1, 1, size, 1) + slant * axis.view(1, 1, 1, size)) * 1.6) * 0.5 + 0.5
    tone = (1 - _grey(p.rgb)) * p.fill * hatch * 0.7
    stroke = p.ink * (0.45 + 0.75 * noise(gen, batch, size, size // 3))
    warm = torch.tensor([1.0, 0.98, 0.93]).view(1, 3, 1, 1)
    return (paper * (1 - tone * 0.75)).clamp(0, 1) * (1 - stroke * uniform(gen, batch, 0.55, 0.9)) * warm


def silhouette(p: Placed, gen: Generator) -> Tensor:
    """One dark shape on a lighter sky."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    height = torch.linspace(0, 1, size).view(1, 1, size, 1)
    sky = _over(uniform(gen, batch, 0.55, 1, 3), uniform(gen, batch, 0.55, 1, 3), height)
    return _over(sky.expand_as(p.rgb), uniform(gen, batch, 0, 0.25, 3), p.mask)


def pop_art(p: Placed, gen: Generator) -> Tensor:
    """Colours turned and boosted, coloured outlines, a loud ground with dots."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    turned = turn_hue(p.rgb, torch.rand(batch, generator=gen) * 4.2 + 1.0)
    turned = _over(turned, _vivid(gen, batch), uniform(gen, batch, 0, 0.5))
    axis = torch.arange(size, dtype=torch.float32) / size * math.pi
    count = uniform(gen, batch, 8, 16)
    dots = torch.sin(axis.view(1, 1, 1, size) * count) * torch.sin(axis.view(1, 1, size, 1) * count)
    canvas = _over(_vivid(gen, batch, 0.3), _vivid(gen, batch), (dots.abs() > 0.5).float() * 0.6)
    return _over(_over(canvas, turned, p.fill), _vivid(gen, batch) * 0.35, p.ink)


def sticker(p: Placed, gen: Generator) -> Tensor:
    """A cut-out with a white rim and a shadow."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    canvas = uniform(gen, batch, 0.25, 0.95, 3).expand(-1, -1, size, size)
    canvas = canvas + (noise(gen, batch, size, 6) - 0.5) * 0.1
    rim = _grow(p.mask, 0.045)
    canvas = _over(_shadow(canvas, rim, 0.45, 0.025), canvas.new_tensor(1.0), rim)
    return _over(_over(canvas, p.rgb, p.fill), canvas.new_tensor(0.05), p.ink)


def chalk(p: Placed, gen: Generator) -> Tensor:
    """Light lines on a dark board or a blueprint."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    board = torch.tensor([[0.12, 0.2, 0.16], [0.1, 0.25, 0.55], [0.14, 0.14, 0.16]])
    board = board[torch.randint(3, (batch,), generator=gen)].view(batch, 3, 1, 1)
    board = board + (noise(gen, batch, size, 5) - 0.5) * 0.1
    line = p.ink * (0.6 + 0.5 * noise(gen, batch, size, size // 2)) + p.fill * 0.12 * _grey(p.rgb)
    return _over(board, uniform(gen, batch, 0.85, 1.0, 3), line.clamp(0, 1))


def watercolour(p: Placed, gen: Generator) -> Tensor:
    """Washed colours that run over their edges, on rough white paper."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    wet = _blur(p.rgb * p.fill, 0.025)
    opacity = _blur(p.fill, 0.025)
    colour = wet / opacity.clamp(min=1e-3)
    wash = opacity * (0.45 + 0.6 * noise(gen, batch, size, 7))
    paper = 0.97 + (noise(gen, batch, size, size // 2) - 0.5) * 0.06
    canvas = _over(paper.expand(-1, 3, -1, -1), colour, wash.clamp(0, 1))
    return _over(canvas, canvas.new_tensor(0.3), p.ink * uniform(gen, batch, 0.1, 0.5))


def pixel_art(p: Placed, gen: Generator) -> Tensor:
    """A computer game's coarse squares."""
    picture = cartoon(p, gen)
    size = picture.shape[-1]
    cells = 20 + 4 * int(torch.randint(3, (1,), generator=gen))
    coarse = functional.interpolate(picture, size=(cells, cells), mode="area")
    return functional.interpolate(coarse, size=(size, size), mode="nearest")


def poster(p: Placed, gen: Generator) -> Tensor:
    """Two colours, flat, on a bright sheet with a strip of text."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    sheet, dark = _vivid(gen, batch, 0.55), _vivid(gen, batch) * 0.35
    tone = (1 - _grey(p.rgb)) * 0.8 + 0.2
    canvas = _over(sheet.expand_as(p.rgb), dark, tone * p.fill * 0.7)
    canvas = _over(canvas, dark, p.ink)
    rows = torch.linspace(0, 1, size).view(1, 1, size, 1)
    top = uniform(gen, batch, 0.78, 0.86)
    strip = ((rows > top) & (rows < top + 0.12)).float()
    letters = (noise(gen, batch, size, 24)[:, :, :1] > 0.45).float()
    margin = (torch.linspace(-1, 1, size).abs() < 0.8).float().view(1, 1, 1, size)
    return _over(canvas, _over(sheet, dark, letters * margin), strip)


def icon(p: Placed, gen: Generator) -> Tensor:
    """A plain white or black sign on one flat colour."""
    batch = len(p.rgb)
    ground = _vivid(gen, batch, 0.1).expand_as(p.rgb)
    sign = (uniform(gen, batch, 0, 1) < 0.75).float()
    inner = p.mask * (1 - 0.85 * p.ink)
    return _over(ground, sign, inner)


def clay(p: Placed, gen: Generator) -> Tensor:
    """Thick, soft, glossy bodies without lines: a model of clay."""
    batch, size = len(p.rgb), p.rgb.shape[-1]
    body = _grow(p.fill, 0.01)
    colour = _blur(p.rgb * p.fill, 0.015) / _blur(p.fill, 0.015).clamp(min=0.05)
    height = _blur(body, 0.05)
    slope = functional.pad(height, (0, 1, 0, 1), mode="replicate")
    light = (slope[..., 1:, 1:] - slope[..., :-1, :-1]) * (size / 6.0)
    colour = (colour * (0.85 + light)).clamp(0, 1) * (1 - 0.45 * _blur(p.ink, 0.01))
    canvas = _shadow(uniform(gen, batch, 0.5, 0.95, 3).expand(-1, -1, size, size), body, 0.4, 0.03)
    return _over(canvas, colour, body)


Style = Callable[[Placed, Generator], Tensor]

STYLES: dict[str, Style] = {
    "photo": photo,
    "old photo": old_photo,
    "cartoon": cartoon,
    "line drawing": line_drawing,
    "sketch": sketch,
    "silhouette": silhouette,
    "pop art": pop_art,
    "sticker": sticker,
    "chalk drawing": chalk,
    "watercolour": watercolour,
    "pixel art": pixel_art,
    "poster": poster,
    "icon": icon,
    "clay model": clay,
}
"""Style name, as captions say it, to its function from `Placed` to colours [B, 3, H, W] (clamp them)."""
