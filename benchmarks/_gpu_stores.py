"""Stores for benchmarks.gpu: rows and lists made on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dbattn.index._lists import Lists
from index_kernels import ListTable
from index_kernels._triton_segmented import BLOCK_LISTS, Level, Planes
from index_kernels.packed import pack_rows, scales
from index_kernels.summaries import PLANES

HEADS, KV_HEADS, DIM = 32, 8, 128
LEAST, MOST = 20, 44
LISTS_PER_CLUSTER = 16


@dataclass
class Store:
    """Rows in lists, and a query; as attend_segmented takes them."""

    query: Tensor
    keys: Tensor
    values: Tensor
    table: ListTable
    start: Tensor
    sealed: int
    scale: float
    table_bytes: int


def made_store(rows: int, batch: int, n_sink: int, hot: int, seed: int) -> Store:
    """Random rows in clusters of clusters, in lists of LEAST to MOST rows, all but sinks and hot ones."""
    noise = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device="cuda")

    sealed = rows - hot
    units = batch * KV_HEADS
    sizes = torch.randint(LEAST, MOST + 1, (rows // LEAST,), generator=noise, device="cuda")
    ends = sizes.cumsum(0)
    count = int((ends < sealed - n_sink).sum()) + 1
    ends = torch.cat([ends[: count - 1], ends.new_tensor([sealed - n_sink])])
    begin = n_sink + torch.cat([ends.new_zeros(1), ends[:-1]])
    size = ends + n_sink - begin
    clusters = -(-count // LISTS_PER_CLUSTER)
    owner = torch.searchsorted(ends, torch.arange(sealed - n_sink, device="cuda"), right=True)
    cluster = torch.arange(count, device="cuda") // LISTS_PER_CLUSTER
    keys = torch.empty(batch, KV_HEADS, rows, DIM, dtype=torch.bfloat16, device="cuda")
    values = torch.empty_like(keys)
    lists, supers, moments = list[Summed](), list[Summed](), list[tuple[Tensor, Tensor]]()
    for unit in range(units):
        centres = normal(clusters, DIM).repeat_interleave(LISTS_PER_CLUSTER, dim=0)[:count] + 0.6 * normal(count, DIM)
        means = normal(clusters, DIM).repeat_interleave(LISTS_PER_CLUSTER, dim=0)[:count] + 0.6 * normal(count, DIM)
        key, value = keys[unit // KV_HEADS, unit % KV_HEADS], values[unit // KV_HEADS, unit % KV_HEADS]
        for edge in (slice(0, n_sink), slice(sealed, rows)):
            key[edge], value[edge] = normal(*key[edge].shape).bfloat16(), normal(*key[edge].shape).bfloat16()
        key[n_sink:sealed] = (centres[owner] + 0.6 * normal(sealed - n_sink, DIM)).bfloat16()
        value[n_sink:sealed] = (means[owner] + 0.6 * normal(sealed - n_sink, DIM)).bfloat16()
        k, v = (part[n_sink:sealed].float() for part in (key, value))
        one = summed(k, v, owner, size)
        off_k, off_v = k - one.key[owner], v - one.value[owner]
        square = off_k.square().sum()
        moments.append(((off_k.T @ off_k / square).half(), (off_k.T @ off_v / square).half()))
        lists.append(one)
        rows_of = torch.zeros(clusters, dtype=torch.long, device="cuda").index_add_(0, cluster, size)
        supers.append(summed(k, v, cluster[owner], rows_of))
    first = torch.arange(0, count, LISTS_PER_CLUSTER, device="cuda")
    held = torch.bincount(cluster)
    planes = Planes(
        level(lists, batch, begin, size, size), level(supers, batch, first, held, rows_of),
        *(torch.stack(part).view(batch, KV_HEADS, DIM, DIM) for part in zip(*moments, strict=True)),
    )  # fmt: skip
    table = Lists(batch, KV_HEADS, DIM, DIM).table
    table.on(torch.device("cuda", torch.cuda.current_device()), PLANES, lambda *_: planes)
    query = asked(keys, n_sink, sealed, noise)
    size_bytes = sum(part.nbytes for part in vars(planes.lists).values() if isinstance(part, Tensor))
    return Store(
        query, keys, values, table, torch.zeros(batch, dtype=torch.int64, device="cuda"), sealed, DIM**-0.5, size_bytes
    )


class Summed(NamedTuple):
    """Of groups of rows: mean keys and values ``[n, DIM]``, mean squared distance of keys from theirs ``[n]``."""

    key: Tensor
    value: Tensor
    variance: Tensor


def summed(keys: Tensor, values: Tensor, owner: Tensor, size: Tensor) -> Summed:
    """What is known of the groups ``owner [rows]`` of ``size [n]`` rows."""
    key, value = (
        torch.zeros(len(size), DIM, device="cuda").index_add_(0, owner, part) / size[:, None] for part in (keys, values)
    )
    square = (keys - key[owner]).square().sum(dim=1)
    return Summed(key, value, torch.zeros(len(size), device="cuda").index_add_(0, owner, square) / size)


def level(found: list[Summed], batch: int, begin: Tensor, held: Tensor, size: Tensor) -> Level:
    """The same groups in all units, as the kernels take them."""
    count, grid = len(size), (batch, KV_HEADS)
    room = count + -count % BLOCK_LISTS

    def number(one: Tensor) -> Tensor:
        padded = torch.zeros(*grid, room, dtype=torch.int32, device="cuda")
        padded[:, :, :count] = one.int()
        return padded

    def whole(name: str) -> Tensor:
        parts = torch.stack([getattr(one, name) for one in found])
        padded = parts.new_zeros(*grid, room, *parts.shape[2:])
        padded[:, :, :count] = parts.view(*grid, *parts.shape[1:])
        return padded

    key, value = pack_rows(whole("key")), pack_rows(whole("value"))
    return Level(
        count * len(found), number(begin), number(held), number(size), whole("variance"), key[..., :-4].contiguous(),
        scales(key).contiguous(), value[..., :-4].contiguous(), scales(value).contiguous(),
    )  # fmt: skip


def asked(keys: Tensor, first: int, stop: int, noise: torch.Generator) -> Tensor:
    """A query ``[B, HEADS, 1, DIM]``: each head looks for one of the rows ``first .. stop``, as trained ones do."""
    aim = torch.randint(first, stop, (len(keys), KV_HEADS, HEADS // KV_HEADS), generator=noise, device="cuda")
    near = keys.gather(2, aim[..., None].expand(-1, -1, -1, DIM)).float()
    far = torch.randn(near.shape, generator=noise, device="cuda")
    return (near + 0.7 * far).reshape(-1, HEADS, 1, DIM).bfloat16()


def exact(store: Store) -> Tensor:
    """The dense answer, in float64, one KV head at a time."""
    return dense64(store.query, store.keys, store.values, store.scale)


def dense64(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of ``[B, Hq, 1, D]`` over all rows, in float64."""
    group = query.shape[1] // keys.shape[1]
    outs = []
    for h, asking in enumerate(query.split(group, dim=1)):
        weights = torch.softmax(scale * (asking[:, :, 0].double() @ keys[:, h].double().mT), dim=-1)
        outs.append((weights @ values[:, h].double())[:, :, None])
    return torch.cat(outs, dim=1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The mean over heads of the error's norm over the answer's."""
    off = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(off.mean())
