"""Launch configurations, as data: what tuning may choose from, and the choice where nothing has been tuned.

The orders and the tile efficiencies are priors from arithmetic (bytes in flight, waves of 132 multiprocessors), not
measurements: tuning replaces them.
"""

import functools
from typing import NamedTuple


class FlatConfig(NamedTuple):
    """Elementwise kernels: elements a program owns."""

    block: int
    num_warps: int


class TileConfig(NamedTuple):
    """Per-channel kernels: a tile of block_e elements of each of block_c channels."""

    block_e: int
    block_c: int
    num_warps: int


class ConvConfig(NamedTuple):
    """Implicit GEMM: a tile of block_m pixels x block_n output channels, block_k products at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    efficiency: float = 1.0  # prior for the share of the tensor-core peak that this tile reaches
    capability: int = 80  # the oldest it compiles for without spilling registers
    persistent: bool = False  # 1x1 by tensor descriptors, a program for each multiprocessor

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operand ring, and of the residual and the output where descriptors move them."""
        ring = self.num_stages * (self.block_m + self.block_n) * self.block_k
        return (ring + (2 * self.block_m * self.block_n if self.persistent else 0)) * itemsize


FLAT = (FlatConfig(2048, 4), FlatConfig(1024, 4), FlatConfig(4096, 8))

# 8 or 16 elements a thread: 16-byte accesses, and sums that leave registers for many warps.
CHANNELS_LAST = (TileConfig(32, 64, 4), TileConfig(16, 128, 4), TileConfig(64, 64, 8))
CONTIGUOUS = (TileConfig(1024, 1, 4), TileConfig(2048, 1, 8), TileConfig(2048, 1, 4))
# A window takes several registers an element: smaller tiles.
POOLED_CHANNELS_LAST = (TileConfig(16, 64, 4), TileConfig(32, 64, 4))
POOLED_CONTIGUOUS = (TileConfig(512, 1, 4), TileConfig(256, 1, 4))

# The partition of a reduction follows from the shape alone, so results are the same bits on every device.
PROGRAMS = 2048  # programs a per-channel kernel aims for: 132 multiprocessors x 16
MAX_PARTIALS = 1024  # partials per channel that one program merges

CONV_TENSOR_CORE = (
    ConvConfig(128, 256, 64, 8, 3, capability=90),  # spills on sm_80, whose accumulators share the operands' registers
    ConvConfig(128, 128, 64, 8, 4),
    ConvConfig(256, 64, 64, 8, 4, efficiency=0.9),
    ConvConfig(128, 64, 64, 4, 4, efficiency=0.85),
    ConvConfig(64, 128, 64, 4, 4, efficiency=0.8),
    ConvConfig(128, 64, 32, 4, 5, efficiency=0.8),
    ConvConfig(64, 64, 64, 4, 5, efficiency=0.6),
    ConvConfig(128, 32, 32, 4, 5, efficiency=0.5),
    ConvConfig(64, 32, 64, 4, 5, efficiency=0.4),
    ConvConfig(64, 16, 32, 4, 5, efficiency=0.25),
)
CONV_TF32 = (
    ConvConfig(128, 128, 32, 8, 3),
    ConvConfig(128, 64, 32, 4, 4, efficiency=0.85),
    ConvConfig(64, 64, 64, 4, 3, efficiency=0.6),
    ConvConfig(64, 32, 32, 4, 4, efficiency=0.4),
)
CONV_IEEE = (  # no tensor cores: products in fp32 registers
    ConvConfig(64, 64, 16, 8, 3),
    ConvConfig(64, 32, 16, 4, 3, efficiency=0.8),
    ConvConfig(32, 32, 16, 4, 3, efficiency=0.6),
)
CONV_FEW_CHANNELS = (  # addresses for every element: small tiles, so that they stay in registers
    ConvConfig(64, 64, 32, 8, 3),
    ConvConfig(128, 32, 32, 8, 3, efficiency=0.8),
    ConvConfig(64, 16, 32, 4, 3, efficiency=0.4),
)
CONV_IEEE_FEW_CHANNELS = CONV_IEEE[1:]  # the first spills on sm_100
CONV_TF32_FEW_CHANNELS = CONV_IEEE[1:2]  # of 64 rows at least, as Hopper's products are
MULTIPROCESSORS = 132


def _persistent(*tiles: ConvConfig) -> tuple[ConvConfig, ...]:
    return tuple(tile._replace(capability=90, persistent=True) for tile in tiles)  # 90: the first with the copies


# Tiles that leave shared memory for a residual and an output, registers for both beside the accumulator.
CONV_PERSISTENT = _persistent(
    ConvConfig(128, 128, 64, 8, 4),
    ConvConfig(256, 64, 64, 8, 3, efficiency=0.9),
    ConvConfig(128, 64, 64, 4, 5, efficiency=0.85),
    ConvConfig(64, 128, 64, 4, 5, efficiency=0.8),
    ConvConfig(64, 64, 64, 4, 5, efficiency=0.6),
)
CONV_PERSISTENT_TF32 = _persistent(
    ConvConfig(128, 128, 32, 8, 3),
    ConvConfig(128, 64, 32, 4, 4, efficiency=0.85),
    ConvConfig(64, 64, 64, 4, 3, efficiency=0.6),
)


@functools.lru_cache(maxsize=1024)
def tile(elements: int, channels: int, channels_last: bool, pooled: bool = False) -> TileConfig:
    """Tile of a per-channel kernel: the first of the layout's list, cut down to the tensor."""
    tables = (POOLED_CONTIGUOUS, POOLED_CHANNELS_LAST) if pooled else (CONTIGUOUS, CHANNELS_LAST)
    block_e, block_c, num_warps = tables[channels_last][0]
    if channels_last and channels < block_c:
        narrow = _power_of_two(channels)
        block_e, block_c = block_e * block_c // narrow, narrow
    return TileConfig(min(block_e, _power_of_two(elements)), block_c, num_warps)


class Partition(NamedTuple):
    """Programs along the elements of a channel, and the consecutive tiles each of them walks."""

    programs: int
    tiles: int


@functools.lru_cache(maxsize=1024)
def partition(elements: int, channels: int, config: TileConfig) -> Partition:
    tiles = -(-elements // config.block_e)
    channel_tiles = -(-channels // config.block_c)
    wanted = min(tiles, MAX_PARTIALS, max(1, PROGRAMS // channel_tiles))
    tiles_each = -(-tiles // wanted)
    return Partition(-(-tiles // tiles_each), tiles_each)


def pivot_sample(elements: int) -> int:
    """Elements whose mean the statistics are taken about: a power of two, at most 16."""
    return min(16, _power_of_two(elements + 1) // 2)


class Limits(NamedTuple):
    """What a device allows: compute capability (90 for 9.0) and shared memory per block; how many blocks run at once."""

    capability: int
    shared_bytes: int
    multiprocessors: int = MULTIPROCESSORS


def conv_candidates(
    itemsize: int, tf32: bool, limits: Limits, few: bool = False, described: bool = False
) -> list[ConvConfig]:
    """Every configuration that fits the device; ``few``: taps and channels are one dimension; ``described``: of matrices
    that descriptors can describe.
    """
    if few:
        wide: tuple[ConvConfig, ...] = CONV_TF32_FEW_CHANNELS if tf32 else CONV_IEEE_FEW_CHANNELS
        narrow: tuple[ConvConfig, ...] = CONV_FEW_CHANNELS
    else:
        wide = CONV_TF32 if tf32 else CONV_IEEE
        narrow = CONV_TENSOR_CORE
    if described:  # first, for their copies run ahead; products in fp32 registers have no use for it
        wide, narrow = (*CONV_PERSISTENT_TF32, *wide) if tf32 else wide, (*CONV_PERSISTENT, *narrow)
    return [
        config
        for config in (narrow if itemsize == 2 else wide)
        if config.capability <= limits.capability and config.shared_bytes(itemsize) <= limits.shared_bytes
    ]


@functools.lru_cache(maxsize=1024)
def conv_heuristic(
    m: int, n: int, k: int, itemsize: int, tf32: bool, limits: Limits, few: bool = False, described: bool = False
) -> ConvConfig:
    """The candidate with the least estimated time: waves of tiles x padded work of a tile / its efficiency."""

    def time(config: ConvConfig) -> float:
        waves = -(-(-(-m // config.block_m) * -(-n // config.block_n)) // limits.multiprocessors)
        padded_k = -(-k // config.block_k) * config.block_k
        return waves * config.block_m * config.block_n * padded_k / config.efficiency

    return min(conv_candidates(itemsize, tf32, limits, few, described), key=time)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
