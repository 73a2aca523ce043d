"""``.ddcm`` files: a header that identifies the codec and the model, followed by the code of one image.

=======  =====================================================================
bytes    content, numbers big-endian
=======  =====================================================================
4        ``DDCM``
1        version of the format, 1
1        log2 of the codewords K
1        atoms M
1        bits C of a further atom's weight
2        steps T
8        seed of the codebooks
2, 2, 2  channels, height, width
16       first half of the SHA-256 of the model
8        first quarter of the SHA-256 of the decoded image's bytes
4        CRC-32 of all the other bytes of the file
the rest  for each step M indices, then M - 1 weights, of fixed width; zero bits fill the last byte
=======  =====================================================================

The decoded image's digest lets a decoder say whether its arithmetic agreed with the encoder's to the last bit.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._validate import integer
from danlu.diffusion.codec import CodecConfig, Codes

__all__ = ["CodecFile", "image_digest", "model_digest", "pack", "unpack"]

_MAGIC, _VERSION = b"DDCM", 1
_HEAD = struct.Struct(">4sBBBBHQHHH16s8sI")


@dataclass(frozen=True)
class CodecFile:
    """The content of a ``.ddcm`` file.

    Attributes:
        codes: of one image, ``(1, T - 1, M)``.
        config: of the codec.
        shape: channels, height and width.
        model: 16 bytes that identify the model, see :func:`model_digest`.
        image: 8 bytes that identify the decoded image, see :func:`image_digest`.
    """

    codes: Codes
    config: CodecConfig
    shape: tuple[int, int, int]
    model: bytes
    image: bytes


def model_digest(state: dict[str, Tensor]) -> bytes:
    """Return 16 bytes that change with any weight's name, shape or value."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()[:16]


def image_digest(pixels: Tensor) -> bytes:
    """Return 8 bytes that change with any pixel of ``pixels``, uint8 ``(C, H, W)``."""
    return hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).digest()[:8]


def pack(file: CodecFile) -> bytes:
    """Return the bytes of a ``.ddcm`` file.

    Raises:
        ValueError: codes of several images, a shared codebook, or a size that does not fit the file format.

    >>> config = CodecConfig(steps=3, codewords=16)
    >>> codes = Codes(torch.tensor([[[3], [15]]]), torch.zeros(1, 2, 0, dtype=torch.int64))
    >>> data = pack(CodecFile(codes, config, (1, 8, 8), bytes(16), bytes(8)))
    >>> len(data), data[-1:].hex(), torch.equal(unpack(data).codes.indices, codes.indices)
    (53, '3f', True)
    """
    config = file.config
    if len(file.codes.indices) != 1:
        raise ValueError(f"a file holds the code of one image, got {len(file.codes.indices)}")
    if config.shared:
        raise ValueError("shared codebooks are for comparison only and have no file format")
    for name, size in zip(("channels", "height", "width"), file.shape, strict=True):
        integer(name, size, high=2**16 - 1)
    body = _bits(file.codes, config)
    head = _HEAD.pack(*_fields(file), 0)
    return head[:-4] + struct.pack(">I", zlib.crc32(head[:-4] + body)) + body


def unpack(data: bytes) -> CodecFile:
    """Read the bytes of a ``.ddcm`` file; they may come from an untrusted source.

    Raises:
        ValueError: they are not a ``.ddcm`` file, are incomplete, were changed, or are of another version of the
            format.
    """
    if data[:4] != _MAGIC:
        raise ValueError("not a .ddcm file: it does not begin with DDCM")
    if len(data) < _HEAD.size:
        raise ValueError(f"cut short: {len(data)} bytes, the header alone has {_HEAD.size}")
    _, version, index_bits, atoms, gain_bits, steps, seed, *shape, model, image, crc = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"the file has format version {version}; this danlu reads version {_VERSION}")
    head, body = data[: _HEAD.size - 4], data[_HEAD.size :]
    intact = zlib.crc32(head + body) == crc
    try:
        config = CodecConfig(steps=steps, codewords=1 << index_bits, atoms=atoms, gain_bits=gain_bits, seed=seed)
        for name, size in zip(("channels", "height", "width"), shape, strict=True):
            integer(name, size)
    except ValueError as problem:
        raise ValueError(f"damaged: {problem}") from None
    if len(body) != -(-config.bits // 8):
        raise ValueError(f"cut short or damaged: {len(body)} bytes of code, the header says {-(-config.bits // 8)}")
    if not intact:
        raise ValueError("damaged: its checksum is wrong")
    channels, height, width = shape
    return CodecFile(_codes(body, config), config, (channels, height, width), model, image)


def _fields(file: CodecFile) -> tuple[bytes | int, ...]:
    config = file.config
    index_bits = config.codewords.bit_length() - 1
    sizes = (index_bits, config.atoms, config.gain_bits, config.steps, config.seed, *file.shape)
    return _MAGIC, _VERSION, *sizes, file.model, file.image


def _widths(config: CodecConfig) -> NDArray[np.int64]:
    """Return the width in bits of each number of a step."""
    index_bits = config.codewords.bit_length() - 1
    return np.array([index_bits] * config.atoms + [config.gain_bits] * (config.atoms - 1))


def _bits(codes: Codes, config: CodecConfig) -> bytes:
    values = torch.cat((codes.indices[0], codes.gains[0]), dim=1).cpu().numpy()
    columns = [
        values[:, [column]] >> np.arange(width)[::-1] & 1 for column, width in enumerate(_widths(config).tolist())
    ]
    return np.packbits(np.concatenate(columns, axis=1).astype(np.uint8).ravel()).tobytes()


def _codes(body: bytes, config: CodecConfig) -> Codes:
    bits = np.unpackbits(np.frombuffer(body, dtype=np.uint8), count=config.bits).reshape(config.steps - 1, -1)
    ends = np.cumsum(_widths(config))
    columns = [
        bits[:, end - width : end].astype(np.int64) @ (1 << np.arange(width)[::-1])
        for end, width in zip(ends.tolist(), _widths(config).tolist(), strict=True)
    ]
    values = torch.from_numpy(np.stack(columns, axis=1))[None]
    return Codes(values[..., : config.atoms], values[..., config.atoms :])
