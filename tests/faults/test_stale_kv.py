"""Row 11 as a client can try it: KV fields that only workers may set, in every place a request has for them.

Handles that are forged, truncated, stale or of another model, and row 10, are in
``tests/integration/test_pulls.py``: nothing but a worker can send those.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.faults.cluster import FaultCluster
from tests.faults.configuration import MODEL
from tests.faults.references import CHAT, COMPLETIONS, MIXED, WHOLE, Case, References
from tests.integration.parity import complete, differences

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400), pytest.mark.fault_row(11)]

PULL = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[0, 1, 2, 3]],
    "remote_engine_id": "another cluster's",
    "remote_request_id": "somebody else's",
    "remote_host": "127.0.0.1",
    "remote_port": 9,
    "remote_num_tokens": 384,
    "tp_size": 1,
}
PIN = {"do_remote_decode": True, "do_remote_prefill": False}
FIELDS: dict[str, dict[str, Any]] = {
    "a pull": {"kv_transfer_params": PULL},
    "a pull of more than there is": {"kv_transfer_params": PULL | {"remote_num_tokens": 10**9}},
    "KV pinned for ever": {"kv_transfer_params": PIN},
    "a text among vLLM's extra arguments": {"vllm_xargs": {"kv_transfer_params": json.dumps(PULL)}},
    "a list among vLLM's extra arguments": {"vllm_xargs": {"kv_transfer_params": [1, "x"]}},
    "given tokens among vLLM's extra arguments": {"vllm_xargs": {"baton_replay_token_ids": [1, 2, 3]}},
    "both": {"kv_transfer_params": PULL, "vllm_xargs": {"kv_transfer_params": "x"}},
}


def case_for(path: str, references: References) -> Case:
    kind = WHOLE if path == COMPLETIONS else MIXED
    return next(case for case in references.cases if (case.kind, case.path) == (kind, path))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", FIELDS)
def test_kv_fields_of_a_client_change_nothing(
    name: str, path: str, broken_cluster: FaultCluster, references: References
) -> None:
    case = case_for(path, references)

    answer = broken_cluster.post(path, case.body | FIELDS[name])

    assert answer.status == 200, answer.body
    assert differences(complete(answer), case.expected) == []


def test_kv_fields_in_the_extra_body_of_the_openai_client_change_nothing(
    broken_cluster: FaultCluster, references: References
) -> None:
    case = case_for(COMPLETIONS, references)
    request = {key: value for key, value in case.body.items() if key != "ignore_eos"}
    with openai.OpenAI(base_url=f"{broken_cluster.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=MODEL, **request, extra_body={"ignore_eos": True, "kv_transfer_params": PULL}
        )

    assert answer.choices[0].text == case.text


def test_nothing_is_held_after_all_those(broken_cluster: FaultCluster) -> None:
    assert broken_cluster.leaked_blocks(within_s=4) == {}
