"""The error itself, out of what Ray makes of it."""

from __future__ import annotations

from deploy.ray_errors import essence


def test_the_last_error_of_a_traceback_keeps_its_lines_and_loses_its_module() -> None:
    message = (
        "The deployment failed to start 2 times in a row. See controller logs for details. Error:\n"
        "\x1b[36mray::ServeReplica:baton:Worker.initialize()\x1b[39m (pid=1, ip=10.0.0.1)\n"
        "ValueError: 1 is too much\n"
        "\nThe above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n"
        '  File "engine.py", line 1, in start\n'
        "core.errors.StartupError: engine failed in phase 'configure': 1 problem\n"
        "  max_model_len is too large\n"
        "\nSomething Ray adds."
    )
    assert essence(message) == (
        "StartupError: engine failed in phase 'configure': 1 problem\n  max_model_len is too large"
    )


def test_an_error_without_a_text_is_its_name() -> None:
    assert essence("Traceback (most recent call last):\n  File ...\nasyncio.exceptions.TimeoutError") == (
        "asyncio.exceptions.TimeoutError"
    )


def test_a_message_without_an_error_stays_as_it_is() -> None:
    message = "Deployment 'Worker' has 2 replicas that have taken more than 30s to initialize."
    assert essence(message) == message
