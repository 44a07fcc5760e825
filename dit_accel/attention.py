"""One attention call in five steps: group heads, select, merge, order and attend, restore."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex, block_sparse_attention, resolve_backend, resolve_precision
from dit_accel.kernels.backend import on_device
from dit_accel.kernels.low_rank import add_low_rank
from dit_accel.patterns import FAMILIES, Selection, select
from dit_accel.patterns.base import SHARED


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    row: Tensor | Sequence[int],
    *,
    block: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    layer: int | None = None,
    branch: str = "",
    step: int | None = None,
    now: int | None = None,
    paired: bool = False,
    cache: MutableMapping[Any, Any] | None = None,
    launches: MutableMapping[Any, Any] | None = None,
) -> tuple[Tensor, float | Tensor]:
    """Attend with a pattern per head, all heads of one precision in one launch.

    Args:
        query, key, value: `[batch, seq, heads, dim]` in the model's order, seq = `grid.total_tokens`.
        grid: the token grid of the sequence.
        candidates: the ways to run a head.
        row: number of the candidate of each head, `[heads]`, or `[1]` for all heads.
        block: tokens per block.
        scale: softmax scale, 1/√dim if None.
        key_mask: bool `[batch, seq]` in the model's order, True = may be read.
        backend: of `block_sparse_attention`.
        layer: number of the layer, which tells apart what is kept.
        branch: of guidance, which does so too.
        step: number of the denoising step, in which guidance branches may share a choice; None if there is but one.
        now: its number in any case, by which blocks that serve some steps grow old; `step` if None.
        paired: whether the batch holds two guidance branches, the unconditional one first. Where branches share a
            choice, the conditional one makes it.
        cache: keeps what dynamic families remember from step to step; its owner says for how long. Without a layer
            nothing is remembered.
        launches: keeps the lists of a layer's launches whose families are all static, until the layer has another row.

    Returns:
        The output like `query`, in the model's order, and the density of the call, on a GPU as a number there.

    Raises:
        ValueError: arguments that do not fit together.
    """
    heads = query.shape[2]
    chosen = [candidates[number] for number in _candidate_numbers(row, heads, len(candidates))]
    runs_in = {asked: _precision(asked, query, backend) for asked in {one.precision for one in chosen}}
    members_of: dict[str, list[int]] = {}
    for head, candidate in enumerate(chosen):
        members_of.setdefault(runs_in[candidate.precision], []).append(head)

    kept: dict[tuple[Any, ...], _Launch] = {}
    if launches is not None:
        name = (block, query.device, chosen)
        if layer not in launches or launches[layer][0] != name:
            launches[layer] = name, {}
            if cache is not None and layer is not None:
                _forget(cache, layer, chosen, list(members_of.values()))
        kept = launches[layer][1]

    def run(
        members: list[int], precision: str, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, float | Tensor]:
        of_members = [chosen[head] for head in members]
        static = all(FAMILIES[candidate.family].static for candidate in of_members)
        # Two prompts of a generation may differ in the length of their text.
        here = (grid, tuple(members))
        launch = kept.get(here) if static else None
        if launch is None:
            memories = None if layer is None else cache
            launch = _prepare(
                q,
                k,
                v,
                grid,
                of_members,
                members,
                block,
                scale,
                key_mask,
                layer or 0,
                branch,
                step,
                now,
                paired,
                memories,
            )
            if static:
                kept[here] = launch
        return launch.run(q, k, v, scale, key_mask, backend, precision), launch.density

    if len(members_of) == 1:
        ((precision, members),) = members_of.items()
        return run(members, precision, query, key, value)
    output = torch.empty_like(query)
    density: float | Tensor = 0.0
    for precision, members in members_of.items():
        at = on_device(tuple(members), query.device)
        q, k, v = (x.index_select(2, at) for x in (query, key, value))
        part, share = run(members, precision, q, k, v)
        output.index_copy_(2, at, part)
        density = density + share * (len(members) / heads)
    return output, density


@dataclass(frozen=True, eq=False)
class _Launch:
    """The block lists of the heads of one precision, and the order they speak of."""

    index: BlockIndex
    density: float | Tensor
    # int64 `[1 or heads, seq]` or `[1 or batch, heads, seq]`, None if every head keeps the model's order
    query_order: Tensor | None
    key_order: Tensor | None
    # weight of the means: float64 `[heads]`, or alike for all
    remainder: Tensor | bool
    low_rank: Sequence[_LowRank] = ()

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_mask: Tensor | None,
        backend: str,
        precision: str,
    ) -> Tensor:
        attention = functools.partial(
            block_sparse_attention,
            query,
            key,
            value,
            self.index,
            scale=scale,
            precision=precision,
            backend=backend,
            key_mask=key_mask,
            query_order=self.query_order,
            key_order=self.key_order,
            remainder=self.remainder,
        )
        if not self.low_rank:
            return attention()
        output, lse = attention(return_lse=True)
        for part in self.low_rank:
            part.complete(output, lse, query, key, value, scale, key_mask)
        return output


@dataclass(frozen=True, eq=False)
class _LowRank:
    """Heads of a launch whose left-out blocks contribute through random features."""

    selection: Selection
    members: tuple[int, ...]
    features: int
    seed: int

    def complete(
        self,
        output: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_mask: Tensor | None,
    ) -> None:
        at = None if len(self.members) == query.shape[2] else on_device(self.members, query.device)

        def of_members(x: Tensor, heads: int) -> Tensor:
            return x if at is None else x.index_select(heads, at)

        completed, _ = add_low_rank(
            of_members(output, 2),
            of_members(lse, 1),
            of_members(query, 2),
            of_members(key, 2),
            of_members(value, 2),
            self.selection.index,
            features=self.features,
            seed=self.seed,
            scale=scale,
            key_mask=key_mask,
            query_order=self.selection.query_order,
            key_order=self.selection.key_order,
        )
        if at is None:
            output.copy_(completed)
        else:
            output.index_copy_(2, at, completed)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    numbers: Sequence[int],
    block: int,
    scale: float | None,
    key_mask: Tensor | None,
    layer: int,
    branch: str,
    step: int | None,
    now: int | None,
    paired: bool,
    memories: MutableMapping[Any, Any] | None,
) -> _Launch:
    """Select for every group of heads and merge the groups.

    candidates: of every head of the tensors; numbers: which head of its layer each is.
    """
    heads = query.shape[2]
    chosen: list[tuple[Selection, list[int]]] = []
    low_rank: list[_LowRank] = []
    for members in _together(candidates):
        candidate = candidates[members[0]]
        family = FAMILIES[candidate.family]
        densities = tuple(candidates[member].density for member in members)
        q, k, v = query, key, value
        if len(members) < heads:
            # A static family looks at shapes alone, so any heads will do for it.
            some, at = slice(len(members)), on_device(tuple(members), query.device)
            q, k = (x[:, :, some] if family.static else x.index_select(2, at) for x in (query, key))
            v = value.index_select(2, at) if family.reads_values else value[:, :, some]
        options: dict[str, Any] = dict(candidate.options)
        in_layer = [numbers[member] for member in members]
        shared, mask = options.get("branches") == SHARED, key_mask
        one_for_both = shared and paired
        if one_for_both:
            conditional = slice(query.shape[0] // 2, None)
            q, k, v = (x[conditional] for x in (q, k, v))
            mask = None if key_mask is None else key_mask[conditional]
        memory = None
        if memories is not None:
            # Those that share a choice share a memory, layers that of the first of them.
            owner = layer - layer % max(options.get("layers", 1), 1), q.shape[0]
            name = _name([candidates[member] for member in members], in_layer)
            together = shared and step is not None
            memory = _memory(memories, (grid, block, owner), branch, name, together=together)
        selection = select(
            candidate.family,
            q,
            k,
            grid,
            density=densities,
            block=block,
            scale=scale,
            value=v,
            key_mask=mask,
            state=memory,
            heads=in_layer,
            layer=layer,
            step=step,
            now=now,
            **options,
        )
        chosen.append((selection.repeated(2) if one_for_both else selection, members))
        if candidate.features is not None:
            low_rank.append(_LowRank(chosen[-1][0], tuple(members), *candidate.features))
    index = chosen[0][0].index
    if len(chosen) > 1:
        index = BlockIndex.merge_heads([(selection.index, members) for selection, members in chosen], heads)
    remainder = _remainder(candidates, query.device)
    # On a GPU the host must not wait for a number that only statistics need.
    share = sum(selection.kept_share() * (len(members) / heads) for selection, members in chosen)
    density = share if query.device.type == "cuda" else float(share)
    if all(selection.in_model_order for selection, _ in chosen):
        return _Launch(index, density, None, None, remainder, low_rank)
    names = {selection.order_name for selection, _ in chosen}
    if len(chosen) == 1 or (len(names) == 1 and None not in names):
        first = chosen[0][0]
        return _Launch(index, density, first.query_order, first.key_order, remainder, low_rank)
    query_order = _merged([(selection.query_order, members) for selection, members in chosen], heads)
    if all(selection.key_order is selection.query_order for selection, _ in chosen):
        return _Launch(index, density, query_order, query_order, remainder, low_rank)
    key_order = _merged([(selection.key_order, members) for selection, members in chosen], heads)
    return _Launch(index, density, query_order, key_order, remainder, low_rank)


def _memory(
    memories: MutableMapping[Any, Any], place: tuple[Any, ...], branch: str, name: Any, *, together: bool
) -> dict[str, Any]:
    """What heads remember, by guidance branch or for all of them.

    In the first step nobody knows that there will be another branch, so each has its own; from then on branches that
    share a choice go on with that of the first one.
    """
    if not together:
        return memories.setdefault((*place, branch), {}).setdefault(name, {})
    shared = memories.setdefault((*place, None), {})
    if name not in shared:
        alone = {
            key[-1]: kept.pop(name)
            for key, kept in memories.items()
            if key[:-1] == place and key[-1] is not None and name in kept
        }
        shared[name] = alone.get(branch, {})
    return shared[name]


def _merged(parts: Sequence[tuple[Tensor, list[int]]], heads: int) -> Tensor:
    """One order for all heads, `[1 or batch, heads, seq]`."""
    first = parts[0][0]
    batch = max(order.shape[0] if order.ndim == 3 else 1 for order, _ in parts)
    merged = first.new_empty(batch, heads, first.shape[-1])
    for order, members in parts:
        merged[:, on_device(tuple(members), first.device)] = order
    return merged


def _name(candidates: Sequence[Candidate], numbers: Sequence[int]) -> tuple[Any, ...]:
    """What heads that choose together remember under; numbers: theirs in the layer."""
    densities = tuple(candidate.density for candidate in candidates)
    return candidates[0].family, candidates[0].options, densities, tuple(numbers)


def _forget(
    cache: MutableMapping[Any, Any], layer: int, chosen: Sequence[Candidate], launches: Sequence[list[int]]
) -> None:
    """Drop what a layer's heads remember of an earlier row, but for what goes on serving them in the new one."""
    used = set()
    for heads in launches:
        for group in _together([chosen[head] for head in heads]):
            members = [heads[place] for place in group]
            used.add(_name([chosen[head] for head in members], members))
    for (_, _, (owner, _), _), memories in cache.items():
        if owner == layer:
            for name in used - memories.keys():
                if (carried := _carried(memories, name)) is not None:
                    memories[name] = carried
            for name in memories.keys() - used:
                del memories[name]


def _carried(memories: Mapping[Any, dict[str, Any]], name: tuple[Any, ...]) -> dict[str, Any] | None:
    """What heads bring along that were in the same family before, if all of them were."""
    family, options, _, numbers = name
    carry = FAMILIES[family].carry
    if carry is None:
        return None
    for (*kind, _, before), memory in memories.items():
        if kind == [family, options] and set(numbers) <= set(before):
            return dict(carry(memory, tuple(map(before.index, numbers))))
    return None


def _together(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Heads that choose together: what their means weigh does not matter, their densities only to some families."""
    groups: dict[Any, list[int]] = {}
    for head, candidate in enumerate(candidates):
        any_density = FAMILIES[candidate.family].chooses_together(dict(candidate.options))
        name = candidate.family, candidate.options, None if any_density else candidate.density
        groups.setdefault(name, []).append(head)
    return list(groups.values())


def _remainder(candidates: Sequence[Candidate], device: torch.device) -> Tensor | bool:
    """What the means of each head weigh."""
    # Dense heads leave nothing out, so they go along with the others.
    wanted = {candidate.remainder for candidate in candidates if candidate.family != "dense"}
    if wanted <= {0.0} or wanted == {1.0}:
        return wanted == {1.0}
    return _weights(tuple(float(candidate.remainder) for candidate in candidates), device)


@functools.lru_cache(maxsize=4096)
def _weights(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 `[len(numbers)]`, copied once, see `on_device`."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device=device)


def _precision(asked: str, query: Tensor, backend: str) -> str:
    """The precision that stands for one that was asked for."""
    if backend != "auto" or asked == "native":
        return asked
    return resolve_precision(asked, query.device, resolve_backend(query.device, query.dtype))


def _candidate_numbers(row: Tensor | Sequence[int], heads: int, candidates: int) -> list[int]:
    numbers = [int(number) for number in (row.tolist() if isinstance(row, Tensor) else row)]
    if len(numbers) not in (1, heads):
        raise ValueError(
            f"row: expected 1 or {heads} candidate numbers, one for each head, got {len(numbers)}"
        )
    if not all(0 <= number < candidates for number in numbers):
        raise ValueError(f"row: expected candidate numbers from 0 to {candidates - 1}, got {numbers}")
    return numbers if len(numbers) == heads else numbers * heads
