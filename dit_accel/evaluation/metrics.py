"""How far an accelerated generation is from the dense one of the same seed."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

# Identical frames have an infinite PSNR, which neither JSON nor a mean can hold.
PSNR_CEILING_DB = 100.0


def _checked(frames: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    for name, video in (("frames", frames), ("reference", reference)):
        if video.ndim != 4 or video.shape[-1] != 3 or not video.is_floating_point():
            raise ValueError(
                f"{name}: expected a float tensor [frames, height, width, 3] with values in [0, 1], "
                f"got {video.dtype} {list(video.shape)}"
            )
    if frames.shape != reference.shape:
        raise ValueError(
            f"frames: expected the shape of the reference {list(reference.shape)}, got {list(frames.shape)}; "
            "compare generations of equal size and length"
        )
    return frames.float().movedim(-1, 1), reference.float().movedim(-1, 1)


def psnr(frames: Tensor, reference: Tensor) -> float:
    """PSNR in dB over all pixels of a video; frames `[frames, height, width, 3]` in [0, 1].

    `10 log10(1 / mse)`, at most 100 dB, which is what identical frames get.

    Raises:
        ValueError: The tensors are not float videos of equal shape.
    """
    pred, target = _checked(frames, reference)
    value = peak_signal_noise_ratio(pred, target, data_range=1.0)
    return min(float(value), PSNR_CEILING_DB)


def ssim(frames: Tensor, reference: Tensor) -> float:
    """Mean SSIM of the frames (Wang et al. 2004, Gaussian window 11, sigma 1.5); shapes as in `psnr`.

    Raises:
        ValueError: The tensors are not float videos of equal shape.
    """
    pred, target = _checked(frames, reference)
    return float(torch.as_tensor(structural_similarity_index_measure(pred, target, data_range=1.0)))


def latent_rel_l2(latents: Tensor, reference: Tensor) -> float:
    """`‖latents − reference‖ / ‖reference‖` of two final latents of equal shape.

    Raises:
        ValueError: The shapes differ.
    """
    if latents.shape != reference.shape:
        raise ValueError(
            f"latents: expected the shape of the reference {list(reference.shape)}, got {list(latents.shape)}"
        )
    exact = reference.double()
    return float(torch.linalg.vector_norm(latents.double() - exact) / torch.linalg.vector_norm(exact))
