"""How the codes of a weight are found: rounding, and what is better than rounding at few bits.

Each method takes a float (N, K) weight and a format and gives a PackedWeight; gptq and awq also what is known
of the layer's inputs, and awq takes the weights of all layers that share an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import memory
from .formats import WeightFormat
from .packed import (
    DTYPES,
    PackedWeight,
    as_matrix,
    extremes,
    grouped,
    is_finite,
    pack_codes,
    row_blocks,
    stored_scale,
)
from .scheme import Scheme

Parameters = tuple[Tensor, Tensor | None]  # scale and zero (N, groups), float32

# Ranges between this share of a group's own and all of it are tried.
SMALLEST_RANGE = 0.5
RANGES = 26


def mse(weight: Tensor, format: WeightFormat) -> PackedWeight:
    """Scales (and zero points) with the least squared error of each group: min over s, z of
    sum((w - s (q - z))^2), q = clamp(round(w / s) + z).

    A group's range is clipped to each of RANGES shares of itself, and the scale of the best one is fitted to
    its codes once more by least squares, s = <w, q - z> / <q - z, q - z>. Never worse than rounding. The
    search of OMSE (Choukroun et al., 2019, https://arxiv.org/abs/1902.06822), per group.
    """
    return _by_rows(weight, format, search)


def hqq(weight: Tensor, format: WeightFormat, *, iterations: int = 20) -> PackedWeight:
    """Half-quadratic quantization (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog): zero points
    that minimize the l_p error with p = 0.7, which cares less about outliers, the scale being that of the
    range:

        e = shrink(w - s (q - z), beta), shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
        z = mean over the group of (q - (w - e) / s), beta grows by 1 % each time

    The zero points are float32, as published, which costs a 4-bit group of 32 a bit per weight more on disk
    than whole ones: rounded to whole ones they would be those of the range again. A group keeps those if its
    l_p error is then smaller. Raises ValueError for symmetric formats, which have no zero points.
    """
    if format.encoding != "uint":
        raise ValueError(f"hqq optimizes zero points, which {format.name} does not have: use an _asym scheme")
    format = replace(format, zero_dtype="float32")
    return _by_rows(weight, format, lambda groups, form: _half_quadratic(groups, form, iterations))


def gptq(
    weight: Tensor, format: WeightFormat, moments: Tensor, *, act_order: bool = False, damping: float = 0.01
) -> tuple[PackedWeight, float] | None:
    """GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323): codes with a small error of the layer's
    output on calibration data, tr((W - Q) H (W - Q)^T), H = moments = sum of x x^T over its inputs, (K, K).

    Column after column is rounded, and what that loses is made good by the columns still to come:

        U = upper Cholesky factor of (H + d I)^-1,  d = damping * mean(diag H)
        e = (w_j - q_j) / U_jj,  w_k -= e U_jk for k > j

    A group's parameters are found by mse() when its first column is reached. act_order rounds columns in the
    order of falling H_jj, with parameters found beforehand. The damping grows tenfold until H can be
    factored; None if it never can, as when H is not finite. Moments are overwritten.

    Returns Q and its error. As W - Q = e U, row by row, and U^-1 U^-T = H + d I, the sum of all e^2 is
    tr((W - Q) (H + d I) (W - Q)^T), of which the part of d is taken off.
    """
    PackedWeight.require_roundable(weight, format)
    n, k = weight.shape
    factor = _inverse_factor(moments, damping, act_order)
    if factor is None:
        return None
    permutation, added, upper = factor
    order = permutation.tolist()
    groups = format.groups(k)
    size = max(min(format.group_size or k, k), 1)
    w = memory.zeros(k, n, device=weight.device)  # a column of the weight is a row of memory
    w.copy_(weight.detach().t()[permutation])
    scale = torch.zeros(groups, n, device=w.device)
    zero = torch.zeros_like(scale) if format.encoding == "uint" else None
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    least, top = (0, 2**format.bits - 1) if format.bits < 8 or zero is not None else (1, 255)
    half = 2 ** (format.bits - 1)

    def find(group: int, columns: Tensor) -> None:
        for rows in row_blocks(*columns.shape):
            found, zeros = search(columns[rows], format)
            scale[group, rows] = stored_scale(found, format).float()
            if zero is not None and zeros is not None:
                zero[group, rows] = zeros

    if act_order:
        for group in range(groups):
            find(group, weight.detach()[:, group * size : (group + 1) * size].float())
    lost = 0.0
    for begin in range(0, k, GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, k)
        errors = torch.empty(end - begin, n, device=w.device)
        for j in range(begin, end):
            group = order[j] // size
            if not act_order and j % size == 0:
                find(group, w[j : j + size].t())
            step, column = scale[group], w[j]
            offset = zero[group] if zero is not None else float(half)
            q = (torch.where(step > 0, column / step, 0.0).round_() + offset).clamp_(least, top)
            codes[order[j]] = q.to(torch.uint8)
            error = (column - (q - offset) * step) / upper[j, j]
            errors[j - begin] = error
            w[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
        lost += float(errors.square_().sum())
    scale = scale.t().contiguous()
    kept = scale.to(DTYPES[format.scale_dtype])
    if not kept.float().equal(scale):  # a group's scale was one that float16 would lose
        format, kept = replace(format, scale_dtype="float32"), scale
    whole = None if zero is None else zero.t().to(torch.uint8, memory_format=torch.contiguous_format)
    packed = PackedWeight(format, (n, k), pack_codes(codes.t().contiguous(), format.bits), kept, whole)
    away = packed.dequantize().sub_(weight.detach()).square_().sum(0)[permutation]
    return packed, max(lost - float(away @ added), 0.0)


GPTQ_BLOCK = 128


def _inverse_factor(moments: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """The order of the columns, what is added to the diagonal (in that order), and the upper Cholesky factor
    of the inverse, in the memory of the moments: LAPACK works in place on one triangle of a matrix stored by
    columns. The moments' triangle is kept for the next damping.
    """
    if not is_finite(moments):
        return None
    k = len(moments)
    diagonal = moments.diagonal()
    order = torch.arange(k, device=moments.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal = diagonal[order]
    silent = (diagonal == 0).float()  # an input that is always 0: any code will do
    mean = float((diagonal + silent).mean()) if k else 0.0
    triangle = memory.zeros(k * (k + 1) // 2, device=moments.device).split([*range(k, 0, -1)])
    for row, (source, kept) in enumerate(zip(order.tolist(), triangle, strict=True)):
        torch.index_select(moments[source], 0, order[row:], out=kept)
    matrix, failed = moments.mT, torch.zeros((), dtype=torch.int32, device=moments.device)
    for damp in (damping * 10**i for i in range(5)):
        for row, kept in enumerate(triangle):
            moments[row, row:] = kept
        added = silent + damp * mean
        matrix.diagonal().copy_((diagonal + silent) + damp * mean)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if int(failed):
            continue
        torch.cholesky_inverse(matrix, out=matrix)
        torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
        if not int(failed) and is_finite(moments):
            return order, added, matrix
    return None


def awq(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], moments: Tensor, magnitudes: Tensor
) -> tuple[Tensor, list[PackedWeight]] | None:
    """AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): scales s (K,) of the input that some layers
    share, who get x / s and quantize W s, so that the columns of large inputs are rounded more finely:

        s = a / sqrt(max(a) min(a)),  a = max(m^alpha, 1e-4),  m = magnitudes / max(magnitudes)

    with that alpha out of 0, 1 / AWQ_GRID, ... 1 for which the outputs are off least, the sum over the layers
    of tr((W - W') H (W - W')^T), W' = Q(W s) / s, where H = moments = sum x x^T, magnitudes = sum |x|, and Q
    is quantize(). alpha = 0 is s = 1.

    Returns s and each layer's Q(W s); None if moments or magnitudes are not finite, or there is no input.
    """
    if not is_finite(moments) or not is_finite(magnitudes) or not magnitudes.numel():
        return None

    def lost(weight: Tensor, scheme: Scheme, s: Tensor) -> float:
        """Some rows at a time, which do not depend on one another."""
        blocks = (weight[rows].detach().float() for rows in row_blocks(*weight.shape))
        return sum(output_power(w - quantize(w * s, scheme).dequantize() / s, moments) for w in blocks)

    share = magnitudes / magnitudes.max().clamp(min=torch.finfo(torch.float32).tiny)
    least, best = float("inf"), None
    for alpha in torch.linspace(0, 1, AWQ_GRID + 1).tolist():
        s = share.pow(alpha).clamp_(min=1e-4)
        s /= (s.max() * s.min()).sqrt()
        error = sum(lost(weight, scheme, s) for weight, scheme in zip(weights, schemes, strict=True))
        if error < least:
            least, best = error, s
    if best is None:
        return None  # the errors are beyond float32
    pairs = zip(weights, schemes, strict=True)
    return best, [quantize(weight.detach().float() * best, scheme) for weight, scheme in pairs]


AWQ_GRID = 20


def output_power(weight: Tensor, moments: Tensor) -> float:
    """||X W^T||^2 = tr(W H W^T), where H = moments = X^T X."""
    blocks = (weight[rows].detach().float() for rows in row_blocks(*weight.shape))
    return max(sum(float(((rows @ moments) * rows).sum()) for rows in blocks), 0.0)


CALIBRATED = ("gptq", "awq")
METHODS = ("round", "mse", "hqq", *CALIBRATED)


def default_method(scheme: Scheme) -> str:
    """Eight bits hold the whole range of a group well enough; below five, clipping pays."""
    return "mse" if scheme.bits <= 4 else "round"


def quantize(weight: Tensor, scheme: Scheme, method: str | None = None) -> PackedWeight:
    """The weight in the scheme's format, by a method that needs no data: "round" (PackedWeight.quantize,
    which alone knows the pair-sum option), "mse", "hqq" or None, the default of the scheme.

    The weight of a convolution becomes its matrix, see as_matrix(). Groups begin anew at each tap: where
    their size does not divide the channels, there is one scale per output channel.

    Raises ValueError for another name, and for a weight that is not finite.
    """
    if weight.dim() > 2:
        whole = not scheme.group_size or weight.shape[1] % scheme.group_size == 0
        scheme = scheme if whole else replace(scheme, group_size=0)
        weight = as_matrix(weight)
    method = default_method(scheme) if method is None else method
    if method == "round":
        return PackedWeight.quantize(weight, scheme.format)
    if method == "mse":
        return mse(weight, scheme.format)
    if method == "hqq":
        return hqq(weight, scheme.format)
    if method in CALIBRATED:
        raise ValueError(f"{method} needs calibration data: see pe.quantize_")
    raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")


def _by_rows(
    weight: Tensor, format: WeightFormat, find: Callable[[Tensor, WeightFormat], Parameters]
) -> PackedWeight:
    """find((rows, groups, group size), format) gives the parameters of some rows at a time."""
    PackedWeight.require_roundable(weight, format)
    n, k = weight.shape
    scale = torch.zeros(n, format.groups(k), device=weight.device)
    zero = torch.zeros_like(scale) if format.encoding == "uint" else None
    for rows in row_blocks(n, k):
        scale[rows], zeros = find(grouped(weight[rows].detach().float(), format), format)
        if zero is not None and zeros is not None:
            zero[rows] = zeros
    return PackedWeight.encode(weight, format, scale, zero)


def _range(groups: Tensor, format: WeightFormat, share: float) -> Parameters:
    """The parameters that reach `share` of each group's range."""
    low, high = extremes(groups)
    if format.encoding == "int":
        return torch.maximum(low.abs(), high) * (share / (2 ** (format.bits - 1) - 1)), None
    scale = (high - low) * (share / (2**format.bits - 1))
    return scale, _zero(low * share, scale, format)


def _zero(low: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    return torch.where(scale > 0, low.abs() / scale, 0.0).round_().clamp_(0, 2**format.bits - 1)


def _tried(groups: Tensor, scale: Tensor, zero: Tensor | None, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """q - z of each weight with these parameters, and each group's squared error; the scale as it will be
    stored.
    """
    step = stored_scale(scale, format).float()[..., None]
    q = (groups * torch.where(step > 0, 1 / step, 0.0)).round_()
    if zero is None:
        half = 2 ** (format.bits - 1)
        q.clamp_(-half, half - 1)
    else:
        q = torch.minimum(torch.maximum(q, -zero[..., None]), 2**format.bits - 1 - zero[..., None])
    return q, (groups - q * step).square_().sum(-1)


def search(groups: Tensor, format: WeightFormat) -> Parameters:
    """The parameters of mse() for groups (..., group size), as (...)."""
    scale, zero = _range(groups, format, 1.0)
    offsets, least = _tried(groups, scale, zero, format)

    def keep(other: Tensor, other_zero: Tensor | None) -> None:
        nonlocal least
        found, error = _tried(groups, other, other_zero, format)
        better = error < least
        least = torch.where(better, error, least)
        scale.copy_(torch.where(better, other, scale))
        offsets.copy_(torch.where(better[..., None], found, offsets))
        if zero is not None and other_zero is not None:
            zero.copy_(torch.where(better, other_zero, zero))

    for share in torch.linspace(1.0, SMALLEST_RANGE, RANGES)[1:].tolist():
        keep(*_range(groups, format, share))
    power = offsets.square().sum(-1)
    fitted = torch.where(power > 0, (groups * offsets).sum(-1) / power, 0.0).clamp_(min=0.0)
    keep(fitted, zero)
    return scale, zero


def _half_quadratic(groups: Tensor, format: WeightFormat, iterations: int) -> Parameters:
    p, beta, growth = 0.7, 10.0, 1.01
    scale, start = _range(groups, format, 1.0)
    assert start is not None
    step = stored_scale(scale, format).float()[..., None]
    inverse = torch.where(step > 0, 1 / step, 0.0)

    def offsets(zero: Tensor) -> Tensor:
        return (groups * inverse + zero).round_().clamp_(0, 2**format.bits - 1) - zero

    def error(zero: Tensor) -> Tensor:
        return (groups - offsets(zero) * step).abs_().pow_(p).sum(-1, keepdim=True)

    zero = start = start[..., None]
    for _ in range(iterations):
        off = offsets(zero)
        rest = groups - off * step
        size = rest.abs()
        shrunk = rest.sign() * (size - size.clamp(min=1e-8).pow(p - 1) / beta).clamp_(min=0)
        zero = (off + zero - (groups - shrunk) * inverse).mean(-1, keepdim=True)
        beta *= growth
    return scale, torch.where(error(zero) < error(start), zero, start)[..., 0]
