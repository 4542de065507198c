import hashlib
import pickle
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app.batches import as_float
from robust_app.data import (
    DATASETS,
    Dataset,
    check_trainable,
    load,
    split,
)
from robust_app.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
IDX = {
    "train-images-idx3-ubyte": np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256,
    "train-labels-idx1-ubyte": np.array([0, 1, 9]),
    "t10k-images-idx3-ubyte": np.zeros((2, 28, 28)),
    "t10k-labels-idx1-ubyte": np.array([4, 2]),
}


def arrays(**changes):
    """The four arrays of a valid .npz, some of them replaced."""
    values = {
        "x_train": np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5),
        "y_train": np.array([0, 1, 2, 3]),
        "x_test": np.zeros((2, 6, 5), dtype=np.uint8),
        "y_test": np.array([1, 3]),
    }
    return values | changes


def load_arrays(folder, **changes):
    np.savez(folder / "set.npz", **arrays(**changes))
    return load(f"npz:{folder / 'set.npz'}")


def write_idx(folder, **changes):
    folder.mkdir(parents=True)
    for name, array in (IDX | changes).items():
        header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def refused(name, root=None, **options):
    """The message of the UserError that loading raises, which must be one line."""
    with pytest.raises(UserError) as error:
        load(name, root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_whole_and_stratified():
    data = load("digits")
    assert (len(data.x_train), len(data.x_test)) == (1437, 360)
    assert data.image_shape == (1, 8, 8)
    assert (data.classes, data.mean, data.std) == (10, None, None)
    assert data.x_train.dtype == data.x_test.dtype == torch.uint8
    assert data.y_train.dtype == data.y_test.dtype == torch.int64
    # 1,797 images of levels 0 … 16 with 174 to 183 of each class, a fifth of them in the test part.
    levels = torch.round(torch.arange(17) * 255 / 16).to(torch.uint8)
    assert torch.equal(torch.cat([data.x_train, data.x_test]).unique(), levels)
    train, test = data.y_train.bincount(), data.y_test.bincount()
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ((test / (train + test) - 360 / 1797).abs() < 0.005).all()


def test_digits_differ_between_training_and_test():
    data = load("digits")
    train = {image.numpy().tobytes() for image in data.x_train}
    assert not any(image.numpy().tobytes() in train for image in data.x_test)


def test_digits_come_with_their_licence():
    text = (resources.files("robust_app") / "digits.LICENSE.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text
    assert "https://doi.org/10.24432/C50P49" in text


# --- npz ----------------------------------------------------------------------------------------


def test_npz_is_read(tmp_path):
    data = load_arrays(tmp_path)
    assert data.image_shape == (1, 6, 5)
    assert data.x_train[1, 0, 0].tolist() == [30, 31, 32, 33, 34]
    assert data.y_train.tolist() == [0, 1, 2, 3]
    assert data.classes == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_channels_may_come_last_or_first(tmp_path, channels):
    last = np.arange(4 * 6 * 5 * channels).astype(np.uint8).reshape(4, 6, 5, channels)
    test = np.zeros((2, 6, 5, channels), dtype=np.uint8)
    from_last = load_arrays(tmp_path, x_train=last, x_test=test)
    first = last.transpose(0, 3, 1, 2)
    from_first = load_arrays(tmp_path, x_train=first, x_test=test.transpose(0, 3, 1, 2))
    assert from_last.image_shape == (channels, 6, 5)
    assert torch.equal(from_last.x_train, torch.tensor(first.copy()))
    assert torch.equal(from_first.x_train, from_last.x_train)
    assert from_last.x_train.is_contiguous()


def test_npz_where_both_layouts_fit_is_read_with_channels_first(tmp_path):
    data = load_arrays(
        tmp_path,
        x_train=np.full((4, 3, 7, 1), 2, np.uint8),
        x_test=np.zeros((2, 3, 7, 1), np.uint8),
    )
    assert data.image_shape == (3, 7, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npz_floats_become_float32(tmp_path, dtype):
    x = np.linspace(0, 1, 120).reshape(4, 6, 5).astype(dtype)
    data = load_arrays(tmp_path, x_train=x)
    assert data.x_train.dtype == torch.float32
    assert torch.equal(data.x_train[:, 0], torch.tensor(x.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i8", np.uint64])
def test_npz_labels_become_int64(tmp_path, dtype):
    data = load_arrays(tmp_path, y_train=np.array([0, 3, 2, 1], dtype=dtype))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == [0, 3, 2, 1]


def with_value(value, at=2):
    x = np.full((4, 6, 5), 0.5)
    x[at, 3, 3] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": with_value(np.nan)}, "x_train: .*found 1 others, the first nan in image 2"),
        ({"x_train": with_value(255.0)}, "x_train: .*found 1 others, the first 255.0 in image 2"),
        ({"x_test": with_value(-1e-3, 0)[:2]}, "x_test: .*the first -0.001 in image 0"),
        ({"x_train": np.full((4, 6, 5), 7.0)}, "found 120 others"),
        ({"x_train": np.zeros((4, 6, 5), int)}, r"uint8 or floats in \[0, 1\], found int64"),
        ({"x_train": np.zeros((4, 6, 5), bool)}, "found bool"),
        ({"x_train": np.zeros((4, 30), np.uint8)}, r"expected shape .*found \(4, 30\)"),
        ({"x_train": np.zeros((4, 2, 6, 5), np.uint8)}, r"found \(4, 2, 6, 5\)"),
        ({"x_train": np.zeros((0, 6, 5), np.uint8)}, r"at least one image, found shape \(0, 1"),
        ({"x_train": np.zeros((4, 0, 5), np.uint8)}, r"at least one image"),
        ({"x_test": np.zeros((2, 5, 6), np.uint8)}, r"found \(1, 6, 5\) and \(1, 5, 6\)"),
        ({"y_train": np.zeros(3, int)}, "found 3 in y_train and 4 in x_train"),
        ({"y_test": np.zeros((2, 1), int)}, r"y_test: expected shape \(n,\), found \(2, 1\)"),
        ({"y_train": np.zeros(4)}, "y_train: expected integers, found float64"),
        ({"y_train": np.array([0, -1, -2, 1])}, "y_train: .*found 2 below, the first -1 at 1"),
    ],
)
def test_npz_with_other_content_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_arrays(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.ones((4, 6, 5), np.uint8)}, r"x_train: .*none above 1; give .* as floats"),
        ({"y_train": np.array([1, 2, 3, 1])}, "each class from 0 to 3, .*found none of 0$"),
        ({"y_test": np.array([1, 6])}, "each class from 0 to 6, .*found none of 4, 5, 6$"),
    ],
)
def test_what_a_slip_makes_of_training_images_is_refused_for_training(tmp_path, changes, message):
    check_trainable(load_arrays(tmp_path))
    odd = load_arrays(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        check_trainable(odd)


def test_npz_without_an_array_is_refused_with_what_it_holds(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.zeros(1), other=np.zeros(1))
    message = refused(f"npz:{tmp_path / 'set.npz'}")
    assert "expected the arrays x_train, y_train, x_test, y_test" in message
    assert message.endswith("found x_train, other")


def test_npz_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(x_train=np.array([{}, {}], dtype=object)))
    assert "Python objects" in refused(f"npz:{tmp_path / 'set.npz'}")


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "npy"])
def test_a_damaged_npz_is_refused(tmp_path, damage):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays(x_train=np.random.default_rng(0).random((4, 6, 5))))
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "flipped":
        path.write_bytes(
            content[:300] + bytes(255 - byte for byte in content[300:310]) + content[310:]
        )
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(b"x" * (damage == "text"))
    message = refused(f"npz:{path}")
    assert message.startswith(f"{path}: cannot be read as an .npz file (")
    assert ("not a zip archive, or cut short" in message) == (damage != "flipped")


def test_an_npz_that_is_not_there_is_refused(tmp_path):
    assert refused(f"npz:{tmp_path / 'none.npz'}").endswith("(No such file or directory)")
    assert refused(f"npz:{tmp_path}").endswith("(Is a directory)")


def test_the_path_of_an_npz_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "set.npz", **arrays())
    assert load("npz:~/set.npz").classes == 4


# --- torchvision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx_files_are_read(tmp_path, name, folder):
    write_idx(tmp_path / folder / "raw")
    data = load(name, tmp_path)
    assert data.name == name
    assert data.image_shape == (1, 28, 28)
    assert data.x_train[:, 0].tolist() == IDX["train-images-idx3-ubyte"].tolist()
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 9], [4, 2])
    assert (data.classes, data.mean) == (10, None)


@pytest.mark.parametrize("name", list(IDX))
@pytest.mark.parametrize("damage", ["empty", "cut in the header", "cut", "longer"])
def test_damaged_idx_files_are_refused(tmp_path, name, damage):
    raw = tmp_path / "MNIST/raw"
    write_idx(raw)
    content = (raw / name).read_bytes()
    damaged = {"empty": b"", "cut in the header": content[:6], "cut": content[:-1]}
    (raw / name).write_bytes(damaged.get(damage, content + b"0"))
    message = refused("mnist", tmp_path)
    assert f"the files in {raw} are damaged (" in message
    assert "--download" in message


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    write_idx(tmp_path / "MNIST/raw", **{"t10k-labels-idx1-ubyte": np.zeros(5)})
    assert "found 5 in y_test and 2 in x_test" in refused("mnist", tmp_path)


def test_files_that_are_missing_are_named_with_their_folder(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    message = refused("mnist", tmp_path)
    assert f": t10k-labels-idx1-ubyte not found in {tmp_path / 'MNIST/raw'};" in message
    assert "--download" in message
    assert "data_batch_1, data_batch_2" in refused("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_set_on_disk_needs_a_root(name):
    assert refused(name) == f"dataset {name} needs --data-root, the folder its files lie in"


def test_a_download_that_cannot_be_stored_is_refused(tmp_path):
    (tmp_path / "MNIST").write_text("a file where the folder should be")
    message = refused("mnist", tmp_path, download=True)
    assert message.startswith(f"dataset mnist: cannot be downloaded to {tmp_path / 'MNIST/raw'} (")


def test_a_download_from_nowhere_is_refused(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: closed
    message = refused("mnist", tmp_path, download=True)
    assert message.startswith(f"dataset mnist: cannot be downloaded to {tmp_path / 'MNIST/raw'} (")
    assert "Connection refused" in message


def write_cifar10(folder):
    """Two images a file in the format of CIFAR-10; returns the MD5 sum of each file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {
        name: {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [i, 9 - i]}
        for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
    }
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {
        name: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        for name in contents
    }
    return contents, sums


def test_cifar10_is_read_with_channels_first_and_statistics(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    contents, sums = write_cifar10(tmp_path / "cifar-10-batches-py")
    # torchvision compares checksums with the original files'; the small ones' take their place.
    batches = [[name, sums[name]] for name in contents if name.startswith("data_")]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    data = load("cifar10", tmp_path)
    assert (len(data.x_train), len(data.x_test), data.image_shape) == (10, 2, (3, 32, 32))
    expected = contents["data_batch_2"]["data"].reshape(2, 3, 32, 32)
    assert torch.equal(data.x_train[2:4], torch.tensor(expected))
    assert data.y_train.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2470, 0.2435, 0.2616)


def test_cifar10_with_other_checksums_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    assert f"the files in {folder} are damaged" in refused("cifar10", tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")
def test_real_mnist_is_read():
    data = load("mnist", SHARED)
    assert (len(data.x_train), len(data.x_test), data.classes) == (60000, 10000, 10)
    # The mean of the training pixels is known as 0.1307.
    assert as_float(data.x_train).mean().item() == pytest.approx(0.1307, abs=5e-5)


# --- the table and the class --------------------------------------------------------------------


def test_an_unknown_name_suggests_the_nearest():
    assert refused("own.NPZ") == "dataset 'own.NPZ': a file of your own is 'npz:own.NPZ'"
    assert refused("cifar-10") == "unknown dataset 'cifar-10'; the nearest known is 'cifar10'"


def test_every_name_of_the_table_is_known(tmp_path):
    for name in DATASETS:
        if name != "digits":
            assert "unknown" not in refused(name, tmp_path)


def test_to_moves_the_tensors_and_keeps_the_rest():
    data = load("digits").to("meta")
    tensors = (data.x_train, data.y_train, data.x_test, data.y_test)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (data.name, data.classes, data.image_shape) == ("digits", 10, (1, 8, 8))


# --- split --------------------------------------------------------------------------------------


def numbered(count):
    """A set whose images and labels are their own number."""
    index = torch.arange(count)
    x = index.to(torch.uint8)[:, None, None, None].expand(count, 1, 2, 2)
    return Dataset("numbered", x, index, x, index, classes=count)


@given(st.integers(1, 40), st.data())
def test_split_divides_the_training_examples(count, data):
    held_out = data.draw(st.integers(0, count - 1))
    train_x, train_y, valid_x, valid_y = split(numbered(count), held_out, seed=3)
    assert len(valid_x) == len(valid_y) == held_out
    assert sorted([*train_y.tolist(), *valid_y.tolist()]) == list(range(count))
    assert torch.equal(train_x[:, 0, 0, 0], train_y.to(torch.uint8))
    assert torch.equal(valid_x[:, 0, 0, 0], valid_y.to(torch.uint8))


def test_split_depends_on_the_seed_alone():
    first, again, other = (split(numbered(40), 10, seed=seed)[3] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first.sort().values, torch.arange(10))


@pytest.mark.parametrize("held_out", [5, 6, -1])
def test_split_leaves_something_to_train_on(held_out):
    with pytest.raises(UserError, match=rf"^held_out: expected 0 to 4 of 5 .*found {held_out}$"):
        split(numbered(5), held_out, seed=0)


def test_a_known_data_set_may_lie_under_the_root_as_one_npz(tmp_path):
    content = arrays(
        x_train=np.full((4, 3, 32, 32), 7, dtype=np.uint8), x_test=np.zeros((2, 3, 32, 32))
    )
    np.savez(tmp_path / "cifar10.npz", **content)

    dataset = load("cifar10", tmp_path)

    assert dataset.name == "cifar10"
    assert dataset.mean == (0.4914, 0.4822, 0.4465)  # normalised as the files of torchvision are
    assert (dataset.x_train == 7).all()
    assert "cifar10.npz" not in refused("mnist", tmp_path)
