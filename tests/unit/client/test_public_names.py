import tenuto_client


def test_public_names() -> None:
    assert sorted(tenuto_client.__all__) == tenuto_client.__all__
    assert set(tenuto_client.__all__) == {
        "AsyncRemotePolicy", "AsyncRemoteVectorPolicy", "AuthenticationError", "BatchError", "CapacityError",
        "ClientClosedError", "ComputeError", "DeadlineError", "DrainingError", "MessageTooLargeError",
        "MissingExtraError", "ObservationError", "OverloadedError", "PermissionDeniedError", "PolicyUnknownError",
        "QueueTimeoutError", "QuotaExceededError", "RemotePolicy", "RemoteVectorPolicy", "ReplayMismatchError",
        "RowsError", "ServedPolicy", "ServerUnavailableError", "SessionClosedError", "SessionError",
        "SessionExistsError", "SessionExpiredError", "SessionExportedError", "SessionGoneError", "SessionLostError",
        "SessionUnknownError", "SnapshotError", "SpaceMismatchError", "StepError", "StepIndexError",
        "StepInFlightError", "StepResult", "TenutoError", "Timings", "UnexpectedReplyError", "VectorStepResult",
        "VersionUnknownError",
    }  # fmt: skip
    for name in tenuto_client.__all__:
        assert getattr(tenuto_client, name).__doc__
