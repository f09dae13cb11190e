"""Draws a labelled data set of patterned pictures in ImageNet's folder layout.

    python examples/shapes/draw.py --train 2000 --val 800 --folder examples/shapes/data

It writes FOLDER/train_original/CLASS/NNNN.png and FOLDER/val_original/CLASS/NNNN.png. Each class is one motif, repeated
over the picture at a random size, position, angle, colour and light. The motifs are large enough to survive a reduction
to a third, and are blurred enough by it to mislead a classifier that only knows sharp pictures. All of them look alike
when mirrored, so that flips do not change the class.
"""

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE = 64  # pixels
SEED = 1337
OVERSAMPLING = 3  # drawn larger and reduced, for smooth edges


def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a rectangle of 2w x 2h pixels around (x, y)."""
    return x - w, y - h, x + w, y + h


def diagonals(d: ImageDraw.ImageDraw, x: float, y: float, r: float, c: tuple) -> None:
    for sign in (1, -1):
        d.line((x - r, y - sign * r, x + r, y + sign * r), c, round(0.6 * r))


def plus(d: ImageDraw.ImageDraw, x: float, y: float, r: float, c: tuple) -> None:
    d.rectangle(box(x, y, r, 0.3 * r), c)
    d.rectangle(box(x, y, 0.3 * r, r), c)


def bars(d: ImageDraw.ImageDraw, x: float, y: float, r: float, c: tuple) -> None:
    for sign in (-1, 1):
        d.rectangle(box(x + sign * 0.65 * r, y, 0.3 * r, r), c)


def diamond(d: ImageDraw.ImageDraw, x: float, y: float, r: float, c: tuple) -> None:
    r *= 1.15
    d.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], c)


MOTIFS = {  # draws one around (x, y), of radius r and colour c
    "bars": bars,
    "crosses": diagonals,
    "diamonds": diamond,
    "discs": lambda d, x, y, r, c: d.ellipse(box(x, y, r, r), c),
    "frames": lambda d, x, y, r, c: d.rectangle(box(x, y, r, r), outline=c, width=round(0.5 * r)),
    "pluses": plus,
    "rings": lambda d, x, y, r, c: d.ellipse(box(x, y, r, r), outline=c, width=round(0.55 * r)),
    "squares": lambda d, x, y, r, c: d.rectangle(box(x, y, 0.9 * r, 0.9 * r), c),
}


def draw_picture(motif: str, rng: random.Random) -> Image.Image:
    """One RGB picture of SIDE x SIDE pixels of the class `motif`; the same state of `rng` gives the same picture."""
    side = SIDE * OVERSAMPLING
    hidden = side * 5 // 4  # room to turn without empty corners
    dark = tuple(rng.randint(0, 110) for _ in range(3))
    light = tuple(rng.randint(145, 255) for _ in range(3))
    background, colour = (dark, light) if rng.random() < 0.5 else (light, dark)
    picture = Image.new("RGB", (hidden, hidden), background)
    draw = ImageDraw.Draw(picture)
    cell = rng.uniform(15, 21) * OVERSAMPLING
    radius = cell * rng.uniform(0.36, 0.42)
    phase = rng.uniform(0, cell), rng.uniform(0, cell)
    for row in range(math.ceil(hidden / cell)):
        for column in range(math.ceil(hidden / cell)):
            MOTIFS[motif](draw, phase[0] + column * cell, phase[1] + row * cell, radius, colour)
    picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    corner = (hidden - side) // 2
    picture = picture.crop((corner, corner, corner + side, corner + side))
    shade = Image.linear_gradient("L").resize((side, side)).rotate(90 * rng.randint(0, 3))
    other = Image.new("RGB", (side, side), tuple(rng.randint(0, 255) for _ in range(3)))
    picture = Image.composite(Image.blend(picture, other, 0.35), picture, shade)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="training pictures in all")
    parser.add_argument("--val", type=int, default=800, help="validation and test pictures in all")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    wanted = [("train_original", arguments.train), ("val_original", arguments.val)]
    jobs = [(split, motif, i) for split, n in wanted for motif in MOTIFS for i in range(n // len(MOTIFS))]
    for split, motif, i in tqdm(jobs, desc="drawing", unit="picture", disable=None):
        folder = arguments.folder / split / motif
        folder.mkdir(parents=True, exist_ok=True)
        draw_picture(motif, random.Random(f"{SEED}/{split}/{motif}/{i}")).save(folder / f"{i:04d}.png")
    print(f"{len(jobs)} pictures of {len(MOTIFS)} classes in {arguments.folder}")


if __name__ == "__main__":
    main()
