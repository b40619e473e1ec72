"""A real link made as slow as that of an emulated device, without root: frames wait before they go on.

A message of n bytes takes n / rate * jitter + latency in its direction, as in the simulation; the two directions do not
disturb each other. Nothing blocks meanwhile: a message that is still under way cannot be sent yet (`send` says False,
as it does without a connection) or has not arrived yet (`recv` says None), so the worker goes on listening.

What is uncertain: a message begins to arrive when it is picked up here, not when the server sent it. In a round that is
nearly the same, for a worker waits for every answer, but for the time that it takes to draw its next batch. Of a step
in parts (training.parts_per_step) it is not: a worker stands still while a part goes up, and what has come meanwhile
is heard, but while it computes nothing moves. So less overlaps here than on a real link or in the simulation.
"""

from __future__ import annotations

from mergesfl.protocol.codec import wire_bytes
from mergesfl.protocol.layout import Frame
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.emulation import SMALL_MESSAGE_BYTES, EmulatedDevice
from mergesfl.transport.base import Frames, WorkerEndpoint


class ThrottledEndpoint:
    """WorkerEndpoint over another one, at the rate and latency of a device.

    Args:
        endpoint: the real connection; this object closes it.
        clock: what is waited on.
        device: whose link it is; its present rate and jitter hold for the whole message.
    """

    def __init__(self, endpoint: WorkerEndpoint, clock: Clock, device: EmulatedDevice) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._device = device
        self._uploading: Frames | None = None
        self._sent_seconds = 0.0  # when the upload ends
        self._downloading: list[Frame] | None = None
        self._arrived_seconds = 0.0  # when the download ends

    def send(self, frames: Frames) -> bool:
        """Queues one message when it is through; False before (try again with the same frames), or without connection.

        Other frames take the place of an upload that was given up.
        """
        if wire_bytes(frames) > SMALL_MESSAGE_BYTES:
            now_seconds = self._clock.now_seconds()
            if frames is not self._uploading:
                self._uploading = frames
                self._sent_seconds = now_seconds + self._transfer_seconds(frames)
            if now_seconds < self._sent_seconds:
                return False
        else:
            self._clock.sleep(self._device.latency_seconds)
        if not self._endpoint.send(frames):
            return False
        self._uploading = None
        return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message; None when the time is over (0: only look), or an upload is through and wants `send`."""
        now_seconds = self._clock.now_seconds()
        end_seconds = now_seconds + timeout_seconds
        if self._uploading is not None and now_seconds < self._sent_seconds:
            end_seconds = min(end_seconds, self._sent_seconds)
        if self._downloading is None:
            self._downloading = self._endpoint.recv(end_seconds - now_seconds)
            if self._downloading is None:
                return None
            self._arrived_seconds = self._clock.now_seconds() + self._transfer_seconds(self._downloading)
        self._clock.sleep(max(0.0, min(end_seconds, self._arrived_seconds) - self._clock.now_seconds()))
        if self._clock.now_seconds() < self._arrived_seconds:
            return None
        frames, self._downloading = self._downloading, None
        return frames

    def close(self) -> None:
        """Closes the connection."""
        self._endpoint.close()

    def _transfer_seconds(self, frames: Frames) -> float:
        num_bytes = wire_bytes(frames)
        if num_bytes <= SMALL_MESSAGE_BYTES:
            return self._device.latency_seconds
        factor = self._device.transfer_factor()
        return num_bytes / self._device.link_bytes_per_second * factor + self._device.latency_seconds
