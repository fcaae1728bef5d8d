import pytest
import torch

from noisear_rl.patches import patchify, sequence_shape, unpatchify


@pytest.mark.parametrize(
    ("shape", "patch_size", "expected"),
    [
        ((4, 128, 128), 32, (16, 4096)),
        ((4, 8, 8), 2, (16, 16)),
        ((16, 4, 6, 8), 2, (24, 128)),  # video: C, T, H, W
        ((16, 4, 6, 8), (1, 3, 4), (16, 192)),
        ((64, 30), 5, (6, 320)),  # audio: C, T
    ],
)
def test_round_trip(shape, patch_size, expected):
    latents = torch.randn(3, *shape)
    patches = patchify(latents, patch_size)
    assert patches.shape == (3, *expected)
    assert sequence_shape(shape, patch_size) == expected
    assert torch.equal(unpatchify(patches, shape, patch_size), latents)


def test_raster_order_and_channel_first_elements():
    latents = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    patches = patchify(latents, 2)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # top right, channel 0 then 1
    assert patches[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]  # bottom left


def test_errors():
    with pytest.raises(ValueError, match="does not divide"):
        patchify(torch.zeros(1, 4, 8, 8), 3)
    with pytest.raises(ValueError, match="spatial axes"):
        patchify(torch.zeros(1, 4, 8, 8), (2, 2, 2))
    with pytest.raises(ValueError, match=r"expected patches \(B, 16, 16\)"):
        unpatchify(torch.zeros(1, 15, 16), (4, 8, 8), 2)
