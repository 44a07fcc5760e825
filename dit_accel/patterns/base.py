"""What every pattern family works on, and what it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.kernels.backend import on_device
from dit_accel.kernels.scores import pooled_scores
from dit_accel.kernels.select import select_blocks

Option = str | int | float
_UNITS = 2.0**40  # of a row's mass
# Values of the option `branches`: guidance branches choose each for itself, or the first one of a step for all.
OWN, SHARED = BRANCHES = "own", "shared"
# Options of every dynamic family that say whom a choice serves.
SERVES: dict[str, Option] = {"reuse": 1, "layers": 1, "branches": OWN}
# What a dynamic family remembers of earlier steps of one layer, and of one guidance branch unless branches share it.
Memory = MutableMapping[str, Any]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Video blocks cut where a slice of the grid ends: a block at the border of two frames is a piece of each.

    Attributes:
        block: int64 `[pieces]`, the block of each piece, ascending.
        of_token: int64 `[tokens]`, the piece of each ordered token.
    """

    block: Tensor
    of_token: Tensor

    def means(self, values: Tensor) -> Tensor:
        """Of a value per token over each piece, float64 `[pieces]`."""
        sums = torch.zeros(2, len(self.block), dtype=torch.float64, device=values.device)
        sums.index_add_(1, self.of_token, torch.stack((values.double(), torch.ones_like(values).double())))
        return sums[0] / sums[1]

    def nearest(self, ranks: Tensor) -> Tensor:
        """Ranks `[pieces, pieces]` to those of blocks: that of the best pair of their pieces."""
        blocks = int(self.block[-1]) + 1
        for dim in (0, 1):
            shape = [*ranks.shape]
            shape[dim] = blocks
            number = self.block.view(-1, 1) if dim == 0 else self.block
            best = ranks.new_full(shape, torch.inf)
            ranks = best.scatter_reduce_(dim, number.expand_as(ranks), ranks, "amin")
        return ranks


@dataclass(frozen=True)
class BlockSpace:
    """A token order cut into blocks. Blocks that hold any text token are the last ones."""

    grid: TokenGrid
    order_name: str
    block: int
    device: torch.device

    @property
    def order(self) -> Tensor:
        """int64 `[seq]`: model position of each ordered token."""
        return self.grid.order(self.order_name, self.device)

    @property
    def blocks(self) -> int:
        """Number of blocks of the whole sequence."""
        return -(-self.grid.total_tokens // self.block)

    @property
    def video_blocks(self) -> int:
        """Number of blocks without any text token; families choose among these."""
        whole, rest = divmod(self.grid.video_tokens, self.block)
        return whole + bool(rest and not self.grid.text_tokens)

    def kept(self, density: float) -> int:
        """Video blocks that a row keeps at a density, text blocks counted towards it."""
        text_blocks = self.blocks - self.video_blocks
        return min(max(round(density * self.blocks) - text_blocks, 1), self.video_blocks)

    @property
    def chosen_tokens(self) -> int:
        """Number of tokens in the video blocks."""
        return min(self.video_blocks * self.block, self.grid.video_tokens)

    def reorder(self, tokens: Tensor) -> Tensor:
        """Put `[batch, seq, heads, dim]` from the model's order into this one."""
        if self.grid.is_model_order(self.order_name):
            return tokens
        return tokens.index_select(1, self.order)

    def means(self, tokens: Tensor, dim: int, run: int) -> Tensor:
        """Average the video blocks' tokens over each run of `run` ordered tokens along `dim`."""
        whole, rest = divmod(self.chosen_tokens, run)
        means = tokens.narrow(dim, 0, whole * run).unflatten(dim, (whole, run)).mean(dim + 1)
        if not rest:
            return means
        return torch.cat((means, tokens.narrow(dim, whole * run, rest).mean(dim, keepdim=True)), dim=dim)

    def pieces(self, slices: Tensor) -> Pieces:
        """Cut the video blocks where the order passes from one slice to the next, if it does not come back.

        Args:
            slices: int64 `[chosen_tokens]` on the CPU, the frame (or row, or column) of each ordered token.
        """
        block = torch.arange(self.chosen_tokens, device=slices.device) // self.block
        if (slices.diff() < 0).any():
            return Pieces(block.unique(), block)
        whole = block * (int(slices.max()) + 1) + slices
        numbers, of_token = whole.unique(return_inverse=True)
        return Pieces(numbers // (int(slices.max()) + 1), of_token)

    def run_sizes(self, run: int) -> Tensor:
        """Count the tokens of each run that `means` averages, float32 `[runs]`."""
        starts = torch.arange(0, self.chosen_tokens, run, dtype=torch.float32, device=self.device)
        return (self.chosen_tokens - starts).clamp(max=run)


def _chooses_nothing(*_: object, **__: object) -> Tensor:
    raise TypeError("this family arranges its tokens itself; call its arrange")


@dataclass(frozen=True)
class Family:
    """A way of choosing key blocks.

    Attributes:
        name: as plans and presets spell it.
        choose: `choose(space, kept, **options)` of a static family returns a bool mask over the video blocks,
            `[rows, cols]`, or `[heads, rows, cols]` if `per_head`. `choose(space, kept, query, key, scale, memory=...,
            **options)` of a dynamic one, with query and key in the order of the space, returns the lists. `memory` is a
            dict that it may use from step to step.
        arrange: instead of `choose`, of a dynamic family that puts the tokens into orders of its own:
            `arrange(grid, density, block, query, key, scale, memory=..., **options)` gets query and key in the model's
            order and returns a Selection.
        static: whether the choice depends on the grid alone, so that it can be made once.
        options: names and default values.
        density: the only density the family has, if there is but one.
        reads_text: whether video rows read the text columns.
        per_head: whether heads differ by their number alone; `choose` then gets `heads`, the tuple of these numbers.
        reads_values: whether `arrange` also gets `value` and `key_mask`.
        ranked: whether a row's choice is the first of a ranking, and a density says how many. Heads of different
            densities then choose together: `arrange` may get a tuple of densities and `choose` one of numbers of
            blocks, one for each head.
        unranked_by: options with which, unless they are 0, it is not.
        carry: `carry(memory, places)` is what of the memory of some heads still serves those at these places among them
            once they are given other densities, or fewer of them are; None if nothing does.
    """

    name: str
    choose: Callable[..., Any] = _chooses_nothing
    static: bool = True
    arrange: Callable[..., Selection] | None = None
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}))
    density: float | None = None
    reads_text: bool = True
    per_head: bool = False
    reads_values: bool = False
    ranked: bool = False
    unranked_by: tuple[str, ...] = ()
    carry: Callable[[Memory, tuple[int, ...]], Memory] | None = None

    def chooses_together(self, options: Mapping[str, Option]) -> bool:
        """Whether heads of different densities can choose together."""
        return self.ranked and not any(options.get(name) for name in self.unranked_by)

    def with_defaults(self, options: Mapping[str, Option]) -> dict[str, Option]:
        """Return the options completed with the defaults.

        Raises:
            ValueError: an option the family does not have, or a value of another type than its default.
        """
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"family {self.name!r} has no option {name!r}; its options are: {known}")
            default = self.options[name]
            types = (int, float) if isinstance(default, float) else (type(default),)
            if type(value) not in types:
                raise ValueError(
                    f"option {name!r} of family {self.name!r}: expected {type(default).__name__} "
                    f"(default {default!r}), got {value!r}"
                )
        return {**self.options, **options}

    def check_density(self, density: float) -> None:
        """Raise ValueError for a density the family cannot have."""
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 <= density <= 1.0:
            raise ValueError(f"density: expected a number from 0 to 1, got {density!r}")
        if self.density is not None and density != self.density:
            raise ValueError(f"family {self.name!r} has density {self.density} only, got {density!r}")


@dataclass(frozen=True, eq=False)
class Selection:
    """The key blocks that each query block of some heads reads.

    Attributes:
        index: block lists in the ordered token space.
        query_order, key_order: int64 `[1 or heads, seq]` or `[1 or batch, 1 or heads, seq]`, model position of each
            ordered token.
        grid: the token grid.
        order_name: what the grid calls this order; None if it comes from the data.
        share: the density as a number on the device, from a family that knows it without counting its lists.
    """

    index: BlockIndex
    query_order: Tensor
    key_order: Tensor
    grid: TokenGrid
    order_name: str | None
    share: Tensor | None = None

    def kept_share(self) -> Tensor:
        """The density as a float64 number on the device, for which the host does not wait."""
        return self.index.kept_share() if self.share is None else self.share

    @property
    def in_model_order(self) -> bool:
        """Whether no token has to move."""
        return self.order_name is not None and self.grid.is_model_order(self.order_name)

    @functools.cached_property
    def density(self) -> float:
        """Kept query-key pairs divided by all pairs, text included."""
        return self.index.density

    def repeated(self, times: int) -> Selection:
        """The same choice for a batch of so many batches like its own."""

        def again(x: Tensor) -> Tensor:
            return x if x.ndim < 3 or len(x) == 1 else x.repeat(times, *(1,) * (x.ndim - 1))

        index = self.index
        starts = (index.query_starts, index.key_starts)
        query_starts, key_starts = (None if x is None else again(x) for x in starts)
        return replace(
            self,
            index=replace(
                index,
                counts=again(index.counts),
                offsets=again(index.offsets),
                query_starts=query_starts,
                key_starts=key_starts,
            ),
            query_order=again(self.query_order),
            key_order=again(self.key_order),
        )

    def mask(self) -> Tensor:
        """Return the kept pairs in the model's order, bool `[batch or 1, heads, seq, seq]`."""
        mask = self.index.token_mask()
        batch = max(len(order) if order.ndim == 3 else 1 for order in (self.query_order, self.key_order))
        mask = mask.expand(max(batch, len(mask)), -1, -1, -1)
        rows, cols = (
            self.grid.inverse(order).expand(*mask.shape[:2], -1)
            for order in (self.query_order, self.key_order)
        )
        mask = mask.gather(2, rows[..., None].expand_as(mask))
        return mask.gather(3, cols[:, :, None].expand_as(mask))


def check_divisor(family: str, option: str, value: int, block: int) -> None:
    """Raise ValueError for a value of an option that does not divide the block."""
    if value < 1 or block % value:
        raise ValueError(
            f"option {option!r} of family {family!r}: expected a divisor of the block, {block}, got {value}"
        )


def check_share(family: str, option: str, value: float) -> None:
    """Raise ValueError for a value of an option that is no share."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"option {option!r} of family {family!r}: expected a number from 0 to 1, got {value!r}"
        )


def everything(space: BlockSpace) -> Tensor:
    """Return the mask of all pairs of blocks, bool `[1, 1, blocks, blocks]`."""
    return torch.ones(1, 1, space.blocks, space.blocks, dtype=torch.bool, device=space.device)


def with_text(space: BlockSpace, mask: Tensor, reads_text: bool = True) -> Tensor:
    """Extend a mask over video blocks by the rows and columns of the blocks that hold text."""
    if space.video_blocks == space.blocks:
        return mask
    whole = mask.new_ones(*mask.shape[:2], space.blocks, space.blocks)
    whole[:, :, : space.video_blocks] = reads_text
    whole[:, :, : space.video_blocks, : space.video_blocks] = mask
    return whole


def lists_of(space: BlockSpace, mask: Tensor, heads: int, longest: int | None = None) -> BlockIndex:
    """Turn a mask `[batch or 1, heads or 1, blocks, blocks]` into lists; those of one head serve all.

    longest: of the rows' lists, where a choice is made while a generation runs.
    """
    tokens = space.grid.total_tokens
    # Only a GPU runs ahead of the host; on a CPU lists without gaps are faster.
    room = longest if mask.device.type == "cuda" else None
    return for_heads(BlockIndex.from_mask(mask, space.block, space.block, tokens, tokens, room=room), heads)


def for_heads(index: BlockIndex, heads: int) -> BlockIndex:
    """Lists of equal blocks with those of one head for all."""
    if index.heads == heads:
        return index
    counts, offsets = (part.expand(-1, heads, -1).contiguous() for part in (index.counts, index.offsets))
    return replace(index, counts=counts, offsets=offsets)


def ranked_lists(
    space: BlockSpace,
    scores: Tensor,
    kept: int | tuple[int, ...],
    *,
    masses: Tensor | None = None,
    top_p: float = 0.0,
    extra: Tensor | None = None,
    whole_map: bool = False,
    budget: Tensor | None = None,
) -> BlockIndex:
    """Lists of the `kept` video blocks that score highest in each row, of every head or of each; text as ever.

    Args:
        scores: `[batch, heads, rows, cols]` of the video blocks; of equal ones the lower number comes first.
        masses: like scores, adding up to 1 in a row: it keeps no more blocks than hold `top_p` of it.
        extra: bool like scores, blocks that a row keeps beside those.
        whole_map: the rows of a head compete: it keeps its `kept` · rows best, some rows more than others.
        budget: integer `[batch, heads]`, how many the rows of each head keep of these.
    """
    if not space.video_blocks:
        return lists_of(space, everything(space), scores.shape[1], space.blocks)
    of_heads = (kept,) if isinstance(kept, int) else kept
    keep = (on_device(of_heads, scores.device) if budget is None else budget)[..., None]
    if whole_map:
        keep = _shares_of_map(scores, keep, max(of_heads))
    if masses is not None:
        best = scores.topk(max(of_heads), dim=-1).indices
        keep = torch.minimum(keep, until_share(masses.gather(-1, best), top_p).sum(-1))
    if extra is not None:
        keep = keep + extra.sum(-1)
    texts, forced, seq = space.blocks - space.video_blocks, extra, space.grid.total_tokens
    if texts:
        # All rows read the columns that hold text.
        text = torch.arange(space.blocks, device=scores.device) >= space.video_blocks
        forced = text if extra is None else F.pad(extra, (0, texts)) | text
        scores, keep = F.pad(scores, (0, texts)), keep + texts
    found = select_blocks(
        scores.float(),
        block_q=space.block,
        block_k=space.block,
        seq_q=space.video_blocks * space.block if texts else seq,
        seq_k=seq,
        keep=keep,
        forced=forced,
        max_keep=max(of_heads) + texts if extra is None and not whole_map else space.blocks,
    )
    if not texts:
        return found
    # Rows that hold text read everything, from one list.
    whole = torch.arange(space.blocks, dtype=torch.int32, device=scores.device)
    return BlockIndex(
        F.pad(found.counts, (0, texts), value=space.blocks),
        F.pad(found.offsets, (0, texts), value=found.indices.numel()),
        torch.cat((found.indices, whole)),
        space.block,
        space.block,
        seq,
        seq,
    )


def _shares_of_map(scores: Tensor, kept: Tensor, most: int) -> Tensor:
    """How many of a head's `kept` · rows best are in each row, int64 `[batch, heads, rows]`; kept: `[.., 1]`."""
    rows, cols = scores.shape[2:]
    best = scores.flatten(2).topk(most * rows, dim=-1).indices
    among = torch.arange(most * rows, device=scores.device) < kept * rows
    counts = torch.zeros(scores.shape[:3], dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(2, best // cols, among.long().expand_as(best))


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Put `[batch, seq, heads, dim]` into an order `[1 or batch, 1 or heads, seq]` of each head."""
    return tokens.gather(1, order.transpose(1, 2)[..., None].expand_as(tokens))


def lists_until(
    space: BlockSpace, mask: Tensor, kept: int, query: Tensor, key: Tensor, scale: float, top_p: float
) -> BlockIndex:
    """Lists of a mask `[rows, cols]` of the video blocks, `kept` in each row, which stops once its best hold `top_p`.

    That is a share of the row's mass, as the means of blocks estimate it; query and key are `[batch, seq, heads, dim]`
    in the order of each head.
    """
    query, key = (x[:, : space.chosen_tokens] for x in (query, key))
    masses = pooled_scores(query, key, block_q=space.block, block_k=space.block, scale=scale)
    return ranked_lists(space, torch.where(mask, masses, -1.0), kept, masses=masses, top_p=top_p)


def until_share(masses: Tensor, top_p: float) -> Tensor:
    """Which of a row's masses, in the order in which they are kept, it keeps until they add up to a share.

    They are added up as integers: such a sum is the same in every run, whatever the order of its terms.
    """
    units = (masses * _UNITS).long()
    return units.cumsum(-1) - units < int(top_p * _UNITS)


def first_of(ranks: Tensor, kept: int) -> Tensor:
    """Return a bool mask of the `kept` lowest ranks of each row (last axis), equal ones by number."""
    first = ranks.argsort(dim=-1, stable=True)[..., :kept]
    return torch.zeros(ranks.shape, dtype=torch.bool, device=ranks.device).scatter_(-1, first, True)
