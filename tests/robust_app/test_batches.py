import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app.batches import as_float, augment, shuffled_batches
from robust_app.epochs import training_batches
from tests.robust_app.runs import ALONE, full_strength


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_as_float_scales_bytes_exactly_and_leaves_floats():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(x), torch.arange(256, dtype=torch.float32) / 255)
    assert as_float(x).max() == 1
    y = torch.rand(2, 3, dtype=torch.float64)
    assert as_float(y) is y


def windows(image, padding, flips=True):
    """Every crop of the padded image, and of its mirror image, as a set of bytes."""
    _, height, width = image.shape
    found = set()
    for flipped in (image, image.flip(-1)) if flips else (image,):
        padded = np.pad(flipped.numpy(), ((0, 0), *[(padding, padding)] * 2))
        for i in range(2 * padding + 1):
            for j in range(2 * padding + 1):
                found.add(padded[:, i : i + height, j : j + width].tobytes())
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("shape", "padding"), [((1, 8, 8), 4), ((3, 7, 5), 4), ((1, 8, 8), 2)])
def test_augment_crops_or_mirrors_each_image_and_reaches_every_window(dtype, shape, padding):
    image = torch.randint(1, 255, shape, generator=generator()).to(dtype)
    x = image.expand(5000, *shape)
    found = augment(x, generator(1), padding, horizontal_flip=True)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert {one.numpy().tobytes() for one in found} == windows(image, padding)


def test_augment_without_padding_only_flips():
    image = torch.rand(1, 4, 5, generator=generator())
    found = augment(image.expand(50, 1, 4, 5), generator(), 0, horizontal_flip=True)
    whole = {image.numpy().tobytes(), image.flip(-1).numpy().tobytes()}
    assert {one.numpy().tobytes() for one in found} == whole


def test_augment_without_flips_only_shifts():
    image = torch.rand(1, 3, 4, generator=generator())
    found = augment(image.expand(2000, 1, 3, 4), generator(), 1, horizontal_flip=False)
    assert {one.numpy().tobytes() for one in found} == windows(image, 1, flips=False)


@pytest.mark.parametrize("flips", [False, True])
def test_a_run_flips_where_its_configuration_says_so(flips):
    config = full_strength("pgd", augment=True, crop_padding=0, horizontal_flip=flips)
    x = torch.rand(1, 1, 8, 8, generator=generator()).expand(64, 1, 8, 8)
    drawn = training_batches(x, torch.zeros(64), (1, 8, 8), config, 0, ALONE)
    found = {image.numpy().tobytes() for images, _, _ in drawn for image in images}
    assert found == windows(x[0], 0, flips)


def test_augment_treats_every_image_as_its_own():
    x = torch.arange(1, 7, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 9, 9)
    found = augment(x, generator(), 4, horizontal_flip=True)
    for i in range(6):
        assert set(found[i].unique().tolist()) <= {0, i + 1}
        assert (found[i] == i + 1).any()


def test_augment_flips_half_of_the_images():
    # The only mark is far from the middle, so that no shift brings it to the other side.
    x = torch.zeros(4000, 1, 1, 32)
    x[..., 8] = 1
    found = augment(x, generator(), 4, horizontal_flip=True)
    left = found[..., :16].flatten(1).any(1)
    inside = found.flatten(1).any(1)  # the row itself may be shifted out
    assert (left.sum() / inside.sum()).item() == pytest.approx(0.5, abs=0.07)


def test_augment_depends_on_the_generator_and_leaves_its_input():
    x = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator())
    before = x.clone()
    first, same, other = (
        augment(x, generator(seed), 4, horizontal_flip=True) for seed in (5, 5, 6)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)


@given(st.integers(1, 60), st.data(), st.integers(0, 2**32))
def test_batches_draw_each_index_at_most_once(count, data, seed):
    batch_size = data.draw(st.integers(1, count))
    batches = list(shuffled_batches(count, batch_size, generator(seed), "cpu"))
    assert len(batches) == count // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    indices = torch.cat(batches).tolist()
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(count))


def test_batches_depend_on_the_generator_and_go_on_with_it():
    def order(g):
        return torch.cat(list(shuffled_batches(30, 10, g, "cpu"))).tolist()

    g = generator(4)
    first, second = order(g), order(g)
    assert first == order(generator(4))
    assert first != second
    assert first != list(range(30))


def test_batches_are_on_the_device_asked_for():
    batch = next(shuffled_batches(4, 2, generator(), "meta"))
    assert batch.device.type == "meta"
