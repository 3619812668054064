from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_BOOL: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_INT16: _ClassVar[DataType]
    DATA_TYPE_UINT16: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_UINT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]
    DATA_TYPE_UINT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    POLICY_UNKNOWN: _ClassVar[ErrorReason]
    VERSION_UNKNOWN: _ClassVar[ErrorReason]
    SESSION_UNKNOWN: _ClassVar[ErrorReason]
    SESSION_CLOSED: _ClassVar[ErrorReason]
    SESSION_EXPIRED: _ClassVar[ErrorReason]
    SESSION_EXISTS: _ClassVar[ErrorReason]
    STEP_INDEX_MISMATCH: _ClassVar[ErrorReason]
    STEP_IN_FLIGHT: _ClassVar[ErrorReason]
    OBSERVATION_FIELDS: _ClassVar[ErrorReason]
    OBSERVATION_DTYPE: _ClassVar[ErrorReason]
    OBSERVATION_SHAPE: _ClassVar[ErrorReason]
    OBSERVATION_OUT_OF_SPACE: _ClassVar[ErrorReason]
    OBSERVATION_NOT_FINITE: _ClassVar[ErrorReason]
    BATCH_EMPTY: _ClassVar[ErrorReason]
    BATCH_TOO_LARGE: _ClassVar[ErrorReason]
    BATCH_COLUMNS: _ClassVar[ErrorReason]
    SESSION_REPEATED: _ClassVar[ErrorReason]
    POLICY_MISMATCH: _ClassVar[ErrorReason]
    CAPACITY_REACHED: _ClassVar[ErrorReason]
    QUEUE_FULL: _ClassVar[ErrorReason]
    QUEUE_TIMEOUT: _ClassVar[ErrorReason]
    DRAINING: _ClassVar[ErrorReason]
    COMPUTE_FAILED: _ClassVar[ErrorReason]
    UNAUTHENTICATED: _ClassVar[ErrorReason]
    PERMISSION_DENIED: _ClassVar[ErrorReason]
    QUOTA_EXCEEDED: _ClassVar[ErrorReason]
    SESSION_EXPORTED: _ClassVar[ErrorReason]
    SNAPSHOT_INVALID: _ClassVar[ErrorReason]
    SNAPSHOT_MISMATCH: _ClassVar[ErrorReason]
    STORE_UNAVAILABLE: _ClassVar[ErrorReason]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_BOOL: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_INT16: DataType
DATA_TYPE_UINT16: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_UINT32: DataType
DATA_TYPE_INT64: DataType
DATA_TYPE_UINT64: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT64: DataType
ERROR_REASON_UNSPECIFIED: ErrorReason
POLICY_UNKNOWN: ErrorReason
VERSION_UNKNOWN: ErrorReason
SESSION_UNKNOWN: ErrorReason
SESSION_CLOSED: ErrorReason
SESSION_EXPIRED: ErrorReason
SESSION_EXISTS: ErrorReason
STEP_INDEX_MISMATCH: ErrorReason
STEP_IN_FLIGHT: ErrorReason
OBSERVATION_FIELDS: ErrorReason
OBSERVATION_DTYPE: ErrorReason
OBSERVATION_SHAPE: ErrorReason
OBSERVATION_OUT_OF_SPACE: ErrorReason
OBSERVATION_NOT_FINITE: ErrorReason
BATCH_EMPTY: ErrorReason
BATCH_TOO_LARGE: ErrorReason
BATCH_COLUMNS: ErrorReason
SESSION_REPEATED: ErrorReason
POLICY_MISMATCH: ErrorReason
CAPACITY_REACHED: ErrorReason
QUEUE_FULL: ErrorReason
QUEUE_TIMEOUT: ErrorReason
DRAINING: ErrorReason
COMPUTE_FAILED: ErrorReason
UNAUTHENTICATED: ErrorReason
PERMISSION_DENIED: ErrorReason
QUOTA_EXCEEDED: ErrorReason
SESSION_EXPORTED: ErrorReason
SNAPSHOT_INVALID: ErrorReason
SNAPSHOT_MISMATCH: ErrorReason
STORE_UNAVAILABLE: ErrorReason

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class NamedTensor(_message.Message):
    __slots__ = ("name", "tensor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Space(_message.Message):
    __slots__ = ("box", "discrete", "multi_discrete", "multi_binary", "tuple", "dict")
    BOX_FIELD_NUMBER: _ClassVar[int]
    DISCRETE_FIELD_NUMBER: _ClassVar[int]
    MULTI_DISCRETE_FIELD_NUMBER: _ClassVar[int]
    MULTI_BINARY_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    box: BoxSpace
    discrete: DiscreteSpace
    multi_discrete: MultiDiscreteSpace
    multi_binary: MultiBinarySpace
    tuple: TupleSpace
    dict: DictSpace
    def __init__(self, box: _Optional[_Union[BoxSpace, _Mapping]] = ..., discrete: _Optional[_Union[DiscreteSpace, _Mapping]] = ..., multi_discrete: _Optional[_Union[MultiDiscreteSpace, _Mapping]] = ..., multi_binary: _Optional[_Union[MultiBinarySpace, _Mapping]] = ..., tuple: _Optional[_Union[TupleSpace, _Mapping]] = ..., dict: _Optional[_Union[DictSpace, _Mapping]] = ...) -> None: ...

class BoxSpace(_message.Message):
    __slots__ = ("low", "high")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    low: Tensor
    high: Tensor
    def __init__(self, low: _Optional[_Union[Tensor, _Mapping]] = ..., high: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class DiscreteSpace(_message.Message):
    __slots__ = ("n", "start", "dtype")
    N_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    n: int
    start: int
    dtype: DataType
    def __init__(self, n: _Optional[int] = ..., start: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class MultiDiscreteSpace(_message.Message):
    __slots__ = ("nvec", "start", "dtype")
    NVEC_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    nvec: Tensor
    start: Tensor
    dtype: DataType
    def __init__(self, nvec: _Optional[_Union[Tensor, _Mapping]] = ..., start: _Optional[_Union[Tensor, _Mapping]] = ..., dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class MultiBinarySpace(_message.Message):
    __slots__ = ("shape",)
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TupleSpace(_message.Message):
    __slots__ = ("spaces",)
    SPACES_FIELD_NUMBER: _ClassVar[int]
    spaces: _containers.RepeatedCompositeFieldContainer[Space]
    def __init__(self, spaces: _Optional[_Iterable[_Union[Space, _Mapping]]] = ...) -> None: ...

class DictSpace(_message.Message):
    __slots__ = ("entries",)
    class Entry(_message.Message):
        __slots__ = ("key", "space")
        KEY_FIELD_NUMBER: _ClassVar[int]
        SPACE_FIELD_NUMBER: _ClassVar[int]
        key: str
        space: Space
        def __init__(self, key: _Optional[str] = ..., space: _Optional[_Union[Space, _Mapping]] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[DictSpace.Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[DictSpace.Entry, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("policy_name", "version")
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    policy_name: str
    version: int
    def __init__(self, policy_name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy_name", "version", "versions", "observation_space", "action_space", "observation", "state", "state_fingerprint", "training", "limits", "server_epoch", "refused", "batch_invariant")
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_SPACE_FIELD_NUMBER: _ClassVar[int]
    ACTION_SPACE_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    policy_name: str
    version: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    observation_space: Space
    action_space: Space
    observation: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    state: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    state_fingerprint: str
    training: TrainingProgress
    limits: Limits
    server_epoch: int
    refused: _containers.RepeatedCompositeFieldContainer[RefusedVersion]
    batch_invariant: bool
    def __init__(self, policy_name: _Optional[str] = ..., version: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., observation_space: _Optional[_Union[Space, _Mapping]] = ..., action_space: _Optional[_Union[Space, _Mapping]] = ..., observation: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., state: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., state_fingerprint: _Optional[str] = ..., training: _Optional[_Union[TrainingProgress, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_epoch: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[RefusedVersion, _Mapping]]] = ..., batch_invariant: bool = ...) -> None: ...

class RefusedVersion(_message.Message):
    __slots__ = ("version", "message")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    version: int
    message: str
    def __init__(self, version: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class TrainingProgress(_message.Message):
    __slots__ = ("env_steps", "iteration", "return_mean")
    ENV_STEPS_FIELD_NUMBER: _ClassVar[int]
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    RETURN_MEAN_FIELD_NUMBER: _ClassVar[int]
    env_steps: int
    iteration: int
    return_mean: float
    def __init__(self, env_steps: _Optional[int] = ..., iteration: _Optional[int] = ..., return_mean: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_batch_rows", "max_message_bytes", "idle_timeout_s", "queue_timeout_s")
    MAX_BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    max_batch_rows: int
    max_message_bytes: int
    idle_timeout_s: float
    queue_timeout_s: float
    def __init__(self, max_batch_rows: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., idle_timeout_s: _Optional[float] = ..., queue_timeout_s: _Optional[float] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("session_id", "policy_name", "version", "seed", "deterministic")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    policy_name: str
    version: int
    seed: int
    deterministic: bool
    def __init__(self, session_id: _Optional[int] = ..., policy_name: _Optional[str] = ..., version: _Optional[int] = ..., seed: _Optional[int] = ..., deterministic: bool = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session_id", "policy_name", "version", "seed", "server_epoch", "durable")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    policy_name: str
    version: int
    seed: int
    server_epoch: int
    durable: bool
    def __init__(self, session_id: _Optional[int] = ..., policy_name: _Optional[str] = ..., version: _Optional[int] = ..., seed: _Optional[int] = ..., server_epoch: _Optional[int] = ..., durable: bool = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id", "reward")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    reward: float
    def __init__(self, session_id: _Optional[int] = ..., reward: _Optional[float] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ("num_steps", "num_episodes")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_EPISODES_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_episodes: int
    def __init__(self, num_steps: _Optional[int] = ..., num_episodes: _Optional[int] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("policy_name", "after_session_id", "page_size")
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    policy_name: str
    after_session_id: int
    page_size: int
    def __init__(self, policy_name: _Optional[str] = ..., after_session_id: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "more")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    more: bool
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., more: bool = ...) -> None: ...

class InspectSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class InspectSessionResponse(_message.Message):
    __slots__ = ("session", "state")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    state: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., state: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SealedSnapshot
    def __init__(self, snapshot: _Optional[_Union[SealedSnapshot, _Mapping]] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SealedSnapshot
    def __init__(self, snapshot: _Optional[_Union[SealedSnapshot, _Mapping]] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session_id", "next_step_index", "server_epoch", "durable")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    next_step_index: int
    server_epoch: int
    durable: bool
    def __init__(self, session_id: _Optional[int] = ..., next_step_index: _Optional[int] = ..., server_epoch: _Optional[int] = ..., durable: bool = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "policy_name", "version", "next_step_index", "num_episodes", "episode_return", "idle_s", "deterministic", "seed", "principal", "durable_step", "exported")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_EPISODES_FIELD_NUMBER: _ClassVar[int]
    EPISODE_RETURN_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    EXPORTED_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    policy_name: str
    version: int
    next_step_index: int
    num_episodes: int
    episode_return: float
    idle_s: float
    deterministic: bool
    seed: int
    principal: str
    durable_step: int
    exported: bool
    def __init__(self, session_id: _Optional[int] = ..., policy_name: _Optional[str] = ..., version: _Optional[int] = ..., next_step_index: _Optional[int] = ..., num_episodes: _Optional[int] = ..., episode_return: _Optional[float] = ..., idle_s: _Optional[float] = ..., deterministic: bool = ..., seed: _Optional[int] = ..., principal: _Optional[str] = ..., durable_step: _Optional[int] = ..., exported: bool = ...) -> None: ...

class SealedSnapshot(_message.Message):
    __slots__ = ("snapshot", "sha256")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    snapshot: bytes
    sha256: bytes
    def __init__(self, snapshot: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class SessionSnapshot(_message.Message):
    __slots__ = ("format_version", "session_id", "policy_name", "principal", "pinned_version", "seed", "deterministic", "version", "weights_sha256", "state_fingerprint", "next_step_index", "num_episodes", "episode_return", "has_reward", "state", "reply")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    PINNED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    STATE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_EPISODES_FIELD_NUMBER: _ClassVar[int]
    EPISODE_RETURN_FIELD_NUMBER: _ClassVar[int]
    HAS_REWARD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    session_id: int
    policy_name: str
    principal: str
    pinned_version: int
    seed: int
    deterministic: bool
    version: int
    weights_sha256: str
    state_fingerprint: str
    next_step_index: int
    num_episodes: int
    episode_return: float
    has_reward: bool
    state: _containers.RepeatedCompositeFieldContainer[Tensor]
    reply: StepResponse
    def __init__(self, format_version: _Optional[int] = ..., session_id: _Optional[int] = ..., policy_name: _Optional[str] = ..., principal: _Optional[str] = ..., pinned_version: _Optional[int] = ..., seed: _Optional[int] = ..., deterministic: bool = ..., version: _Optional[int] = ..., weights_sha256: _Optional[str] = ..., state_fingerprint: _Optional[str] = ..., next_step_index: _Optional[int] = ..., num_episodes: _Optional[int] = ..., episode_return: _Optional[float] = ..., has_reward: bool = ..., state: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., reply: _Optional[_Union[StepResponse, _Mapping]] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("value", "log_prob", "logits")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    value: bool
    log_prob: bool
    logits: bool
    def __init__(self, value: bool = ..., log_prob: bool = ..., logits: bool = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session_id", "step_index", "episode_start", "observation", "reward", "outputs", "replayed_version")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    EPISODE_START_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_VERSION_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    step_index: int
    episode_start: bool
    observation: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    reward: float
    outputs: Outputs
    replayed_version: int
    def __init__(self, session_id: _Optional[int] = ..., step_index: _Optional[int] = ..., episode_start: bool = ..., observation: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ..., reward: _Optional[float] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., replayed_version: _Optional[int] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("step_index", "version", "action", "value", "log_prob", "logits", "timings", "durable_step")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    version: int
    action: Tensor
    value: float
    log_prob: float
    logits: Tensor
    timings: Timings
    durable_step: int
    def __init__(self, step_index: _Optional[int] = ..., version: _Optional[int] = ..., action: _Optional[_Union[Tensor, _Mapping]] = ..., value: _Optional[float] = ..., log_prob: _Optional[float] = ..., logits: _Optional[_Union[Tensor, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., durable_step: _Optional[int] = ...) -> None: ...

class StepBatchRequest(_message.Message):
    __slots__ = ("session_ids", "step_indices", "episode_starts", "observations", "rewards", "outputs", "request_id", "queue_timeout_ms", "replayed_versions")
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    STEP_INDICES_FIELD_NUMBER: _ClassVar[int]
    EPISODE_STARTS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    session_ids: _containers.RepeatedScalarFieldContainer[int]
    step_indices: _containers.RepeatedScalarFieldContainer[int]
    episode_starts: _containers.RepeatedScalarFieldContainer[bool]
    observations: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    rewards: _containers.RepeatedScalarFieldContainer[float]
    outputs: Outputs
    request_id: int
    queue_timeout_ms: int
    replayed_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_ids: _Optional[_Iterable[int]] = ..., step_indices: _Optional[_Iterable[int]] = ..., episode_starts: _Optional[_Iterable[bool]] = ..., observations: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ..., rewards: _Optional[_Iterable[float]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., request_id: _Optional[int] = ..., queue_timeout_ms: _Optional[int] = ..., replayed_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class StepBatchResponse(_message.Message):
    __slots__ = ("request_id", "versions", "actions", "values", "log_probs", "logits", "errors", "timings", "error", "durable_steps")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEPS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    actions: Tensor
    values: Tensor
    log_probs: Tensor
    logits: Tensor
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    timings: Timings
    error: Error
    durable_steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., actions: _Optional[_Union[Tensor, _Mapping]] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ..., log_probs: _Optional[_Union[Tensor, _Mapping]] = ..., logits: _Optional[_Union[Tensor, _Mapping]] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., durable_steps: _Optional[_Iterable[int]] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("row", "error")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    row: int
    error: Error
    def __init__(self, row: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "reason", "message", "metadata", "retry_after_ms")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: ErrorReason
    message: str
    metadata: _containers.ScalarMap[str, str]
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[_Union[ErrorReason, str]] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_us", "compute_us", "batch_size")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    batch_size: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., batch_size: _Optional[int] = ...) -> None: ...
