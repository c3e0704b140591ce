"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU: does it fit, or spill?

What is compiled is what the launchers launch: they run on CPU tensors with their kernels replaced by recorders.
The work is done in processes of their own, because a kernel is either compiled or interpreted for life.
"""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 (after the check that there is a triton)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dbattn.index._lists import Lists  # noqa: E402
from index_kernels import ListReading  # noqa: E402
from index_kernels.packed import SCALE_BYTES  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORED = (*FLOATS, torch.int8)
HEAD_DIMS = (64, 80, 128, 256)
ROWS = 4096
# Bytes that ptxas rather spills than to let fewer programs run at once: kernels that wait for rows in the memory of the
# host, and one whose registers are capped at 128, which took an H100 3 % less time.
SPILLED = {"choose_kernel": 32, "attend_coded_kernel": 80, "attend_kernel": 64}


class Usage(NamedTuple):
    kernel: str
    registers: int
    shared: int
    spilled: int


@triton.jit
def spilling_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tile = tl.load(at)
    tl.store(at, tile / tl.sum(tile))


@triton.jit
def oversized_kernel(x, K: tl.constexpr):
    deep, narrow, wide = tl.arange(0, K), tl.arange(0, 16), tl.arange(0, 128)
    a = tl.load(x + narrow[:, None] * K + deep[None, :])
    b = tl.load(x + deep[:, None] * 128 + wide[None, :])
    tl.store(x + narrow[:, None] * 128 + wide[None, :], tl.dot(a, b).to(a.dtype))


def asked(dtype, dim, batch=1, m=1):
    """A query ``[batch, 8, m, dim]`` and rows ``[batch, 2, ROWS, dim]`` of a type; packed ones are asked in float32."""
    packed = dtype == torch.int8
    query = torch.zeros(batch, 8, m, dim, dtype=torch.float32 if packed else dtype)
    return query, torch.zeros(batch, 2, ROWS, dim + SCALE_BYTES * packed, dtype=dtype)


def launch_attend_rows(dtype, dim):
    query, rows = asked(dtype, dim)
    ids, ranges = torch.zeros(1, 8, 1, 512, dtype=torch.int64), torch.zeros(1, 8, 1, 48, 2, dtype=torch.int64)
    launch("attend_rows", query, rows, rows, scale=0.1, ids=ids, ranges=None, log_weights=None, softcap=None)
    weights = torch.zeros(1, 8, 1, 48)
    launch("attend_rows", query, rows, rows, scale=0.1, ids=None, ranges=ranges, log_weights=weights, softcap=30.0)


def launch_top_k(dtype, dim):
    query, rows = asked(dtype, dim, batch=2, m=2)
    bounds = torch.zeros(2, dtype=torch.int64)
    for k in (100, ROWS):
        launch("top_k", query, rows, k, scale=0.1, start=bounds, stop=bounds)


def launch_merge_states(dtype, dim):
    launch("merge_states", torch.zeros(20, 1, 8, 1, dim, dtype=dtype), torch.zeros(20, 1, 8, 1, dtype=dtype))


def launch_places(dtype, dim):
    query, rows = asked(dtype, dim, m=512)
    places = torch.zeros(1, 2, 1000, dtype=torch.int64)
    for softcap in (None, 30.0):
        launch("attend_places", query, rows, rows, places, scale=0.1, softcap=softcap, file="blocks")


def launch_rotate(dtype, dim):
    for op in ("rotated", "packed_rotated"):
        launch(op, torch.zeros(1, 8, 100, dim, dtype=dtype), file="rotate")


def launch_sizes_of_one(dtype, dim):
    """Triton turns every size of one into a constant, which takes other paths through its compiler."""
    row, one = torch.zeros(1, 1, 1, dim, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    few = {"ids": one.view(1, 1, 1, 1), "ranges": None}, {"ids": None, "ranges": one.expand(1, 1, 1, 1, 2)}
    for rows in few:
        launch("attend_rows", row, row, row, scale=1.0, **rows, log_weights=torch.zeros(1, 1, 1, 1), softcap=1.0)
    launch("top_k", row, row, 1, scale=1.0, start=one, stop=one)
    launch("merge_states", row[None], row[None, ..., 0])


# softcap, tail, whether rows are chosen by code, weights, and rows under opened super-lists
BY_CODE = ((30.0, True, True, tuple(map(float, range(8))), ROWS // 2),)
WHOLE = ((None, True, False, None, ROWS // 2), (30.0, False, False, tuple(map(float, range(8))), 2 * ROWS))


def launch_segmented(kinds, dtype, dim):
    query, rows = asked(dtype, dim)
    lists = Lists(1, 2, dim, dim)
    lists.reserve([0, ROWS], ROWS)
    lists.lists.used[:] = ROWS // 32
    start = torch.zeros(1, dtype=torch.int64)
    for softcap, tail, by_code, head_weights, opened in kinds:
        newest = None if softcap is None else torch.zeros(1, dtype=torch.int64)
        how = ListReading(ROWS - 100, ROWS, 4, 400, 400, opened, 0.1, softcap, 0.4, 0.7, tail, head_weights)
        launch(
            "attend_segmented", query, rows, rows, lists.table, how, start=start, budget=400, by_code=by_code,
            details=False, newest=newest, file="segmented",
        )  # fmt: skip


def launch(op, *args, file=None, **kwargs):
    getattr(import_module(f"index_kernels._triton_{file or op}"), op)(*args, **kwargs)


LIST_KERNELS = {"score_kernel", "rank_kernel", "lay_kernel", "score_named_kernel", "attend_kernel", "merge_kernel"}
# By dtype the head dims compiled for; float16 differs from bfloat16 in a conversion alone.
CASES = {
    "attend_rows": (
        launch_attend_rows,
        {torch.float32: HEAD_DIMS, torch.float16: (128,), torch.bfloat16: HEAD_DIMS, torch.int8: (128,)},
        {"_attend_kernel", "_merge_kernel"},  # merges what it has split
    ),
    # One kernel for all multiples of 16.
    "top_k": (launch_top_k, dict.fromkeys(FLOATS, (80,)), {"_score_kernel", "_unpack_kernel"}),
    "merge_states": (launch_merge_states, {torch.float32: HEAD_DIMS}, {"_merge_kernel"}),
    # Not in float32, which is seldom kept on a device: compiling takes long, and rows of 256 numbers spill.
    "segmented by code": (
        partial(launch_segmented, BY_CODE),
        {torch.bfloat16: (128, 256), torch.int8: (128,)},
        LIST_KERNELS | {"choose_kernel", "attend_coded_kernel"},
    ),
    "segmented": (partial(launch_segmented, WHOLE), {torch.bfloat16: (128, 256)}, LIST_KERNELS),
    "places": (
        launch_places,
        {torch.float32: (64,), torch.bfloat16: (80, 128, 256), torch.int8: (128,)},
        {"attend_places_kernel"},
    ),
    "rotate": (launch_rotate, {torch.float32: (256,), torch.bfloat16: (128,)}, {"rotate_kernel"}),
    "sizes_of_one": (
        launch_sizes_of_one,
        {torch.float32: (64,)},
        {"_attend_kernel", "_merge_kernel", "_score_kernel", "_unpack_kernel"},
    ),
}


def dims_of(case, dtype, capability):
    """Head dims that are compiled: all for sm_90, the widest for sm_80, which has the least room, else a usual one."""
    dims = CASES[case][1][dtype]
    if capability == 90:
        return dims
    if case in ("segmented", "sizes_of_one"):
        return ()  # the same kernels as by code, told otherwise; the same path through the compiler
    if dtype == torch.int8:
        return ()  # read as four bytes at once on all
    if capability == 80:
        return dims[-1:]
    usual = torch.float32 if case == "merge_states" else torch.bfloat16
    return tuple(dim for dim in dims if dim == 128 and dtype == usual)


TOYS = {
    "spilling": (spilling_kernel, {"x": torch.zeros(4), "BLOCK": 16384}, {"num_warps": 1}),
    "oversized": (oversized_kernel, {"x": torch.zeros(4, dtype=torch.float16), "K": 1024}, {"num_warps": 16}),
}


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
        self.launches.append((self.kernel, self.kernel.signature.bind(*args, **kwargs).arguments, options))


def record(case, dtype, dim):
    launches, patch = [], pytest.MonkeyPatch()
    patch.setattr("index_kernels._triton_segmented.MANY_ROWS", 0)
    for name in ("attend_rows", "top_k", "merge_states", "segmented", "blocks", "rotate"):
        module = import_module(f"index_kernels._triton_{name}")
        for attribute in [a for a in vars(module) if a.endswith("_kernel")]:
            patch.setattr(module, attribute, Recorder(getattr(module, attribute), launches))
    try:
        CASES[case][0](dtype, dim)
    finally:
        patch.undo()
    return launches


def specialise(value):
    """The type, and whether it is a multiple of 16, that Triton's launcher gives an argument."""
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("constexpr", False) if value is None or value == 1 else ("i32", value % 16 == 0)


def measure(kernel, arguments, options, capability):
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    kinds = {
        name: ("constexpr", False) if name in fixed else ("i32", False) if name in plain else specialise(v)
        for name, v in arguments.items()
    }
    constants = {name: arguments[name] for name, (kind, _) in kinds.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, multiple) in enumerate(kinds.values()) if multiple}
    source = ASTSource(kernel, {name: kind for name, (kind, _) in kinds.items()}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    (arch,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", "kernel.ptx", "-o", "kernel.cubin"]
        log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    ((stores, loads),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Usage(kernel.__name__, int(registers), compiled.metadata.shared, int(stores) + int(loads))


def measure_case(case, dtype, dim, capability):
    return [measure(*launched, capability) for launched in record(case, dtype, dim)]


def measure_toy(name, capability):
    return measure(*TOYS[name], capability)


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize(
    ("case", "dtype", "capability"),
    [each for each in product(CASES, STORED, SHARED_LIMIT) if each[1] in CASES[each[0]][1] and dims_of(*each)],
)
def test_kernels_fit_and_do_not_spill(compilers, case, dtype, capability):
    dims = dims_of(case, dtype, capability)
    results = [compilers.submit(measure_case, case, dtype, dim, capability) for dim in dims]
    for dim, result in zip(dims, results, strict=True):
        usages = result.result()
        assert {usage.kernel for usage in usages} == CASES[case][2]
        for usage in usages:
            print(f"sm_{capability} {DTYPES[dtype]} head dim {dim}: {usage}")
            assert usage.spilled <= SPILLED.get(usage.kernel, 0), f"{usage} spills at head dim {dim}"
            assert usage.shared <= SHARED_LIMIT[capability], f"{usage} does not fit at head dim {dim}"


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_the_detector_sees_a_kernel_that_spills(compilers, capability):
    assert compilers.submit(measure_toy, "spilling", capability).result().spilled > 0


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_the_detector_sees_a_kernel_that_does_not_fit(compilers, capability):
    assert compilers.submit(measure_toy, "oversized", capability).result().shared > SHARED_LIMIT[capability]
