from __future__ import annotations

import pytest
import torch

from deeprec.trm.convolution import fourier_matrices, multiply_spectra
from deeprec.trm.layers import Dropout


@pytest.mark.parametrize("length", [1, 2, 5, 15, 20, 33])
def test_matrices_are_the_orthonormal_transforms(length: int) -> None:
    forward, inverse = fourier_matrices(length)
    x = torch.randn(length, 3)
    spectrum = torch.fft.rfft(x, dim=0, norm="ortho")
    torch.testing.assert_close(forward @ x, torch.cat([spectrum.real, spectrum.imag]))
    # Any spectrum, as a learned filter makes them: not only those of real sequences.
    any_spectrum = torch.randn(2 * (length // 2 + 1), 3)
    expected = torch.fft.irfft(torch.complex(*any_spectrum.chunk(2)), length, dim=0, norm="ortho")
    torch.testing.assert_close(inverse @ any_spectrum, expected)


def test_spectra_multiply_as_complex_numbers() -> None:
    left, right = torch.randn(6, 4, 5), torch.randn(6, 1, 5)
    product = torch.complex(*left.chunk(2)) * torch.complex(*right.chunk(2))
    torch.testing.assert_close(
        multiply_spectra(left, right), torch.cat([product.real, product.imag])
    )


def test_dropout_keeps_the_mean_and_the_seed() -> None:
    dropout = Dropout(0.3)
    x = torch.ones(1001, 103, requires_grad=True)
    torch.manual_seed(0)
    first = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(first, dropout(x))
    assert float((first == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(first.detach().mean()) == pytest.approx(1.0, abs=0.01)
    first.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, first.detach())
    assert dropout.eval()(x) is x
