"""What the kernels within a sample do with the values of a tile, whatever its shape.

`where` is where they are: offsets in x, offsets in a mask and which of these there are (of the rank of the tile, 1
where the mask does not reach), and which values there are. `constants` are high, low · invstd and invstd of the
statistics, `scaling` scale and shift of the channels, both as they meet the tile.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.activations import activate, gradient_at
from steadynorm.kernels.gpu.tiles import is_valid, load


@triton.jit
def valid(mask, where):
    """Which values count: those that are there and, where there is a mask, that it has."""
    if mask is None:
        return where[3]
    else:
        return is_valid(mask, where[1], where[2]) & where[3]


@triton.jit
def added(x, addend, total_out, where, ACC: tl.constexpr):
    """x + addend, rounded to the type of x, and written where there is a place for it."""
    offset, there = where[0], where[3]
    values = load(x, offset, there, ACC)
    if addend is not None:
        rounded = (values + load(addend, offset, there, ACC)).to(x.dtype.element_ty)
        if total_out is not None:
            tl.store(total_out + offset, rounded, mask=there)
        values = rounded.to(ACC)
    return values


@triton.jit
def finish(normalized, residual, mask, y, where, scaling, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """Write y of what is normalized."""
    z = normalized * scaling[0] + scaling[1]
    if residual is not None:
        z += load(residual, where[0], where[3], ACC)
    z = activate(z, ACTIVATION)
    if mask is not None:
        z = tl.where(valid(mask, where), z, 0)
    tl.store(y + where[0], z, mask=where[3])


@triton.jit
def gradients(dy, x, side, mask, where, constants, scaling, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """x̂ and g, zero where nothing is valid."""
    offset, there = where[0], where[3]
    high, low, invstd = constants
    normalized = (load(x, offset, there, ACC) - high) * invstd - low
    g = gradient_at(dy, side, offset, there, normalized, scaling[0], scaling[1], ACTIVATION, ACC)
    is_there = valid(mask, where)
    return tl.where(is_there, normalized, 0), tl.where(is_there, g, 0)


@triton.jit
def leave(inside, dtotal, mask, dx, where, ACC: tl.constexpr):
    """Write dx: what came through the normalization, and what comes to the sum itself."""
    if dtotal is not None:
        inside += load(dtotal, where[0], where[3], ACC)
    if mask is not None:
        inside = tl.where(valid(mask, where), inside, 0)
    tl.store(dx + where[0], inside, mask=where[3])
