"""The weight of a convolution as a matrix: the order of its columns, and what the quantizers make of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyengine.packed import as_matrix
from pyengine.quantizers import gptq, mse, quantize
from pyengine.scheme import Scheme


def patches(conv, x):
    """(N, C, H, W) -> (rows, K): what a Conv2d multiplies its matrix with, the channel fastest."""
    columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return columns.unflatten(1, (x.shape[1], taps)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("kernel", [1, 3, (1, 5)])
def test_a_convolution_is_its_matrix_times_patches(kernel):
    conv, x = nn.Conv2d(8, 5, kernel, padding=1, stride=2, bias=False), torch.randn(2, 8, 9, 7)
    expected = conv(x)
    y = patches(conv, x) @ as_matrix(conv.weight).t()
    torch.testing.assert_close(
        y.view(2, -1, 5).transpose(1, 2).view_as(expected), expected, rtol=1e-4, atol=1e-5
    )


def test_other_dimensions():
    assert as_matrix(torch.arange(6.0).view(1, 2, 3)).tolist() == [[0, 3, 1, 4, 2, 5]]
    assert as_matrix(nn.Conv3d(4, 6, 2).weight).shape == (6, 32)
    assert as_matrix(nn.Conv2d(8, 6, 3, groups=2).weight).shape == (6, 36)
    linear = nn.Linear(3, 4).weight
    assert as_matrix(linear) is linear


@pytest.mark.parametrize("method", ["round", "mse", "hqq"])
def test_groups_begin_anew_at_each_tap(method):
    """A tap of large weights does not touch the steps of the others."""
    conv = nn.Conv2d(16, 4, 3)
    large = conv.weight.detach().clone()
    large[..., 1, 1] *= 100
    scheme = Scheme.parse("w4_g16_asym")
    before, after = (quantize(w, scheme, method).scale for w in (conv.weight, large))
    assert before.shape == (4, 9)
    unchanged = torch.arange(9) != 4
    assert torch.equal(before[:, unchanged], after[:, unchanged])
    assert (after[:, 4] > 20 * before[:, 4]).all()


def test_groups_that_would_cross_a_tap_become_one_scale_per_channel():
    weight = nn.Conv2d(24, 4, 3).weight
    packed = quantize(weight, Scheme.parse("w4_g32"))
    assert packed.format.group_size == 0
    assert packed.shape == (4, 216)
    assert quantize(nn.Conv2d(64, 4, 3).weight, Scheme.parse("w4_g32")).scale.shape == (4, 18)


def test_gptq_lowers_the_error_of_a_convolution():
    """On images that it has not seen; neighbouring pixels are alike, which is what it lives on."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, padding=1, bias=False).requires_grad_(False)
    image = lambda count: F.avg_pool2d(torch.randn(count, 16, 36, 36), 3, 1)  # noqa: E731
    rows = patches(conv, image(8)).double()
    moments = (rows.t() @ rows).float()
    matrix, format = as_matrix(conv.weight), Scheme.parse("w3_g16").format
    found, error = gptq(matrix, format, moments)
    unseen = patches(conv, image(4))
    lost = {
        name: float((unseen @ (matrix - packed.dequantize()).t()).norm() / (unseen @ matrix.t()).norm())
        for name, packed in (("mse", mse(matrix, format)), ("gptq", found))
    }
    assert lost["gptq"] < 0.8 * lost["mse"], lost
    assert (error / float((rows @ matrix.t().double()).square().sum())) ** 0.5 == pytest.approx(
        lost["gptq"], rel=0.1
    )
