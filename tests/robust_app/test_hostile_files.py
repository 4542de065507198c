"""Files that would execute something, or claim more than they hold: refused, in every loader."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robust_app import archives, checkpoint, data, documents, environment, recipes
from robust_app.config import Config
from robust_app.errors import UserError, one_line, shown, unknown
from robust_app.exchange import outside, reading
from robust_app.reproduction import measurements
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.robust_app.exchange.models import model, node
from tests.robust_app.runs import ALONE, few_digits, full_strength

MIB = 2**20


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# --- Nothing is executed ---------------------------------------------------------------------


def loaders(folder):
    """What each loader of pickles, or of what may hold some, does with a file."""
    return {
        "checkpoint": checkpoint.load,
        "weights": lambda path: outside.load_weights(torch.nn.Linear(1, 1), path),
        "npz": lambda path: data.load(f"npz:{path}"),
    }


@pytest.mark.parametrize("loader", loaders(None))
@pytest.mark.parametrize("form", ["plain", "zip", "legacy", "object array", "npy in zip"])
def test_a_payload_is_not_executed(tmp_path, loader, form):
    path, executed = tmp_path / "file", tmp_path / "executed"
    content = {"format": "robust-app 1", "weight": Payload(executed), "x_train": Payload(executed)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    elif form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        arrays = {key: np.array([Payload(executed)], dtype=object) for key in data.KEYS}
        with path.open("wb") as file:
            np.savez(file, **arrays)
        if form == "npy in zip":  # a pickle in the place of an array
            with zipfile.ZipFile(path, "w") as archive:
                for key in data.KEYS:
                    archive.writestr(f"{key}.npy", pickle.dumps(Payload(executed)))
    with pytest.raises(UserError):
        loaders(tmp_path)[loader](path)
    assert not executed.exists()


def test_the_payload_of_these_tests_is_one(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def test_batches_of_cifar10_with_a_payload_are_not_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(UserError, match="damaged"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_what_torchvision_once_kept_of_mnist_is_not_read(tmp_path):
    """Its tensors would take the place of the files of MNIST."""
    raw, processed = tmp_path / "MNIST" / "raw", tmp_path / "MNIST" / "processed"
    raw.mkdir(parents=True)
    processed.mkdir()
    for part in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, 1, 8, 8) + bytes(64)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 1) + b"\3")
    for name in ("training.pt", "test.pt"):
        torch.save((torch.ones(1, 8, 8, dtype=torch.uint8), torch.tensor([5])), processed / name)
    assert data.load("mnist", tmp_path).y_train.tolist() == [3]


# --- What a file claims is checked before memory is taken ------------------------------------


def pickled_with(opcodes, path):
    """A file of torch.save whose pickle has other opcodes for a value."""
    buffer = io.BytesIO()
    torch.save({"format": "robust-app 1", "x": "here"}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                before = b"X\4\0\0\0here"
                assert before in content
                content = content.replace(before, opcodes)
            new.writestr(name, content)


def test_a_few_bytes_that_become_gigabytes_are_refused(tmp_path):
    pickled_with(b"cbuiltins\nbytearray\nJ\0\0\0\x20\x85R", tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"builtins\.bytearray"):
        archives.read_tensors(tmp_path / "a.pt")
    pickled_with(b"ctorch\nTensor\nJ\0\0\0\x20\x85R", tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"torch\.Tensor"):
        archives.read_tensors(tmp_path / "a.pt")
    pickled_with(b"ctorch\nfloat64\n", tmp_path / "a.pt")
    assert archives.read_tensors(tmp_path / "a.pt")["x"] is torch.float64


def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="repeats its numbers"):
        archives.read_tensors(tmp_path / "a.pt")
    whole = torch.ones(MIB)
    torch.save([whole.view(2**10, -1).view(-1) for _ in range(20)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="bytes together"):
        archives.read_tensors(tmp_path / "a.pt")
    torch.save([whole, whole[:5]], tmp_path / "a.pt")  # tied weights
    assert len(archives.read_tensors(tmp_path / "a.pt")) == 2


def test_a_container_whose_methods_are_hidden_is_refused(tmp_path):
    content = torch.nn.Linear(1, 1).state_dict()  # with an attribute that is known
    torch.save(content, tmp_path / "a.pt")
    assert archives.read_tensors(tmp_path / "a.pt").keys() == content.keys()
    content.__dict__["keys"] = 3
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="attributes"):
        archives.read_tensors(tmp_path / "a.pt")


def test_bombs_are_refused(tmp_path):
    zeros = io.BytesIO()
    np.savez_compressed(zeros, x_train=np.zeros(80 * MIB, np.uint8))
    (tmp_path / "a.npz").write_bytes(zeros.getvalue())
    assert len(zeros.getvalue()) < MIB
    with pytest.raises(ValueError, match=r"would unpack to .* more than 67108864; numpy\.savez"):
        archives.read_arrays(tmp_path / "a.npz", data.KEYS)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(MIB)}, buffer)
    deflated = zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(buffer) as old, deflated as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="would unpack"):
        archives.read_tensors(tmp_path / "a.pt")


def test_two_members_of_one_name_are_refused(tmp_path):
    """Which of them torch reads is not the one that was looked at, perhaps."""
    torch.save({"a": 1}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"")
    with pytest.raises(ValueError, match="two members"):
        archives.read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "header", ["(100000000000,)", "(2,)", "(4, 4)", "(-1,)", "(99999999999, 99999999999)"]
)
def test_an_array_is_as_large_as_it_says(tmp_path, header):
    content = np.arange(3, dtype=np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, content)
    damaged = buffer.getvalue().replace(b"(3,), }" + b" " * 30, f"{header}, }}".encode().ljust(37))
    assert damaged != buffer.getvalue()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x_train.npy", damaged)
    with pytest.raises(ValueError, match=r"expected .* bytes of shape"):
        archives.read_arrays(tmp_path / "a.npz", data.KEYS)


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (1, 8, 9), (1, 8, 7)])
def test_images_of_mnist_are_as_many_as_their_file_says(tmp_path, shape):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, *shape) + bytes(64)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 1) + b"\3")
    with pytest.raises(UserError, match="as many bytes as follow"):
        data.load("mnist", tmp_path)


# --- TOML and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000 + "]" * 100_000,
        "a = " + "[" * 60 + "]" * 60,
        ".".join("a" * 20_000) + " = 1",
        "a = 0x" + "f" * 6000,
        "a = " + "9" * 5000,
        f"a = '{'x' * 2**16}'",
    ],
    ids=["deep", "nested", "dotted", "hexadecimal", "digits", "long"],
)
def test_toml_beyond_the_bounds_is_refused(tmp_path, text):
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    for read in (RunDirectory(tmp_path).config, lambda: recipes.load(tmp_path / "mine.toml")):
        with pytest.raises(UserError) as caught:
            read()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "part", ["a", "1", "é", "'x y'", "'a,'", '"a\\"b"', '"a.b"', "''"], ids=lambda part: part
)
@pytest.mark.parametrize("dot", [".", " . ", "\t."])
@pytest.mark.parametrize("place", ["{} = 1", "[{}]", "[[{}]]", "a = {{b = 1, {} = 2}}", "#\n {}=1"])
def test_a_key_of_too_many_parts_is_refused_before_it_is_parsed(part, dot, place):
    key = dot.join([part] * (documents.KEY_PARTS + 1))
    with pytest.raises(ValueError, match="a key of more than 100 parts"):
        documents.parse_toml(place.format(key))


def test_lists_may_be_long():
    numbers = [i + 0.5 for i in range(5000)]
    assert documents.parse_toml(f"a = {numbers}") == {"a": numbers}


@pytest.mark.parametrize("text", ["a." * 1000, '"' * 30000], ids=["dots", "quotes"])
def test_a_value_is_no_key(text):
    assert documents.parse_toml(f"a = {json.dumps(text)}") == {"a": text}


@pytest.mark.parametrize("text", ["a", "'", '"', '"\\"', "a.", "1.", "a ", '"a', ". ", "a.b, "])
def test_what_is_no_key_is_refused_too(text):
    """At once: in a time that grows with the square of the length these would be minutes."""
    with pytest.raises(ValueError, match=r"\S"):
        documents.parse_toml(text * (documents.TOML_SIZE // len(text)))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 60 + "]" * 60,
        "[1e999]",
        "[NaN]",
        "[" + "9" * 30 + "]",
        "[" + "9" * 5000,
    ],
    ids=["deep", "nested", "infinite", "nan", "large", "digits"],
)
def test_json_beyond_the_bounds_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json"):
        RunDirectory(tmp_path).results()


def test_lines_are_divided_at_line_feeds_alone(tmp_path):
    (tmp_path / "a").write_text('{"a": "x\u2028y"}\n[1]\n', encoding="utf-8")
    assert documents.read_json(tmp_path / "a", lines=True) == [{"a": "x\u2028y"}, [1]]
    (tmp_path / "a").write_text("")
    assert documents.read_json(tmp_path / "a", lines=True) == []


def test_a_name_of_megabytes_is_refused_at_once():
    assert len(str(unknown("key", "x" * MIB, ["epochs"]))) < 400
    assert len(shown([0] * MIB)) < 400
    with pytest.raises(UserError) as caught:
        Config.from_mapping(full_strength("advibp").__dict__ | {"seed": "x" * MIB})
    assert len(str(caught.value)) < 400


def test_an_error_of_others_is_one_printable_line():
    assert one_line(ValueError("a\n\x1b[2Jb\0")) == "a �[2Jb�"


# --- What a run directory says ---------------------------------------------------------------


LINE = {"epoch": 1, "standard_error": 1.0, "verified_error": 2.0, "seconds": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 10**12},
        {"epoch": "1"},
        {"seconds": None},
        {"verified_error": "2"},
        {"standard_error": None},
        {"cosine": [1]},
    ],
)
def test_metrics_that_are_no_numbers_are_refused(tmp_path, change):
    directory = RunDirectory(tmp_path)
    directory.write_metrics([LINE, LINE | {"epoch": 2}])
    assert len(directory.metrics()) == 2
    directory.write_metrics([LINE | change])
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
        directory.metrics()


@pytest.mark.parametrize("root", ["3", '"a\\u0000b"', '"\\ud800"', '["a"]'])
def test_a_place_of_data_that_is_no_path_is_refused(tmp_path, root):
    text = f'[{{"device": "cpu", "data_root": {root}}}]'
    (tmp_path / "environment.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"environment\.json: damaged"):
        RunDirectory(tmp_path).data_root()


@pytest.mark.parametrize("name", ["a\u00a0b", "a\nb", "a\udcffb"])
def test_a_place_of_data_may_have_any_name(tmp_path, name):
    directory = RunDirectory(tmp_path)
    directory.add_environment(environment.describe(ALONE.device, 1, 0, tmp_path / name))
    assert directory.data_root() == tmp_path / name


def test_a_place_of_data_with_too_long_a_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="too long") as caught:
        data.load("mnist", tmp_path / ("x" * 5000))
    assert len(str(caught.value)) < 1000


def test_results_without_numbers_are_refused(tmp_path):
    result = {"examples": 0, "standard_error": 1, "verified_error": 1, "pgd_error": 1}
    result["shares"] = {"ibp": {"certified": 0}}
    directory = RunDirectory(tmp_path)
    assert measurements._errors(result | {"examples": 2}, directory)["ibp"] == 100
    for damaged in (result, {}, result | {"pgd_error": [1]}, result | {"examples": "2"}):
        with pytest.raises(UserError, match=r"results\.json: damaged"):
            measurements._errors(damaged, directory)


@pytest.fixture(scope="module")
def state():
    trainer = Trainer(full_strength("advibp"), few_digits(), ALONE)
    trainer.optimizer.zero_grad()
    loss = trainer.network(torch.zeros(2, 1, 8, 8)).sum()
    loss.backward()
    trainer.optimizer.step()
    return trainer.state_dict()


@pytest.mark.parametrize("epochs", [-1, 10**18, 1.5, "1", None])
def test_a_checkpoint_of_no_epoch_of_the_run_is_refused(state, epochs):
    with pytest.raises((ValueError, TypeError), match="epochs_done"):
        Trainer(full_strength("advibp"), few_digits(), ALONE).load_state_dict(
            state | {"epochs_done": epochs}
        )


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg": torch.zeros(1)},
        {"exp_avg": None},
        {"step": torch.tensor(-1.0)},
        {"step": torch.tensor(float("nan"))},
        {"step": torch.ones(2)},
        {"more": torch.zeros(())},
    ],
)
def test_a_state_that_adam_could_not_step_from_is_refused(state, change):
    config = full_strength("advibp")
    Trainer(config, few_digits(), ALONE).load_state_dict(state)
    optimizer = state["optimizer"]
    states = optimizer["state"] | {0: optimizer["state"][0] | change}
    damaged = state | {"optimizer": optimizer | {"state": states}}
    with pytest.raises((ValueError, AttributeError), match=r"optimizer|shape|NoneType"):
        Trainer(config, few_digits(), ALONE).load_state_dict(damaged)


@pytest.mark.parametrize("padding", [9, 10**15])
def test_crops_of_images_that_are_padded_out_of_sight_are_refused(padding):
    Trainer(full_strength("advibp", augment=True, crop_padding=8), few_digits(), ALONE)
    with pytest.raises(UserError, match="crop_padding: expected at most 8"):
        Trainer(full_strength("advibp", augment=True, crop_padding=padding), few_digits(), ALONE)


@pytest.mark.parametrize("damaged", [torch.zeros(()), {"param_groups": [torch.zeros(())]}, [1]])
def test_a_state_of_no_mappings_is_refused(state, damaged):
    with pytest.raises(TypeError, match="mappings"):
        Trainer(full_strength("advibp"), few_digits(), ALONE).load_state_dict(
            state | {"optimizer": damaged}
        )


def test_options_in_a_checkpoint_do_not_take_the_place_of_the_configuration(state):
    trainer = Trainer(full_strength("advibp"), few_digits(), ALONE)
    groups = [group | {"betas": "no", "lr": 9.0} for group in state["optimizer"]["param_groups"]]
    trainer.load_state_dict(state | {"optimizer": state["optimizer"] | {"param_groups": groups}})
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


# --- ONNX ------------------------------------------------------------------------------------


def refused_onnx(tmp_path, made):
    (tmp_path / "folder").mkdir(exist_ok=True)
    path = tmp_path / "folder" / "net.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UserError) as caught:
        outside.from_file(path, few_digits())
    return str(caught.value)


def linear():
    """Flatten, then a product with ``w``."""
    nodes = [node("Flatten", "X", output="f"), node("MatMul", "f", "w")]
    return model(nodes, (1, 8, 8), {"w": torch.ones(64, 10)})


@pytest.mark.parametrize(
    ("location", "entries", "words"),
    [
        ("../secret", {}, "beside it"),
        ("/etc/hostname", {}, "beside it"),
        ("link", {}, "beside it"),
        ("", {}, "beside it"),
        ("net.data", {"length": "100000000000"}, "no part of the 2560 bytes"),
        ("net.data", {"offset": "2560", "length": "1"}, "no part of"),
        ("net.data", {"offset": "-1"}, "no part of"),
        ("net.data", {"basepath": "/"}, "no part of"),
    ],
)
def test_numbers_outside_of_the_folder_are_not_read(tmp_path, location, entries, words):
    made = linear()
    tensor = made.graph.initializer[0]
    raw = tensor.raw_data
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_bytes(raw)
    (tmp_path / "folder" / "net.data").write_bytes(raw)
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location} | entries).items():
        tensor.external_data.add(key=key, value=value)
    assert words in refused_onnx(tmp_path, made)


def test_numbers_beside_the_file_are_read(tmp_path):
    made = linear()
    path = tmp_path / "net.onnx"
    onnx.save(made, path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert (tmp_path / "net.data").stat().st_size == 2560
    [_, layer] = outside.from_file(path, few_digits())
    assert torch.equal(layer.weight, torch.ones(10, 64))


@pytest.mark.parametrize("length", [{}, {"length": "2560"}])
def test_many_tensors_that_share_a_file_are_refused(tmp_path, length):
    made = linear()
    [tensor] = made.graph.initializer
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "net.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "net.data"} | length).items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "folder" / "net.onnx"
    for number in range(archives.SHARED):
        path.write_bytes(made.SerializeToString())
        assert len(outside.from_file(path, few_digits())) == 2
        made.graph.initializer.add().CopyFrom(tensor)
        made.graph.initializer[-1].name = f"w{number}"
    together = 2560 * (archives.SHARED + 1)
    assert f"{together} bytes together, in files of 2560" in refused_onnx(tmp_path, made)


HUGE = [
    helper.make_node("ConstantOfShape", ["sizes"], ["c"]),
    helper.make_node("Expand", ["one", "sizes"], ["c"]),
    helper.make_node("Tile", ["one", "sizes"], ["c"]),
    helper.make_node("Range", ["zero", "million", "tiny"], ["c"]),
    helper.make_node("EyeLike", ["sizes"], ["c"], dtype=99),
]


@pytest.mark.parametrize("huge", HUGE, ids=lambda made: made.op_type)
def test_constants_of_any_size_are_not_computed(tmp_path, huge):
    made = linear()
    constants = {
        "sizes": np.array([10**6, 10**6]),
        "one": np.ones((1, 1), np.float32),
        "zero": np.array(0.0, np.float32),
        "million": np.array(1e6, np.float32),
        "tiny": np.array(1e-6, np.float32),
    }
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    made.graph.node.insert(0, huge)
    assert huge.op_type in refused_onnx(tmp_path, made)


def test_constants_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "NUMBERS", 1000)
    made = linear()
    size = numpy_helper.from_array(np.array([400]), "size")
    made.graph.initializer.append(size)
    for number in range(3):
        made.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], [f"c{number}"]))
        if number < 2:
            assert len(reading.from_onnx(made, (1, 8, 8))) == 2
    words = refused_onnx(tmp_path, made)
    assert "node c0, operator ConstantOfShape: expected at most 1000 numbers" in words


def test_an_operator_that_contains_a_graph_is_not_computed(tmp_path):
    made = linear()
    value = numpy_helper.from_array(np.array(True), "t")
    inner = helper.make_graph([helper.make_node("Identity", ["t"], ["i"])], "inner", [], [])
    inner.output.append(helper.make_tensor_value_info("i", TensorProto.BOOL, []))
    made.graph.initializer.append(value)
    made.graph.node.insert(
        0, helper.make_node("If", ["t"], ["c"], then_branch=inner, else_branch=inner)
    )
    assert "contains a graph" in refused_onnx(tmp_path, made)


@pytest.mark.parametrize("pads", [10**5, 10**9])
def test_an_output_of_any_size_is_not_computed(tmp_path, pads):
    convolution = node("Conv", "X", "w", pads=[pads] * 4)
    made = model([convolution], (1, 8, 8), {"w": torch.ones(1, 1, 3, 3)})
    assert "Conv" in refused_onnx(tmp_path, made)


def test_a_model_of_a_huge_batch_is_not_run(tmp_path):
    made = linear()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**9
    assert "a batch of 1000000000" in refused_onnx(tmp_path, made)
