"""Stored numbers to network input, and augmentation, against torchvision and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergesfl.data.scale import IDENTITY, PIXELS, SOUND, Scale, scale_of


def test_pixels_are_divided_and_standardised_as_torchvision_does() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    stored = np.random.default_rng(0).integers(0, 256, size=(4, 3, 5, 6), dtype=np.uint8)
    scale = Scale(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    got = scale.to_input(stored)
    for row in range(4):
        image = transforms.to_tensor(stored[row].transpose(1, 2, 0))
        assert torch.equal(got[row], transforms.normalize(image, scale.mean, scale.std))


def test_by_hand_on_one_channel() -> None:
    # (8 / 16 - 0.25) / 0.5 = 0.5, (0 / 16 - 0.25) / 0.5 = -0.5
    got = Scale(16.0, (0.25,), (0.5,)).to_input(np.array([[[[8, 0]]]], dtype=np.uint8))
    assert got.dtype == torch.float32 and got.tolist() == [[[[0.5, -0.5]]]]


def test_identity_copies_and_never_lends_the_data_set() -> None:
    stored = np.ones((2, 3), dtype=np.float32)
    got = IDENTITY.to_input(stored)
    got += 1
    assert (stored == 1).all() and (got == 2).all()


def test_a_channels_first_view_becomes_contiguous() -> None:
    stored = np.arange(24, dtype=np.float32).reshape(2, 4, 3).transpose(0, 2, 1)
    assert IDENTITY.to_input(stored).is_contiguous()
    assert np.array_equal(IDENTITY.to_input(stored).numpy(), stored)


def test_default_scales() -> None:
    assert scale_of(np.dtype(np.uint8)) is PIXELS and scale_of(np.dtype(np.int16)) is SOUND
    assert scale_of(np.dtype(np.float32)) is IDENTITY
    assert SOUND.to_input(np.array([-32768, 16384], dtype=np.int16)).tolist() == [-1.0, 0.5]


def test_flip_mirrors_about_half_and_nothing_else() -> None:
    images = np.arange(400 * 2 * 3 * 4).reshape(400, 2, 3, 4)
    got = Scale(flip=True).augmented(images, np.random.default_rng(1))
    mirrored = [np.array_equal(g, i[:, :, ::-1]) for g, i in zip(got, images, strict=True)]
    same = [np.array_equal(g, i) for g, i in zip(got, images, strict=True)]
    assert sum(mirrored) + sum(same) == 400
    assert 150 < sum(mirrored) < 250  # binomial(400, 1/2): five standard deviations are 50


def test_crop_takes_a_window_of_the_zero_padded_image_for_every_sample_by_itself() -> None:
    images = np.arange(1, 1 + 300 * 2 * 4 * 5).reshape(300, 2, 4, 5)
    got = Scale(crop_padding_pixels=1).augmented(images, np.random.default_rng(2))
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = set()
    for row in range(300):
        places = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if np.array_equal(got[row], padded[row, :, top : top + 4, left : left + 5])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9  # every window is drawn: a given one is missed with probability (8/9)^300 = 4e-16


def test_augmentation_is_pure_in_its_generator_and_keeps_the_stored_images() -> None:
    scale = Scale(flip=True, crop_padding_pixels=4)
    images = np.random.default_rng(0).integers(0, 256, size=(8, 3, 32, 32), dtype=np.uint8)
    before = images.copy()
    one, two, other = (scale.augmented(images, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one.dtype == np.uint8 and one.shape == images.shape
    assert np.array_equal(one, two) and not np.array_equal(one, other) and np.array_equal(images, before)
    assert scale.augments and not PIXELS.augments
