"""Frames to files."""

from pathlib import Path

from PIL import Image
from torch import Tensor


def to_images(frames: Tensor) -> list[Image.Image]:
    """8-bit images of `[frames, height, width, 3]` floats in [0, 1]."""
    return [Image.fromarray(frame.numpy()) for frame in (frames.clamp(0, 1) * 255).round().byte()]


def write_video(frames: Tensor, path: Path, *, fps: int = 16) -> Path:
    """Write frames as an H.264 MP4."""
    from diffusers.utils import export_to_video

    path.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(to_images(frames), str(path), fps=fps, quality=9)
    return path


def write_frames(frames: Tensor, directory: Path) -> list[Path]:
    """Write each frame as a PNG, `000.png` onwards; those of another video that is there go."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.png"):
        number = int(path.stem) if path.stem.isdecimal() else -1
        if path.stem == f"{number:03d}" and number >= len(frames):
            path.unlink()
    paths = [directory / f"{number:03d}.png" for number in range(len(frames))]
    for path, image in zip(paths, to_images(frames), strict=True):
        image.save(path)
    return paths
