"""Data sets, partitions of them over workers, and endless batches. All data sets are in one table, DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mergesfl.data.cifar10 import load_cifar10
from mergesfl.data.dataset import Dataset, IntArray, Scale, Split
from mergesfl.data.digits import load_digits
from mergesfl.data.folder import load_folder
from mergesfl.data.har import load_har
from mergesfl.data.idx import load_fashion_mnist, load_mnist
from mergesfl.data.npz import load_npz
from mergesfl.data.partition import Partition, Partitioner, load_partition, parse_partition, save_partition
from mergesfl.data.request import IMAGE_SIZE_PIXELS, Request
from mergesfl.data.sampling import Batches
from mergesfl.data.speech import load_speech
from mergesfl.data.statistics import PartitionStatistics, partition_statistics
from mergesfl.errors import ConfigError, DataError, unknown_name

__all__ = [
    "DATASETS",
    "Batches",
    "Dataset",
    "Loader",
    "Partition",
    "PartitionStatistics",
    "Partitioner",
    "Scale",
    "Split",
    "load_dataset",
    "load_partition",
    "parse_partition",
    "partition_statistics",
    "save_partition",
]


@dataclass(frozen=True)
class Loader:
    """One line of the table of data sets.

    Attributes:
        description: what it is, for people.
        default_roots: where to look below ./data when no root is given, in this order; () when there is no such place.
        expected: what the root must hold.
        source: where to get it.
        load: reads it; raises DataError or ConfigError.
        bundled: it comes with a library and has no root.
        downloads: it can be fetched from the network when asked to.
        chooses: `load` itself reads no other training samples than those asked for; else they are taken afterwards.
    """

    description: str
    default_roots: tuple[str, ...]
    expected: str
    source: str
    load: Callable[[Request], Dataset]
    bundled: bool = False
    downloads: bool = False
    chooses: bool = False


DATASETS: dict[str, Loader] = {
    "digits": Loader(
        "handwritten digits, 1 x 8 x 8, 10 classes, 1,437 / 360",
        (), "nothing: bundled with scikit-learn", "pip install 'mergesfl[ps]'", load_digits, bundled=True,
    ),
    "har": Loader(
        "UCI HAR, smartphone signals, 1 x 128 x 9, 6 activities, 7,352 / 2,947, grouped by subject",
        ("UCI HAR Dataset", "uci-har", "har"),
        "the folder 'UCI HAR Dataset' (train/ and test/ with 'Inertial Signals'), or uci_har.npz with X_train "
        "(n, 9, 128), y_train 0..5, subject_train and the same for test",
        "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones", load_har,
    ),
    "fashion-mnist": Loader(
        "Fashion-MNIST, clothes, 1 x 28 x 28, 10 classes, 60,000 / 10,000",
        ("fashion-mnist",), "FashionMNIST/raw with the four idx files, packed (.gz) or not",
        "https://github.com/zalandoresearch/fashion-mnist, or allow the download", load_fashion_mnist, downloads=True,
    ),
    "mnist": Loader(
        "MNIST, handwritten digits, 1 x 28 x 28, 10 classes, 60,000 / 10,000",
        ("mnist",), "MNIST/raw with the four idx files, packed (.gz) or not",
        "http://yann.lecun.com/exdb/mnist, or allow the download", load_mnist, downloads=True,
    ),
    "cifar10": Loader(
        "CIFAR-10, photographs, 3 x 32 x 32, 10 classes, 50,000 / 10,000, flip + crop in training",
        ("cifar10",),
        "the folder cifar-10-batches-py as published, or cifar10.npz with X_train uint8 (n, 32, 32, 3), y_train and "
        "the same for test",
        "https://www.cs.toronto.edu/~kriz/cifar.html, or allow the download", load_cifar10, downloads=True,
    ),
    "speech": Loader(
        "Speech Commands v2, one-second words, 1 x 16,000, 35 words, grouped by speaker",
        ("speech_commands_v0.02", "speech"),
        "one folder of wav files per word, testing_list.txt and validation_list.txt; or an archive with X_train "
        "(n, 16000) int16 or float32, y_train and the same for test; a worker's own data: without lists, without test",
        "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz", load_speech, chooses=True,
    ),
    "folder": Loader(
        "any images: train/CLASS/* and test/CLASS/* (or val/), brought to one size; IMAGE-100 is such a folder",
        (), "folders train and test (or val), each with one folder of images per class; a worker's own data: train",
        "your own images, or 100 classes of https://www.image-net.org", load_folder, chooses=True,
    ),
    "npz": Loader(
        "any numpy archive with X_train, y_train, X_test, y_test",
        (), "a .npz file with X_train, y_train, X_test, y_test (a worker's own data: the first two); optional "
        "group_train, group_test, classes (names in label order), num_classes",
        "written with numpy.savez", load_npz,
    ),
}  # fmt: skip


def load_dataset(
    name: str,
    root: Path | None = None,
    download: bool = False,
    image_size_pixels: int = IMAGE_SIZE_PIXELS,
    train_only: bool = False,
    choose: Callable[[IntArray], IntArray] | None = None,
) -> Dataset:
    """One data set of the table, checked.

    Args:
        name: a name of DATASETS, or "name:path", e.g. "har:/data/uci_har.npz", "npz:/data/x.npz".
        root: file or folder that holds it; None looks below ./data.
        download: whether it may be fetched from the network (torchvision's data sets only).
        image_size_pixels: only "folder" looks at it.
        train_only: what a worker brings needs no test part and may hold no samples, see Request.
        choose: from the labels of all training samples (n,) to the rows to keep; None: all of them.

    Raises:
        ConfigError: unknown name, no root where one is needed, a library that is not installed.
        DataError: missing or damaged; names the path, what was expected there and where to get it.
    """
    name, colon, path = name.partition(":")
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    loader = DATASETS[name]
    if colon:
        if root is not None:
            raise ConfigError(f"data set '{name}:{path}' and root '{root}' both name a path: give one of them")
        if not path:
            raise ConfigError(f"data set '{name}:' names no path after the colon: write {name}:PATH")
        root = Path(path)
    if loader.bundled:
        if root is not None:
            raise ConfigError(f"data set '{name}' has no path ({loader.expected}), got '{root}': leave it out")
        root = Path()
    if root is None:
        if not loader.default_roots:
            raise ConfigError(f"data set '{name}' needs a path: write {name}:PATH. Expected there: {loader.expected}")
        places = [Path("data") / folder for folder in loader.default_roots]
        root = next((place for place in places if place.exists()), places[0])
    if download and not loader.downloads:
        raise ConfigError(f"data set '{name}' cannot be downloaded here: get it from {loader.source}")
    request = Request(root.expanduser(), download, image_size_pixels, train_only, choose)
    try:
        dataset = loader.load(request)
    except DataError as error:
        advice = f"Expected at {root}: {loader.expected}. Get it: {loader.source}"
        raise DataError(f"data set '{name}': {error}. {advice}") from error
    return dataset if loader.chooses else replace(dataset, train=request.share_of(dataset.train))
