"""Steps as rows of a stream's messages: joined into one StepBatchRequest, whose answer is cut into their results. No
I/O; session.py says what a session may send, the transports send it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_client.effects import Call
from tenuto_client.errors import TenutoError, UnexpectedReplyError, error_from_message
from tenuto_client.options import PolicyOptions
from tenuto_client.results import StepResult, Timings
from tenuto_client.served import ServedPolicy
from tenuto_proto.v1 import policy_pb2 as pb

Leaves = tuple[bytes, ...]
"""An observation, see ObservationCodec.pack_row."""
Answer = StepResult | TenutoError
"""What becomes of a step."""


class Step:
    """One observation on its way, the same however often it is sent."""

    __slots__ = ("begins", "form", "leaves", "replayed_version", "reward", "session_id", "step_index")

    def __init__(
        self,
        form: StepForm,
        session_id: int,
        step_index: int,
        begins: bool,
        reward: float | None,
        leaves: Leaves,
    ) -> None:
        """``begins``: an episode begins with it. Raises TypeError or ValueError for a reward that is no number."""
        self.form, self.session_id, self.step_index, self.leaves = form, session_id, step_index, leaves
        # Checked here, since what cannot be sent would spoil the message of others.
        self.begins, self.reward = bool(begins), None if reward is None else float(reward)
        self.replayed_version = 0
        """The version that answered it, where it is sent again because a restart has undone it; else 0."""

    def replay(self, form: StepForm, version: int) -> Step:
        """Return the step as it is sent again after ``version`` had answered it. ``form``: one for replays."""
        again = Step(form, self.session_id, self.step_index, self.begins, self.reward, self.leaves)
        again.replayed_version = version
        return again

    def request(self) -> pb.StepRequest:
        """Return the message of a unary call."""
        return pb.StepRequest(
            session_id=self.session_id,
            step_index=self.step_index,
            episode_start=self.begins,
            observation=self.form.served.codec.tensors(self.leaves, None),
            reward=self.reward,
            outputs=self.form.outputs,
            replayed_version=self.replayed_version,
        )

    def call(self, timeout_s: float) -> Call:
        """Return the unary call."""
        return Call("Step", self.request(), timeout_s, self.session_id, self.form.server_epoch, self)

    def success(self, answer: Any) -> StepResult | None:
        """Return the result that an answer is or holds; None where it is anything else, such as an error."""
        if isinstance(answer, StepResult):
            return answer
        if not isinstance(answer, pb.StepResponse) or answer.step_index != self.step_index:
            return None
        try:
            return self.result(answer)
        except UnexpectedReplyError:
            return None

    def read(self, answer: pb.StepResponse | StepResult) -> StepResult:
        """Return the result that an answer is or holds. Raises UnexpectedReplyError."""
        if answer.step_index != self.step_index:
            raise UnexpectedReplyError(f"reply: got step index {answer.step_index}, expected {self.step_index}")
        return answer if isinstance(answer, StepResult) else self.result(answer)

    def result(self, reply: pb.StepResponse) -> StepResult:
        """Read the answer to a unary call. Raises UnexpectedReplyError."""
        served = self.form.served
        return StepResult(
            action=served.action(reply.action),
            value=reply.value if reply.HasField("value") else None,
            log_prob=reply.log_prob if reply.HasField("log_prob") else None,
            logits=served.array(reply.logits).copy() if reply.HasField("logits") else None,
            version=reply.version,
            step_index=reply.step_index,
            timings=Timings.from_wire(reply.timings),
            durable_step=reply.durable_step if self.form.durable else None,
        )


class StepForm:
    """What the steps of an open session have in common. Those whose ``key`` is equal may share a message."""

    def __init__(
        self,
        served: ServedPolicy,
        server_epoch: int,
        options: PolicyOptions,
        *,
        durable: bool = False,
        replays: bool = False,
    ) -> None:
        """``server_epoch``: of the server that has the session. ``durable``: the session outlives that server.
        ``replays``: all steps have a replayed version.
        """
        self.served, self.server_epoch, self.durable, self.replays = served, server_epoch, durable, replays
        self.outputs = options.outputs_to_wire()
        self.key = (served.policy_name, server_epoch, options.outputs, durable, replays)

    def join(self, steps: Sequence[Step], timeout_s: float) -> pb.StepBatchRequest:
        """Return one message of steps of this form, which may wait for the device for ``timeout_s``."""
        columns = map(b"".join, zip(*[step.leaves for step in steps], strict=True))
        request = pb.StepBatchRequest(
            session_ids=[step.session_id for step in steps],
            step_indices=[step.step_index for step in steps],
            observations=self.served.codec.tensors(columns, len(steps)),
            outputs=self.outputs,
            queue_timeout_ms=max(1, int(1e3 * timeout_s)),
        )
        starts = [step.begins for step in steps]
        if True in starts:
            request.episode_starts.extend(starts)
        request.rewards.extend([np.nan if step.reward is None else step.reward for step in steps])
        if self.replays:
            request.replayed_versions.extend([step.replayed_version for step in steps])
        return request

    def cut(self, steps: Sequence[Step], reply: pb.StepBatchResponse) -> Sequence[Answer]:
        """Return the answer of each step of a message."""
        if reply.HasField("error"):
            return [error_from_message(reply.error, self.server_epoch) for _ in steps]
        try:
            if not reply.errors:
                return self._results(steps, reply)
            failed = {e.row: error_from_message(e.error, self.server_epoch) for e in reply.errors}
            if any(row >= len(steps) for row in failed):
                raise UnexpectedReplyError(f"reply: got errors of rows {sorted(failed)}, expected {len(steps)} rows")
            # Where no row was applied there may be no columns.
            results = self._results(steps, reply) if len(failed) < len(steps) else []
            return [failed[row] if row in failed else results[row] for row in range(len(steps))]
        except UnexpectedReplyError as error:
            # Each is raised somewhere else.
            return [UnexpectedReplyError(*error.args) for _ in steps]

    def _results(self, steps: Sequence[Step], reply: pb.StepBatchResponse) -> list[StepResult]:
        """Read all rows, also those that failed. Raises UnexpectedReplyError."""
        n = len(steps)
        # One slice is far cheaper than reading protobuf's list element by element.
        versions = reply.versions[:]
        if len(versions) != n:
            raise UnexpectedReplyError(f"reply: got {len(versions)} versions, expected {n}")
        array, timings = self.served.array, Timings.from_wire(reply.timings)
        rows = zip(
            self.served.actions(reply.actions, n),
            array(reply.values, (n,)).tolist() if reply.HasField("values") else repeat(None),
            array(reply.log_probs, (n,)).tolist() if reply.HasField("log_probs") else repeat(None),
            self._logits(reply.logits, n) if reply.HasField("logits") else repeat(None),
            versions,
            steps,
            self._durable_steps(reply, n),
            strict=False,
        )
        return [
            StepResult(action, value, log_prob, logits, version, step.step_index, timings, durable_step)
            for action, value, log_prob, logits, version, step, durable_step in rows
        ]

    def _durable_steps(self, reply: pb.StepBatchResponse, num_rows: int) -> Iterable[int | None]:
        if not self.durable:
            return repeat(None)
        durable_steps = reply.durable_steps[:]
        if len(durable_steps) not in (0, num_rows):
            raise UnexpectedReplyError(f"reply: got {len(durable_steps)} durable steps, expected {num_rows}")
        return durable_steps or repeat(0)

    def _logits(self, tensor: pb.Tensor, num_rows: int) -> list[NDArray[np.float32]]:
        array = self.served.array(tensor)
        if array.ndim != 2 or len(array) != num_rows:
            raise UnexpectedReplyError(f"reply: got logits of shape {array.shape}, expected {num_rows} rows")
        return [row.copy() for row in array]
