"""Published systems as uncalibrated plans: the family that each is in our terms, with the settings of its authors.

Where a system leaves the density to its calibration, one is given that its paper's range holds. Where it calibrates
more than that, its comment says what stands in for it here; `dit-accel calibrate` chooses per head. `warm_up` is the
part of denoising, as a noise level, that it leaves dense, `dense_layers` the share of layers. Authors count steps: at
50 steps and a flow shift of 5 the first 5, 10 and 15 steps lie at noise levels above .977, .955 and .923. The same
levels are other numbers of steps elsewhere: of the 10 of `svg` 13 at a shift of 7 (HunyuanVideo) and 3 of CogVideoX.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A family with its density, options, tokens per block, and dense beginning (progress from 0 to 1).

    dense_layers: share of the layers, the first ones, that stay dense.
    calibrated: what the authors calibrate, where one choice for all heads stands in for it here; chosen: what
        `calibrate(..., candidates=NAME)` chooses for each head in its place.
    """

    family: str
    density: float
    options: dict[str, str | int | float] = field(default_factory=dict)
    block: int = 64
    warm_up: float = 0.0
    dense_layers: float = 0.0
    calibrated: str = ""
    chosen: str = ""


PRESETS: dict[str, Preset] = {
    # Row-uniform top-k at sparsity .8; heads whose blocks hold more than .8 of the mass give to others; searched at
    # steps 10 and 30 of 50. https://arxiv.org/abs/2502.21079
    "adaspa": Preset("searched", 0.2, {"order": "frame", "reuse": 20, "easy": 0.8}, warm_up=0.045),
    # A circle around every query of an image; the authors distil the model to it. https://arxiv.org/abs/2412.16112
    "clear": Preset("window", 0.2, {"order": "tile:1x8x8", "shape": "ball"}),
    # The 16 channels that weigh most (an eighth of 128), calibrated by the authors, here found in each call.
    # https://arxiv.org/abs/2408.07092
    "doublesparsity": Preset(
        "channels",
        0.25,
        {"order": "frame"},
        calibrated="the channels",
        chosen="how many channels count, and the share of its blocks",
    ),
    # Means of 8 x 16 patches of a frame, the best quarter (Wan) of a head's whole map; a row keeps its own patch in any
    # case. https://arxiv.org/abs/2505.14708
    "draft": Preset("pooled", 0.25, {"order": "tile:1x8x16", "parts": 1, "budget": "map"}, block=128),
    # The tiles on the diagonal and a few reference frames. https://arxiv.org/abs/2502.06155
    "efficient-vdit": Preset("attention_tile", 0.3),
    # Sorted by a hash of random hyperplanes. What the authors sample from the rest is left out; `remainder=True` gives
    # its means. https://arxiv.org/abs/2310.05869
    "hyperattention": Preset("hashed", 0.25),
    # Columns, diagonals and sinks; the authors calibrate which heads are A-shaped or pooled instead.
    # https://arxiv.org/abs/2407.02490
    "minference": Preset(
        "stripes",
        0.3,
        {"slashes": 1},
        calibrated="which heads are A-shaped or pooled",
        chosen="columns and diagonals, sinks and neighbours or pooled blocks, and their share",
    ),
    # Sinks and a span that grows with the sequence; the authors calibrate each head's α + β · length, here β is the
    # density of all. https://arxiv.org/abs/2406.14909
    "moa": Preset("bands", 0.3, {"sinks": 1}, calibrated="the span of each head", chosen="its span"),
    # A box around every query. https://arxiv.org/abs/2504.16922
    "natten": Preset("window", 0.3, {"shape": "clamped"}),
    # The axis order in which each head is most local; the authors calibrate it, and masks of blocks in it, where here
    # the call's own rows choose and the mask is a band. https://arxiv.org/abs/2506.16054
    "paro": Preset(
        "profiled",
        0.3,
        {"orders": "fhw+fwh+hfw+hwf+wfh+whf"},
        calibrated="the axis order and the mask of each head",
        chosen="an axis order and the width of a band in it",
    ),
    # Keys sorted in segments of 256, then means until .9 of the mass. https://arxiv.org/abs/2510.21270
    "pbs": Preset("pooled", 1.0, {"order": "frame", "parts": 1, "segment": 256, "top_p": 0.9}, block=128),
    # Decaying neighbourhoods, with the first frame as a sink. https://arxiv.org/abs/2506.19852
    "radial": Preset("radial", 0.3, {"sink": 1}, block=128, warm_up=0.05),
    # A stretch around every query, and the head's share of the other columns. https://arxiv.org/abs/2407.17678
    "s2": Preset("sharded", 0.3),
    # Sorted by a hash, the rest by random features, as many as a head has channels in most models.
    # https://arxiv.org/abs/2110.15343
    "scatterbrain": Preset("hashed", 0.25, {"features": 64}),
    # Bands, skipped and dense heads, found by calibration; without it all heads are bands.
    # https://arxiv.org/abs/2506.03065
    "sparse-vdit": Preset(
        "bands",
        0.4,
        calibrated="bands, skipping or dense attention for each head",
        chosen="bands, columns, skipping or dense attention",
    ),
    # Means until .9 of the mass, with the self-similarity guard; the authors calibrate both thresholds per head, these
    # are their defaults. Theirs are blocks of 128 queries and 64 keys, in 8 bits, and products with values that weigh
    # nothing are skipped. https://arxiv.org/abs/2502.18137
    "sparge": Preset(
        "pooled",
        1.0,
        {"parts": 1, "guard": 0.1, "top_p": 0.9},
        calibrated="both thresholds of each head",
        chosen="its share of the mass and the least similarity of its blocks",
    ),
    # 4-bit estimates; the authors keep the blocks with a score over a threshold, relative to the sinks and the
    # neighbourhood and calibrated for each head, here each row keeps its best. https://arxiv.org/abs/2505.24179
    "sale": Preset(
        "lowbit",
        0.3,
        {"order": "frame"},
        calibrated="the threshold of each head",
        chosen="the share of its blocks",
    ),
    # Bands in frame-major or space-major order, whichever serves 64 rows better; ten dense steps of 50; a sink as on
    # Wan (HunyuanVideo has none). https://arxiv.org/abs/2502.01776
    "svg": Preset(
        "profiled",
        0.3,
        {"orders": "fhw+hwf", "samples": 64, "sink": 1},
        block=128,
        warm_up=0.045,
        dense_layers=0.03,
    ),
    # k-means, .9 of the estimated mass and at least a tenth of the clusters, whose numbers are those of Wan at 720p in
    # proportion to the tokens (HunyuanVideo has 400 and 1,000). https://arxiv.org/abs/2505.18875
    "svg2": Preset(
        "clustered", 1.0, {"top_p": 0.9, "least": 0.1, "iterations": 50}, block=128, warm_up=0.077
    ),
    # Tiles of 6 x 8 x 8 tokens, a window for all heads where the authors calibrate one each. A block is a third of a
    # tile and has a window of its own; with block=384 it is a tile. https://arxiv.org/abs/2502.04507
    "sta": Preset(
        "window",
        0.3,
        {"order": "tile:6x8x8", "aspect": 0.75, "shape": "clamped"},
        block=128,
        warm_up=0.06,
        calibrated="the window of each head",
        chosen="its window",
    ),
    # Clusters with a density per head, found by calibration; without it all heads have one.
    "svoo": Preset(
        "clustered",
        0.3,
        {"iterations": 50},
        block=128,
        calibrated="the density of each head",
        chosen="its density",
    ),
    # Stride 8 until .95 of the mass, in blocks of 128, five dense steps of 50. https://arxiv.org/abs/2503.16428
    "xattention": Preset(
        "antidiagonal", 1.0, {"order": "frame", "stride": 8, "top_p": 0.95}, block=128, warm_up=0.02
    ),
}
