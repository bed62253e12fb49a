"""From the policy's shards to the servers' weights, and the proof that they arrived.

Trainer ranks: `sync` is what the loop calls. It gives every vLLM worker its own shards (`shards`), which the worker
reads in place (`shared_memory`) or receives (`stream`), or gathers whole tensors for servers on the ranks' own GPUs
(`gathered`); then it asks the servers what they compute (`canary`).
vLLM workers: `receive`, which `rollout.plugin` makes known to vLLM, with the other halves of `shared_memory` and
`stream`. Which bytes go where both sides work out alone, from `weights.resharding`.
"""

BACKEND = "megatron_dgpo"
"""The name of these transfers among vLLM's: `--weight-transfer-config '{"backend": "megatron_dgpo"}'`."""
