"""How large anything on the wire may be. One record, so that both ends and all transports agree on every bound.

Every number is [ours]. A limit is there so that a broken or hostile peer costs us bounded memory; it is set well above
what honest traffic needs, and the reason stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one message.

    Attributes:
        max_message_bytes: all frames together, and each of them. VGG19 whole, the largest classification network that
            is common (144 million parameters), is 548 MiB in float32; features of AlexNet for a batch of 640 are
            10 MiB. Not derived from the run: the endpoint is bound before the run is known.
        max_header_bytes: the msgpack frame. 4096 tensors at 128 bytes each make 512 KiB. Parsing costs at most about
            64 bytes of memory per byte of header (an empty list), so 1 MiB is at most 64 MiB for a moment.
        max_tensors: tensors of one message, in the header or in frames. ResNet-152 has 932 parameters and buffers.
        max_tensor_rank: dimensions of a tensor; a batch of 3-d images has 5.
        max_name_length: characters of a tensor name, a key. File names end at 255.
        max_worker_id_length: characters of a worker id. A host name has at most 64 on Linux; ids stand in tables and on
            axes.
        max_text_length: characters of a reason or of a device description: a screen full.
        max_map_entries: entries of settings, versions or metrics.
        max_sequence_length: entries of label_counts and class_names: ImageNet-21k has 21,841 classes.
        max_count: rounds, steps, samples, bytes. The sum over 8,192 workers is still exact in float64 (2**53).
        max_int: any other integer (seeds, settings): what int64 holds.
        max_seconds: a duration: 31 years.
    """

    max_message_bytes: int = 576 << 20
    max_header_bytes: int = 1 << 20
    max_tensors: int = 4096
    max_tensor_rank: int = 8
    max_name_length: int = 255
    max_worker_id_length: int = 100
    max_text_length: int = 4096
    max_map_entries: int = 256
    max_sequence_length: int = 1 << 16
    max_count: int = 1 << 40
    max_int: int = (1 << 63) - 1
    max_seconds: float = 1e9

    @property
    def max_frames(self) -> int:
        """Frames of one message: the header and the tensors."""
        return 1 + self.max_tensors


DEFAULT = Limits()


def clipped(text: str, limits: Limits = DEFAULT) -> str:
    """A text that may be sent as a `reason`: cut to max_text_length, and what is not printable escaped.

    Not printable are line breaks, terminal codes, half characters.

    >>> clipped("x" * 5000)[-3:], len(clipped("x" * 5000))
    ('...', 4096)
    >>> print(clipped("two\\nlines"))
    two\\nlines
    """
    text = text[: limits.max_text_length + 1]  # an escape is no shorter than its character
    legal = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return legal if len(legal) <= limits.max_text_length else legal[: limits.max_text_length - 3] + "..."
