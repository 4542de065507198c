"""A network and properties of test images as files for outside verifiers."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from robust_app import examination
from robust_app.batches import as_float
from robust_app.checkpoint import replacing
from robust_app.data import Dataset
from robust_app.errors import UserError
from robust_app.evaluation import CHUNK
from robust_app.exact import Verdict
from robust_app.examination import Examination
from robust_app.exchange.parity import Parity, check_parity
from robust_app.exchange.vnnlib import robustness
from robust_app.exchange.writing import to_onnx

MODEL = "model.onnx"


def export(
    network: nn.Sequential,
    dataset: Dataset,
    indices: Sequence[int],
    how: Examination,
    seed: int,
    folder: Path,
    on_image: Callable[[int], object],
) -> tuple[Parity, Counter[str]]:
    """Write the network, the robustness of some test images, and what is known of it here.

    The files are ``model.onnx``, ``vnnlib/image-I.vnnlib`` for each index I, ``instances.csv`` with
    a line ``model,property,seconds`` for each, and ``verdicts.csv`` with this package's verdicts.
    They lie in a folder beside until all are written: an export that is interrupted leaves none.

    Args:
        network: of a run, on the CPU in evaluation mode.
        dataset: the run's own, on the CPU; its test images are used.
        indices: of test images.
        how: ε, and how this package decides; its time limit is also that of ``instances.csv``.
        seed: of the attack's random starts.
        folder: to be made, or empty; then it is replaced.
        on_image: told 1 after each image.

    Returns:
        How far the model's logits lie from the network's, and how many images are certified,
        falsified and undecided.

    Raises:
        UserError: a package is missing, the logits differ, or the folder is not empty or cannot
            be written.
    """
    model = to_onnx(network, dataset.image_shape)
    parity = check_parity(model, network, as_float(dataset.x_test[:CHUNK]))
    instances, verdicts = [], [("property", "label", "verdict")]
    with _making(folder) as partial:
        _write(partial / MODEL, model.SerializeToString())
        for index in indices:
            image, label = dataset.x_test[index], dataset.y_test[index]
            text = robustness(as_float(image), int(label), how.epsilon, dataset.classes)
            path = f"vnnlib/image-{index}.vnnlib"
            _write(partial / path, f"{text}\n".encode())
            instances.append((MODEL, path, f"{how.time_limit:g}"))
            verdict = decided(network, image, label, how, seed)
            verdicts.append((path, str(int(label)), verdict.value))
            on_image(1)
        for name, rows in (("instances.csv", instances), ("verdicts.csv", verdicts)):
            _write(partial / name, "".join(f"{','.join(row)}\n" for row in rows).encode())
    return parity, Counter(verdict for *_, verdict in verdicts[1:])


def decided(
    network: nn.Module, image: Tensor, label: Tensor, how: Examination, seed: int
) -> Verdict:
    """What an attack and the verifiers say of one image ``(C, H, W)``."""
    errors = examination.examine(network, image[None], label[None], how, seed)
    if errors.certified:
        return Verdict.CERTIFIED
    return Verdict.FALSIFIED if errors.falsified else Verdict.UNDECIDED


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` when all is in it; else nothing is left of it."""
    try:
        if folder.exists():
            if any(folder.iterdir()):
                raise UserError(f"{folder}: not empty; choose another with --out")
            folder.rmdir()  # one that cannot be replaced is to be noticed before the work
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():  # of an export that was killed
            shutil.rmtree(partial)
        (partial / "vnnlib").mkdir(parents=True)
        try:
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)
