"""What a file or folder is that is no checkpoint, by its first bytes or names, and how to make one of it."""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from fastws.files.limits import open_regular

FIRST = 512  # bytes that are looked at
AGAIN = "download the file again"
ARRAYS = "save its arrays by name with safetensors.numpy.save_file"
PACKED = {"gzip": (b"\x1f\x8b", "gunzip"), "bzip2": (b"BZh", "bunzip2"), "xz": (b"\xfd7zXZ\0", "unxz")}
PACKED |= {"zstd": (b"(\xb5/\xfd", "unzstd"), "7z": (b"7z\xbc\xaf'\x1c", "7z x"), "rar": (b"Rar!", "unrar x")}
MSGPACK = re.compile(rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[ -~]", re.DOTALL)  # a map, a name
# the version, then the name of the producer, another name of it, the graph or the operators
ONNX = re.compile(rb"\x08[\x03-\x1f](?:[\x12\x1a].[ -~]|[\x3a\x42].)", re.DOTALL)
STATES = re.compile(r".*mp_rank_\d+_model_states\.pt|.*zero_pp_rank_.*_states\.pt|zero_to_fp32\.py")

DEEPSPEED = "a DeepSpeed checkpoint; convert it with python zero_to_fp32.py <folder> <output>"
DISTRIBUTED = "a folder of torch.distributed.checkpoint; convert it with python -m "
DISTRIBUTED += "torch.distributed.checkpoint.format_utils dcp_to_torch <folder> <file>"
FOLDERS: tuple[tuple[str, Callable[[set[str]], bool]], ...] = (
    (DISTRIBUTED, lambda names: ".metadata" in names and any(name.endswith(".distcp") for name in names)),
    (DEEPSPEED, lambda names: any(map(STATES.fullmatch, names))),
    (f"a SavedModel of TensorFlow; load it with TensorFlow and {ARRAYS}", lambda names: "saved_model.pb" in names),
    (f"an Orbax checkpoint; restore it with orbax and {ARRAYS}", lambda names: "_CHECKPOINT_METADATA" in names),
)
KINDS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("nothing, for the file is empty; copy it again", lambda first: not first),
    (
        "a Git LFS pointer, not the file it stands for; fetch that with git lfs pull",
        lambda first: first.startswith(b"version https://git-lfs.github.com/spec/"),
    ),
    (
        "a git-annex pointer, not the file it stands for; fetch that with git annex get",
        lambda first: first.startswith(b"/annex/objects/"),
    ),
    (f"a web page; {AGAIN}", lambda first: text(first).startswith((b"<!doctype", b"<html", b"<head", b"<!--"))),
    (f"an XML document, as servers answer with errors; {AGAIN}", lambda first: text(first).startswith(b"<?xml")),
    ("a JSON file; name the files with the tensors", lambda first: text(first).startswith((b"{", b'["', b"[{"))),
    (
        "a GGUF file of llama.cpp; let transformers convert it with from_pretrained(<folder>, gguf_file=<name>)",
        lambda first: first.startswith(b"GGUF"),
    ),
    (
        f"an HDF5 file, as Keras writes; load it with Keras or h5py and {ARRAYS}",
        lambda first: first.startswith(b"\x89HDF\r\n\x1a\n"),
    ),
    (f"an array of numpy; read it with numpy.load and {ARRAYS}", lambda first: first.startswith(b"\x93NUMPY")),
    (f"a TensorFlow Lite model; read it with TensorFlow and {ARRAYS}", lambda first: first[4:8] == b"TFL3"),
    *(
        (
            f"a file that is packed with {name}; unpack it with {tool}",
            lambda first, magic=magic: first.startswith(magic),
        )
        for name, (magic, tool) in PACKED.items()
    ),
    ("a tar archive; unpack it with tar -xf", lambda first: first[257:262] == b"ustar"),
    (
        "a safetensors file; give it a name that ends in .safetensors",
        lambda first: first[8:10] == b'{"' and int.from_bytes(first[:8], "little") < 2**27,
    ),
    (
        f"a msgpack file, as Flax writes; read it with flax.serialization.msgpack_restore and {ARRAYS}",
        lambda first: MSGPACK.match(first) is not None,
    ),
    (
        f"an ONNX model; read its initializers with onnx.numpy_helper.to_array and {ARRAYS}",
        lambda first: ONNX.match(first) is not None,
    ),
)
ARCHIVES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (f"an npz archive of numpy; read it with numpy.load and {ARRAYS}", lambda name: name.endswith(".npy")),
    (f"a Keras archive; load it with Keras and {ARRAYS}", lambda name: name.endswith(".weights.h5")),
    (
        "a torch.export program; save torch.export.load(<file>).state_dict with torch.save",
        lambda name: name.endswith("serialized_exported_program.json") or "/models/" in name,
    ),
    (
        "a TorchScript program; save torch.jit.load(<file>).state_dict() with torch.save",
        lambda name: "/code/" in name,
    ),
    ("a torch file; give it a name that ends in .pt", lambda name: name.endswith("/data.pkl")),
)


def find_kind(path: Path, format: str) -> str:
    """What a file is that is not of a format, in words, and how to make a checkpoint of it.

    Args:
        path: The file.
        format: ``"torch"``, ``"safetensors"`` or ``"JSON"``: what it could not be read as.

    Returns:
        "" if its first bytes do not say, or say that it is of the format.

    Raises:
        OSError: If it cannot be read.
    """
    with open_regular(path) as file:
        first = file.read(FIRST)
    if first.startswith(b"PK\x03\x04"):
        kind = find_archive(path)
    else:
        kind = next((kind for kind, fits in KINDS if fits(first)), "")
    return "" if kind.startswith(f"a {format} file") else kind


def find_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError):
        return ""  # whoever reads it says what is wrong
    return next((kind for kind, fits in ARCHIVES if any(map(fits, names))), "")


def find_folder_kind(names: Iterable[str]) -> str:
    """The same for a folder, by the names of its files and folders."""
    names = set(names)
    return next((kind for kind, fits in FOLDERS if fits(names)), "")


def text(first: bytes) -> bytes:
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
