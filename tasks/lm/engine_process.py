"""vLLM behind a pipe: the process that `tasks.lm.engine` starts, in an environment that has vLLM.

It imports nothing of this project. A line of JSON on its input is what to do, a line of JSON on its output the
answer; what vLLM prints goes to the error output. It ends with its input.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Open the model that the first line names, then take weights and answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    asked = map(json.loads, sys.stdin)
    options = next(asked)
    llm = LLM(
        skip_tokenizer_init=True,
        generation_config="vllm",  # nothing but what each request says
        logprobs_mode="processed_logprobs",
        **options,
    )

    def reply(found: Any) -> None:
        print(json.dumps(found), file=replies, flush=True)

    reply("ready")
    for request in asked:
        if "weights" in request:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": request["weights"]})
            llm.reset_prefix_cache()
            reply("taken")
            continue
        answers = llm.generate(
            [{"prompt_token_ids": ids} for ids in request["prompts"]],
            [
                SamplingParams(seed=seed, logprobs=0, ignore_eos=True, detokenize=False, **request["sampling"])
                for seed in request["seeds"]
            ],
            use_tqdm=False,
        )
        found = [answer.outputs[0] for answer in answers]
        reply(
            {
                "ids": [list(each.token_ids) for each in found],
                "logprobs": [
                    [at[token].logprob for token, at in zip(each.token_ids, each.logprobs, strict=True)]
                    for each in found
                ],
            }
        )


if __name__ == "__main__":
    main()
