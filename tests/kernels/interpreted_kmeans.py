"""The k-means kernels under Triton's interpreter; test_kmeans.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels import kmeans as module
from dit_accel.kernels.kmeans import Clusters, kmeans

UNIT = torch.finfo(torch.float32).eps / 2

# bfloat16 is left out: tl.dot computes it wrongly in the interpreter (Triton 3.9).
CASES = [
    pytest.param(torch.float16, (2, 133, 1, 32), 5, "plain", id="B2-S133-H1-D32-K5-fp16"),
    pytest.param(torch.float32, (2, 70, 1, 72), 33, "plain", id="B2-S70-H1-D72-K33-fp32"),
    pytest.param(torch.float16, (2, 65, 2, 80), 18, "heads first", id="B2-S65-H2-D80-K18-fp16-strided"),
    pytest.param(torch.float32, (1, 129, 1, 96), 7, "stepped", id="B1-S129-H1-D96-K7-fp32-strided"),
    pytest.param(torch.float16, (1, 131, 2, 112), 16, "sliced", id="B1-S131-H2-D112-K16-fp16-strided"),
    pytest.param(torch.float16, (1, 130, 1, 128), 67, "plain", id="B1-S130-H1-D128-K67-fp16"),
    pytest.param(torch.float16, (1, 65, 1, 256), 17, "plain", id="B1-S65-H1-D256-K17-fp16"),
    pytest.param(torch.float32, (1, 3, 1, 20), 3, "plain", id="B1-S3-H1-D20-K3-fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "clusters", "layout"), CASES)
def test_kernels_agree_with_float64(dtype, shape, clusters, layout):
    torch.manual_seed(0)
    tokens = (torch.randn(shape) + 0.5).to(dtype)
    if layout == "heads first":
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "stepped":
        tokens = torch.stack([tokens, tokens], -1)[..., 0]
    elif layout == "sliced":
        tokens = torch.cat([tokens, tokens], 3)[..., : shape[3]]
    batch, seq, heads, dim = shape
    start = torch.randn(batch, heads, clusters, dim) + 0.5
    x, c = tokens.double().transpose(1, 2), start.double()

    labels, distances = module._assign_triton(tokens, start)
    expected = (x[:, :, :, None] - c[:, :, None]).square().sum(-1)
    bound = (dim + 8) * UNIT * (x.norm(dim=-1).amax() + c.norm(dim=-1).amax()) ** 2
    least = expected.topk(2, largest=False).values
    clear = least.diff(dim=-1)[..., 0] > 2 * bound
    assert clear.double().mean() > 0.98
    assert torch.equal(labels[clear], expected.argmin(-1).int()[clear])
    assert torch.equal(labels[clear], module._assign_torch(tokens, start)[0][clear])
    assert ((distances - least[..., 0]).abs() <= bound).all()

    labels = torch.randint(clusters, (batch, heads, seq))
    labels[..., :clusters] = torch.arange(clusters)
    order = torch.sort(labels, stable=True).indices
    own = (labels[:, :, None] == torch.arange(clusters)[:, None]).double()
    sizes = own.sum(-1)
    starts = torch.cat([torch.zeros(batch, heads, 1), sizes.cumsum(-1)], -1).int()
    centroids, spread = module._update_triton(tokens, order, starts, True)
    means = own @ x / sizes[..., None]
    bound = (sizes[..., None] + 2) * UNIT * (own @ x.abs()) / sizes[..., None]
    assert ((centroids - means).abs() <= 1.01 * bound).all()
    squares = (x - means.gather(2, labels[..., None].expand_as(x))).square().sum(-1)
    torch.testing.assert_close(spread.double(), (own @ squares[..., None])[..., 0], rtol=1e-5, atol=1e-4)
    same_centroids, unwritten = module._update_triton(tokens, order, starts, False)
    assert torch.equal(same_centroids, centroids)
    assert (unwritten == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_tensors_of_more_than_2_to_the_31_elements(far_apart, dim):
    torch.manual_seed(0)
    tokens = torch.randn(3, 40, 3, 32).half()
    near, far = (kmeans(x, 5, iterations=2, backend="triton") for x in (tokens, far_apart(tokens, dim)))
    for name in Clusters.__dataclass_fields__:
        assert torch.equal(getattr(far, name), getattr(near, name)), name


@pytest.mark.usefixtures("poisoned")
def test_agrees_with_torch():
    """The whole of it, with tokens far from ties, a far-away centroid and one given twice."""
    torch.manual_seed(0)
    tokens = 8 * torch.randn(1, 6, 1, 2, 32) + 0.2 * torch.randn(1, 6, 11, 2, 32)
    tokens = tokens.flatten(1, 2).half()
    start = tokens[:, ::11].transpose(1, 2).float().contiguous()
    start[:, :, 1] = 1e6
    start[:, :, 3] = start[:, :, 2]
    found, expected = (
        kmeans(tokens, 6, iterations=3, centroids=start, backend=b) for b in ("triton", "torch")
    )
    for name in Clusters.__dataclass_fields__:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    again = kmeans(tokens, 6, iterations=3, centroids=start, backend="triton")
    assert torch.equal(again.centroids, found.centroids)


def test_head_dims_over_256_are_refused():
    with pytest.raises(ValueError, match="serves head dims up to 256, got 320; use 'torch'"):
        kmeans(torch.zeros(1, 5, 2, 320), 3, backend="triton")


def test_ties_go_to_the_lower_cluster():
    """Each centroid twice, in the same column of two tiles; small integers, so that float32 is exact."""
    torch.manual_seed(0)
    start = torch.randint(-4, 5, (1, 1, 32, 16)).float().repeat(1, 1, 2, 1)
    labels, _ = module._assign_triton(torch.randint(-4, 5, (1, 35, 1, 16)).half(), start)
    assert labels.unique().numel() > 1
    assert (labels < 32).all()
