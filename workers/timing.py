"""How much of a step was transfer, when its parts go up, are answered and come down at the same time.

A worker reports two durations of a step, computing and transfer (spec, section 2), and the plan adds them up: together
they must be what the step takes this worker when nobody else is waited for. Unsplit, one thing comes after the other:

    transfer = (features out until gradient in) - held by the server

In parts (P of them) computing goes on meanwhile, and of what the server held a part only delays the step as far as
nothing else was still under way. So:

    transfer = (first part out until last gradient in) - computing in between - delay
    delay    = g[P-1] - max(max over j of (g[P-1-j] - h[j]), s[P-1] + g[P-1] - g[0])

where s[k] is when part k was sent, g[k] when its gradient was there, h[k] how long the server held it. The maximum is
when the last gradient would have come without holding: part j reaches the server as early as it did, which is known
from h[j], and from then on the P - j gradients that are left come one after the other, which the answers have shown to
take g[P-1-j] after the first of them leaves; but none is taken in before the last part is out. With P = 1 it is the
line above. What computing hides of the transfer is not counted, so that both add up to what the step takes [ours].

What is uncertain: a step whose answers leave the server partly held and partly not is taken for faster than it is, by
no more than what was held. Of one that was held and whose forward took longer than parts on their way, more than two,
a little is taken for transfer that computing would have hidden. The server's own computing for a part counts as held,
but where parts queue up behind it, it is taken for transfer, all but the first part's. What computing hides of the
transfer is not the same share at every batch size.
"""

from __future__ import annotations

# Of the computing while parts are out: whoever waits for longer is held up by the link, the server or others. About
# what encoding takes where it takes most, HAR: 2 to 17 % of computing (benchmarks/LOG.md, 2026-11-26). [ours]
HELD_UP_SHARE = 0.1


class StepTiming:
    """The account of one step, in seconds since its first part was sent."""

    def __init__(self, now_seconds: float) -> None:
        """The first part is about to be sent."""
        self._begin_seconds = now_seconds
        self._last_sent_seconds = 0.0
        self._computing_seconds = 0.0
        self._waiting_seconds = 0.0
        self._answered_seconds: list[float] = []  # g, in the order of the parts
        self._held_seconds: list[float] = []  # h

    def sent(self, now_seconds: float) -> None:
        """Another part is about to be sent."""
        self._last_sent_seconds = now_seconds - self._begin_seconds

    def computed(self, seconds: float) -> None:
        """So long was computed while parts were out."""
        self._computing_seconds += seconds

    def waited(self, seconds: float) -> None:
        """So long there was nothing to do but to wait for a gradient."""
        self._waiting_seconds += seconds

    @property
    def is_held_up(self) -> bool:
        """Whether it is the exchange that this step takes so long for, rather than its computing."""
        return self._waiting_seconds > HELD_UP_SHARE * self._computing_seconds

    def answered(self, now_seconds: float, held_seconds: float) -> None:
        """The next part's gradient is there."""
        self._answered_seconds.append(now_seconds - self._begin_seconds)
        self._held_seconds.append(held_seconds)

    def transfer_seconds(self) -> float:
        """Of the whole step; all parts have been answered. Below 0 if the server claims to have held for longer."""
        answered = self._answered_seconds
        ends = [later - held for later, held in zip(reversed(answered), self._held_seconds, strict=True)]
        if len(answered) > 1:
            ends.append(self._last_sent_seconds + answered[-1] - answered[0])
        return max(ends) - self._computing_seconds
