"""k-means: planted clusters, the float64 oracle, repair, invariants; its Triton kernels without a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import backend as backend_module
from dit_accel.kernels import kmeans as module
from dit_accel.kernels.kmeans import Clusters, kmeans

HERE = Path(__file__).parent
UNIT = torch.finfo(torch.float32).eps / 2


def blobs(
    batch: int = 2, heads: int = 1, dim: int = 32, clusters: int = 11, size: int = 47, dtype=torch.float32
) -> Tensor:
    """Well-separated clusters of `size` consecutive tokens each, different in every (batch, head)."""
    torch.manual_seed(0)
    centers = 8 * torch.randn(batch, clusters, 1, heads, dim)
    tokens = centers + 0.2 * torch.randn(batch, clusters, size, heads, dim)
    return tokens.flatten(1, 2).to(dtype)


def shuffled(tokens: Tensor, planted: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(tokens.shape[1])
    return tokens[:, order], planted[order]


def noise(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape)


def members(tokens: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """float64 [batch, heads, clusters, seq], 1 where a token carries the label."""
    return (labels[:, :, None] == torch.arange(clusters)[:, None]).double()


def means(tokens: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """float64 means of the clusters, and the bound of what float32 sums may miss them by."""
    x, own = tokens.double().transpose(1, 2), members(tokens, labels, clusters)
    sizes = own.sum(-1, keepdim=True)
    return own @ x / sizes, (sizes + 2) * UNIT / (1 - (sizes + 2) * UNIT) * (own @ x.abs()) / sizes


def check(tokens: Tensor, found: Clusters) -> None:
    """What holds for every result, whatever the data."""
    batch, seq, heads, dim = tokens.shape
    clusters = found.sizes.shape[-1]
    for name, dtype, shape in (
        ("labels", torch.int32, (seq,)),
        ("centroids", torch.float32, (clusters, dim)),
        ("sizes", torch.int32, (clusters,)),
        ("order", torch.int64, (seq,)),
        ("starts", torch.int32, (clusters + 1,)),
        ("inertia", torch.float32, ()),
    ):
        assert getattr(found, name).dtype == dtype, name
        assert getattr(found, name).shape == (batch, heads, *shape), name
    assert torch.equal(found.sizes, members(tokens, found.labels, clusters).sum(-1).int())
    assert found.sizes.min() >= 1
    assert (found.order.sort(-1).values == torch.arange(seq)).all()
    grouped = found.labels.gather(-1, found.order)
    # Ascending by label, and by position within a label.
    assert ((grouped.long() * seq + found.order).diff(dim=-1) > 0).all()
    assert (found.starts[..., 0] == 0).all()
    assert torch.equal(found.starts.diff(dim=-1), found.sizes)
    assert (found.starts[..., -1] == seq).all()
    expected, bound = means(tokens, found.labels, clusters)
    assert ((found.centroids - expected).abs() <= bound).all()
    x = tokens.double().transpose(1, 2)
    own = expected.gather(2, found.labels.long()[..., None].expand(-1, -1, -1, dim))
    inertia = (x - own).square().sum(-1).mean(-1)
    torch.testing.assert_close(
        found.inertia.double(), inertia, rtol=1e-5, atol=dim * x.abs().max() ** 2 * UNIT
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param({"dim": 32}, torch.float32, id="B2-S517-H1-D32-fp32"),
        pytest.param({"heads": 3, "dim": 72, "size": 13}, torch.float16, id="B2-S143-H3-D72-fp16"),
        pytest.param({"dim": 128, "clusters": 4, "size": 33}, torch.bfloat16, id="B2-S132-H1-D128-bf16"),
    ],
)
def test_planted_clusters_are_recovered(shape, dtype):
    tokens = blobs(**shape, dtype=dtype)
    clusters = shape.get("clusters", 11)
    planted = torch.arange(tokens.shape[1]) * clusters // tokens.shape[1]
    found = kmeans(tokens, clusters)
    assert (found.labels == planted).all()
    check(tokens, found)
    # In any order of the tokens, from one token of each.
    mixed, mixed_planted = shuffled(tokens, planted)
    places = torch.stack([(mixed_planted == c).nonzero()[0, 0] for c in range(clusters)])
    found = kmeans(mixed, clusters, iterations=2, centroids=mixed[:, places].transpose(1, 2).float())
    assert (found.labels == mixed_planted).all()
    check(mixed, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_iteration_equals_float64(dtype):
    tokens = (noise(2, 517, 2, 72) + 2).to(dtype)
    start = tokens[:, 5:400:40].transpose(1, 2).float()
    found = kmeans(tokens, 10, iterations=1, centroids=start)
    # Written from the definition, token by token.
    distances = (tokens.double().transpose(1, 2)[:, :, :, None] - start.double()[:, :, None]).square().sum(-1)
    nearest = distances.topk(2, largest=False).values
    magnitude = (tokens.double().norm(dim=-1).amax() + start.norm(dim=-1).amax()) ** 2
    clear = nearest.diff(dim=-1)[..., 0] > (72 + 8) * UNIT * magnitude
    assert clear.double().mean() > 0.99
    assert torch.equal(found.labels[clear], distances.argmin(-1).int()[clear])
    check(tokens, found)


def test_ties_go_to_the_lower_cluster():
    tokens = torch.tensor([-3.0, -1, 0, 1, 3, 3]).view(1, 6, 1, 1)
    start = torch.tensor([1.0, -1, -3, 3, 3]).view(1, 1, 5, 1)
    found = kmeans(tokens, 5, iterations=1, centroids=start)
    # Cluster 4 gets nothing by distance, so it takes the furthest token that can be spared: the one at 0.
    assert found.labels.flatten().tolist() == [2, 1, 4, 0, 3, 3]


def test_inertia_never_rises():
    tokens = noise(2, 333, 2, 16)
    inertia = torch.stack([kmeans(tokens, 12, iterations=n).inertia for n in range(1, 13)])
    assert (inertia[1:] <= inertia[:-1] * (1 + 8 * UNIT)).all()
    assert (inertia[-1] < 0.97 * inertia[0]).all()


def test_empty_clusters_take_the_furthest_tokens():
    tokens = torch.tensor([0.0, 0.1, 9.0, 0.2, 5.0]).view(1, 5, 1, 1)
    found = kmeans(tokens, 3, iterations=1, centroids=torch.tensor([0.0, 1e4, -1e4]).view(1, 1, 3, 1))
    assert found.labels.flatten().tolist() == [0, 0, 1, 0, 2]
    check(tokens, found)


@pytest.mark.parametrize(
    ("tokens", "centroids", "labels"),
    [
        # 50 is the furthest from its centroid, but alone there; of the others 0.3 is.
        pytest.param([0.0, 0.3, 50.0], [0.0, 30.0, 1e4], [0, 2, 1], id="singleton"),
        # 24 is the second furthest, but alone once 25 has gone.
        pytest.param([0.0, 0.1, 0.2, 24.0, 25.0], [0.0, 20.0, 1e4, 1e4], [0, 0, 3, 1, 2], id="pair"),
    ],
)
def test_repair_never_empties_a_donor(tokens, centroids, labels):
    x, start = torch.tensor(tokens).view(1, -1, 1, 1), torch.tensor(centroids).view(1, 1, -1, 1)
    found = kmeans(x, len(centroids), iterations=1, centroids=start)
    assert found.labels.flatten().tolist() == labels


@pytest.mark.parametrize("far", [None, 1e5, 1e30, torch.inf, torch.nan])
def test_bad_warm_starts_leave_no_cluster_empty(far):
    """All centroids equal, or all but one out of reach."""
    tokens = noise(2, 65, 2, 32)
    start = tokens[:, :1].transpose(1, 2).expand(-1, -1, 40, -1).clone()
    if far is not None:
        start[:, :, 1:] = far
    if far is torch.nan:
        # min takes NaN for the least: all tokens gather there, and the rest is empty.
        start[:, :, 2:] = start[:, :, :1]
    found = kmeans(tokens, 40, iterations=1, centroids=start)
    check(tokens, found)
    assert kmeans(tokens, 40, iterations=5, centroids=start).inertia.max() < found.inertia.max()


def test_equal_tokens_leave_no_cluster_empty():
    found = kmeans(torch.ones(1, 9, 2, 8), 9)
    check(torch.ones(1, 9, 2, 8), found)


def test_one_cluster_is_the_mean():
    tokens = noise(2, 517, 1, 32) + 3
    found = kmeans(tokens, 1)
    check(tokens, found)
    assert (found.labels == 0).all()
    torch.testing.assert_close(found.centroids[:, :, 0], tokens.mean(1))


def test_as_many_clusters_as_tokens():
    tokens = noise(2, 37, 2, 32)
    found = kmeans(tokens, 37)
    check(tokens, found)
    assert (found.inertia == 0).all()
    assert torch.equal(found.centroids, tokens.transpose(1, 2))


def test_warm_start_takes_fewer_iterations():
    """As between two denoising steps: the tokens have moved a little."""
    tokens = noise(1, 400, 1, 16)
    cold = iterations_to_converge(tokens, None)
    centroids = kmeans(tokens, 8, iterations=cold).centroids
    warm = iterations_to_converge(tokens + 0.001 * noise(1, 400, 1, 16).flip(1), centroids)
    assert warm <= cold // 2


def iterations_to_converge(tokens: Tensor, centroids: Tensor | None) -> int:
    before = kmeans(tokens, 8, iterations=1, centroids=centroids)
    for count in range(2, 200):
        now = kmeans(tokens, 8, iterations=1, centroids=before.centroids)
        if torch.equal(now.labels, before.labels):
            return count
        before = now
    raise AssertionError("no convergence in 200 iterations")


def test_warm_start_continues():
    tokens = noise(1, 100, 2, 16)
    half = kmeans(tokens, 9, iterations=2)
    same(kmeans(tokens, 9, iterations=2, centroids=half.centroids), kmeans(tokens, 9, iterations=4))


def same(a: Clusters, b: Clusters) -> None:
    for name in Clusters.__dataclass_fields__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.usefixtures("poisoned")
def test_deterministic():
    tokens = noise(2, 131, 2, 24)
    same(kmeans(tokens, 30, seed=7), kmeans(tokens, 30, seed=7))
    assert not torch.equal(kmeans(tokens, 30, seed=8).labels, kmeans(tokens, 30, seed=7).labels)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3])
def test_start_takes_one_token_of_each_stretch(seed):
    places = torch.arange(517.0).view(1, 517, 1, 1).expand(2, -1, 3, 4)
    start = module._first_centroids(places, 60, seed)
    assert start.shape == (2, 3, 60, 4)
    assert (start == start[:1, :1, :, :1]).all()
    edges = torch.arange(61) * 517 // 60
    assert (start >= edges[:-1, None]).all()
    assert (start < edges[1:, None]).all()
    # Everywhere within the stretches, not at one phase of them.
    assert (start[0, 0, :, 0] - edges[:-1]).unique().numel() == 9


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads-first"),
        pytest.param(lambda x: torch.stack([x, x], -1)[..., 0], id="stepped"),
        pytest.param(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], id="sliced"),
        pytest.param(lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), id="reversed"),
    ],
)
def test_any_strides(view):
    tokens = blobs(heads=3, dim=24)
    strided = view(tokens)
    assert strided.stride() != tokens.stride()
    found, expected = kmeans(strided, 11), kmeans(tokens, 11)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.centroids, expected.centroids)
    assert torch.equal(
        kmeans(tokens[:1].expand(2, -1, -1, -1), 11).labels[1], kmeans(tokens[:1], 11).labels[0]
    )


def test_each_head_and_batch_element_stands_alone():
    tokens = noise(2, 90, 3, 16)
    found = kmeans(tokens, 7, iterations=1)
    for b in range(2):
        for h in range(3):
            one = kmeans(tokens[b : b + 1, :, h : h + 1].contiguous(), 7, iterations=1)
            assert torch.equal(found.labels[b, h], one.labels[0, 0])


def test_memory_stays_below_the_stated_bound(monkeypatch):
    """Chunks change nothing, and no tensor is larger than the bound."""
    tokens = blobs(heads=2, dim=16)
    expected = kmeans(tokens, 11)
    monkeypatch.setattr(module, "CHUNK_FLOATS", 3000)
    with Largest() as largest:
        found = kmeans(tokens, 11)
    same(found, expected)
    head = 517 * 16
    assert largest.floats == max(3000, head)
    with Largest() as largest:
        module._assign_torch(tokens, expected.centroids)
    # The result itself is as large as one float per token.
    assert largest.floats == max(3000 // (4 * 16) * 4 * 16, 4 * 517)


class Largest(TorchDispatchMode):
    """Records the most elements of any floating point tensor that an operation allocates."""

    floats = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(x, Tensor)
                and x.is_floating_point()
                and x.untyped_storage().data_ptr() not in taken
            ):
                self.floats = max(self.floats, x.numel())
        return result


def test_autocast_and_autograd_leave_it_alone():
    tokens = (noise(2, 333, 1, 32) + 2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans(tokens, 11)
    same(found, kmeans(tokens, 11))
    assert not found.centroids.requires_grad


def test_compiles_in_one_graph():
    """Host synchronisation would break the graph."""
    tokens = noise(2, 65, 2, 16)
    compiled = torch.compile(kmeans, fullgraph=True, backend="eager")
    same(compiled(tokens, 9, iterations=2), kmeans(tokens, 9, iterations=2))


class Launches:
    """Stands in for a Triton kernel and keeps what it would be launched with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))


@pytest.fixture
def launches(monkeypatch) -> tuple[Launches, Launches]:
    """Lets the launchers of the Triton kernels run without a GPU, up to the launch."""
    pytest.importorskip("triton")
    assign, update = Launches(), Launches()
    monkeypatch.setattr(module, "_assign_kernel", assign)
    monkeypatch.setattr(module, "_update_kernel", update)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return assign, update


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("warm", [False, True])
def test_never_waits_for_the_device(backend, warm, launches, monkeypatch):
    """Tensors without data: reading them on the host, or a shape that depends on them, raises."""
    # Autocast knows no device "meta".
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    tokens = torch.empty(2, 517, 3, 72, dtype=torch.float16, device="meta")
    start = torch.empty(2, 3, 20, 72, device="meta") if warm else None
    with NoCopies():
        found = kmeans(tokens, 20, iterations=3, centroids=start, backend=backend)
    assert found.order.device.type == "meta"
    assert found.order.shape == (2, 3, 517)
    for kernel in launches:
        assert len(kernel.calls) == (3 if backend == "triton" else 0)


class NoCopies(TorchDispatchMode):
    """Fails on a copy between devices, which waits for the host or the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        assert len(devices) <= 1, f"{func} over {devices}"
        return result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(5, 2, 8)}, r"tokens must be \[batch, seq, heads, dim\].*got \(5, 2, 8\)"),
        ({"tokens": torch.zeros(1, 5, 0, 8)}, r"each at least 1, got \(1, 5, 0, 8\)"),
        ({"tokens": torch.zeros(1, 5, 2, 8).double()}, r"got torch.float64; use tokens.float\(\)"),
        ({"tokens": torch.zeros(1, 5, 2, 8).long()}, r"tokens must be one of torch.float16.*got torch.int64"),
        ({"clusters": 0}, "clusters must be 1 to 5, the tokens of a sequence, got 0"),
        ({"clusters": 6}, "clusters must be 1 to 5.*got 6; ask for fewer clusters"),
        ({"clusters": 2.0}, r"clusters must be an integer, got 2.0; use int\(clusters\)"),
        ({"clusters": True}, "clusters must be an integer, got True"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"iterations": None}, "iterations must be an integer, got None"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        (
            {"centroids": torch.zeros(1, 2, 4, 8)},
            r"centroids must be .* = \(1, 2, 3, 8\), got \(1, 2, 4, 8\); warm starts need",
        ),
        (
            {"centroids": torch.zeros(1, 2, 3, 8).half()},
            "centroids must be torch.float32 on cpu like tokens, got torch.float16 on cpu; use centroids.to",
        ),
        ({"centroids": torch.zeros(1, 2, 3, 8, device="meta")}, "got torch.float32 on meta"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans(**{"tokens": torch.zeros(1, 5, 2, 8), "clusters": 3} | arguments)


def test_triton_needs_a_gpu(monkeypatch):
    tokens = torch.zeros(1, 5, 2, 8)
    with pytest.raises(
        ValueError, match="needs the package triton|needs tensors on a GPU, got cpu; use 'torch'"
    ):
        kmeans(tokens, 3, backend="triton")
    monkeypatch.setattr(backend_module, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton, which is missing; use 'torch' or 'auto'"):
        kmeans(tokens, 3, backend="triton")
    check(tokens, kmeans(tokens, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6, 1e15])
def test_parts_add_up_to_the_centroids(dtype, size):
    """bfloat16 too, which the interpreter cannot show."""
    centroids = noise(1, 2, 40, 64) * size
    centroids[0, 0, 0] = 0
    parts, scale = module._split(centroids, dtype)
    total = torch.zeros(centroids.shape, dtype=torch.float64)
    for part in parts:
        assert part.dtype == dtype
        total = total * 2.0 ** -module.PARTS[dtype][1] + part.double()
    error = (total * scale.double()[..., None] - centroids.double()).abs().amax(-1)
    assert (error <= 2 * UNIT * centroids.abs().amax(-1)).all()


def test_interpreted():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kmeans.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^14 passed", result.stdout, re.MULTILINE), result.stdout


NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
POINTERS = {"labels": "*i32", "starts": "*i32", "order": "*i64"}


@pytest.mark.parametrize(
    ("kernel", "dim", "dtype"),
    [
        pytest.param("assign", 64, torch.bfloat16, id="assign-D64-bf16"),
        pytest.param("assign", 72, torch.float16, id="assign-D72-fp16"),
        pytest.param("assign", 128, torch.bfloat16, id="assign-D128-bf16"),
        pytest.param("assign", 256, torch.bfloat16, id="assign-D256-bf16"),
        pytest.param("assign", 128, torch.float32, id="assign-D128-fp32"),
        pytest.param("update", 128, torch.bfloat16, id="update-D128-bf16"),
        pytest.param("update", 72, torch.float32, id="update-D72-fp32"),
    ],
)
def test_compiles_for_hopper(kernel, dim, dtype, tmp_path, monkeypatch):
    """Tensor-core instructions of sm_90, wide loads, nothing spilled, shared memory of any recent GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cubin, shared_bytes = compile_kernel(kernel, dim, dtype)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    assembly = tool("nvdisasm", "-c", str(path))
    if kernel == "assign":
        assert ("HGMMA" in assembly) == (dtype != torch.float32)
    assert re.search(r"LDG\S*\.128", assembly)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:(\d+)", usage).group(1) == "0", usage
    assert re.search(r"LOCAL:(\d+)", usage).group(1) == "0", usage
    assert shared_bytes <= 99 * 1024


def compile_kernel(name: str, dim: int, dtype: torch.dtype) -> tuple[bytes, int]:
    """Compile as the launcher would for contiguous tokens on sm_90; (cubin, shared memory in bytes)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if name == "assign":
        kernel, constants = module._assign_kernel, module.assign_options(dim, 500, dtype)
        count, bits = module.PARTS[dtype]
        constants |= {"PARTS": count, "STEP": 2.0**-bits}
    else:
        kernel, constants = module._update_kernel, module.update_options(dim) | {"LAST": True}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    constants |= {"DIM": dim, "ALIGN": 8}
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        key = parameter.name
        if key in constants:
            signature[key] = "constexpr"
        elif key in ("tokens", "parts"):
            signature[key] = f"*{NAMES[dtype]}"
        elif key in POINTERS or key in ("norms", "scales", "distances", "centroids", "spread"):
            signature[key] = POINTERS.get(key, "*fp32")
        else:
            signature[key] = parameter.annotation_type or "i32"
        if signature[key].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options}
    )
    return compiled.asm["cubin"], compiled.metadata.shared


def tool(name: str, *arguments: str) -> str:
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([binary, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("heads_first", [False, True])
def test_sequence_length_never_compiles_anew(heads_first, launches, monkeypatch):
    """Triton's own key of a compiled kernel is the same for odd, aligned and huge lengths."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    for seq in (21, 512, 517, 3_000_000):
        tokens = torch.empty(2, seq, 24, 72, dtype=torch.float16, device="meta")
        if heads_first:
            tokens = torch.empty(2, 24, seq, 72, dtype=torch.float16, device="meta").transpose(1, 2)
        kmeans(tokens, 20, iterations=1, backend="triton")
    monkeypatch.undo()
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    for kernel, launched in zip((module._assign_kernel, module._update_kernel), launches, strict=True):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys = set()
        for _, arguments, constants in launched.calls:
            # What has no data has no address; the allocator of a GPU aligns them all.
            real = [torch.empty(64, dtype=x.dtype) if isinstance(x, Tensor) else x for x in arguments]
            _, key, options = binder(*real, **constants)
            keys.add(str((key, sorted(options.items()))))
        assert len(launched.calls) == 4
        assert len(keys) == 1, keys
