import tenuto_client


def test_public_names() -> None:
    assert sorted(tenuto_client.__all__) == tenuto_client.__all__
    assert set(tenuto_client.__all__) == {
        "AsyncRemotePolicy", "AsyncRemoteVectorPolicy", "BatchError", "CapacityError", "ClientClosedError",
        "ComputeError", "DeadlineError", "DrainingError", "MessageTooLargeError", "MissingExtraError",
        "ObservationError", "OverloadedError", "PolicyUnknownError", "QueueTimeoutError", "RemotePolicy",
        "RemoteVectorPolicy",
        "RowsError", "ServedPolicy", "ServerUnavailableError", "SessionClosedError", "SessionError",
        "SessionExistsError", "SessionExpiredError", "SessionGoneError", "SessionLostError", "SessionUnknownError",
        "SpaceMismatchError", "StepError", "StepIndexError", "StepInFlightError", "StepResult", "TenutoError",
        "Timings", "UnexpectedReplyError", "VectorStepResult", "VersionUnknownError",
    }  # fmt: skip
    for name in tenuto_client.__all__:
        assert getattr(tenuto_client, name).__doc__
