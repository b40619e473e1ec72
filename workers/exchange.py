"""The exchange: features out, the next batch drawn meanwhile, gradient in, and how long both took.

Observed as the spec's section 2 says: the worker times its own forward and backward (compute) and each exchange; the
server reports how long it held the request; transfer = exchange - held. Only durations cross the network. Encoding and
decoding is computing, unless it is done beside it. Of a step in parts, whose exchange goes on while it computes:
workers/timing.py.

Sending only hands the frames to the transport, which carries them while the next part is computed or the next batch
drawn. Should the gradient be back before that is done, the rest counts as transfer: what the step took in all stays
right.

With a sender that has a thread all parts of a step but the last, after which there is nothing to compute, are encoded
beside the forward of the next. Their frames are out a little later so, which only matters to a worker that waits for
its gradients: one that has, in the step before, encodes as if there were no thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import Features, Gradient
from mergesfl.runtime.arrays import borrowed_tensor, to_array
from mergesfl.runtime.clock import Clock
from workers.link import Link, SessionLostError
from workers.pace import Pace, Stretch
from workers.sender import Sender
from workers.timing import StepTiming


class TimedExchange:
    """`exchange(step, z, y) -> wait` for one round; counts compute and transfer seconds while it is used.

    A step is a batch, or its parts one after the other; it is over when all that were sent have been waited for.
    `prepare` is called when the last is out: what else there is to do before the next step.
    """

    def __init__(
        self,
        link: Link,
        round_num: int,
        batch_size: int,
        clock: Clock,
        pace: Pace,
        device: torch.device,
        codecs: RunCodecs,
        sender: Sender,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = link
        self._round_num = round_num
        self._batch_size = batch_size
        self._clock = clock
        self._pace = pace
        self._device = device
        self._codecs = codecs
        self._sender = sender
        self._prepare = prepare
        self._step_compute_seconds = 0.0
        self._num_owed_samples = 0  # whose gradient has come, and whose backward is not done yet
        self._has_exchanged = False
        self._timing: StepTiming | None = None  # of the step that is under way
        self._num_sent = self._num_sent_samples = self._num_answered = 0  # of that step: parts, their samples, parts
        self._is_held_up = True  # in the step before; of the first one nobody knows
        self._compute_begin_seconds = clock.now_seconds()
        self.compute_seconds = 0.0
        self.transfer_seconds = 0.0

    def __call__(self, step: int, features: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """features (d_i, F...), labels (d_i,) -> a function that blocks until dL/dfeatures (d_i, F...) is there."""
        z, y = to_array(features), to_array(labels)  # waits for the device
        message = Features(self._round_num, step, z, y, part=self._num_sent)
        self._num_sent, self._num_sent_samples = self._num_sent + 1, self._num_sent_samples + len(labels)
        is_last = self._num_sent_samples == self._batch_size
        is_beside = not (is_last or self._is_held_up) and self._sender.may_send_beside(message)
        if not is_beside:
            message = self._sender.encode(message)
        self._pause_compute(Stretch(len(labels), self._num_owed_samples))
        self._has_exchanged = True
        if not is_beside:
            self._sender.settle()
        now_seconds = self._clock.now_seconds()
        self._timing = self._timing or StepTiming(now_seconds)
        self._timing.sent(now_seconds)
        if is_beside:
            self._sender.send_beside(message)
        else:
            self._sender.send(message)
        self._compute_begin_seconds = self._clock.now_seconds()
        shape = tuple(features.shape)
        return lambda: self._wait(step, shape)

    def _wait(self, step: int, shape: tuple[int, ...]) -> Tensor:
        """The gradient of the next part that is out, of this shape. Raises SessionLostError and like Link.receive."""
        assert self._timing is not None, "every part is waited for once, in the order in which they were sent"
        if self._num_owed_samples:  # the backward of the part before
            self._pause_compute(Stretch(num_backward_samples=self._num_owed_samples))
        self._sender.settle()  # nothing to do, unless the step has ended with fewer samples than were planned
        if not self._num_answered:
            self._prepare()
        begin_seconds = self._clock.now_seconds()
        answer = self._link.receive()
        if not isinstance(answer, Gradient):
            raise SessionLostError(f"expected Gradient for step {step}, got {type(answer).__name__}")
        self._compute_begin_seconds = self._clock.now_seconds()
        self._timing.waited(self._compute_begin_seconds - begin_seconds)
        self._timing.answered(self._compute_begin_seconds, answer.held_seconds)
        self._num_answered += 1
        if self._num_answered == self._num_sent:
            self.transfer_seconds += self._pace.transfer_seconds(
                self._timing.transfer_seconds(), self._num_sent_samples
            )
            self._is_held_up = self._timing.is_held_up
            self._timing, self._num_sent, self._num_sent_samples, self._num_answered = None, 0, 0, 0
        try:
            gradient = self._codecs.decode_gradient(answer, shape)
        except RemoteProtocolError as error:
            raise SessionLostError(f"the server {error}") from error
        self._num_owed_samples = shape[0] if gradient.size else 0  # an empty one: nothing to go back through
        return borrowed_tensor(gradient, self._device)

    def finish(self, num_steps: int) -> None:
        """Ends the last stretch of computing and settles what is reported for the round."""
        num_samples = self._batch_size * num_steps
        if self._has_exchanged:
            self._pause_compute(Stretch(num_backward_samples=self._num_owed_samples))
        else:
            self._pause_compute(Stretch(num_full_samples=num_samples, num_steps=num_steps))
        self.compute_seconds = self._pace.compute_seconds(self._step_compute_seconds, num_samples)

    def _pause_compute(self, stretch: Stretch) -> None:
        """A stretch of computing ends: throttle, then count it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._pace.throttle(self._clock.now_seconds() - self._compute_begin_seconds, stretch)
        seconds = self._clock.now_seconds() - self._compute_begin_seconds
        self._step_compute_seconds += seconds
        self._num_owed_samples = 0
        if self._timing is not None:
            self._timing.computed(seconds)
