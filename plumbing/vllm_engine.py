"""The vLLM engine beside the trainer: one per process, in the process, with weights handed over after each update."""

import os
import re

import torch
from transformers import AutoConfig

from plumbing.settings import InputError


class VLLMEngine:
    """One vLLM engine per process, in this process, beside the trainer. README, "vLLM"."""

    def __init__(
        self, path: str, banned, seed: int, max_model_len: int, memory=0.4, dtype="auto", on_cpu=False, tp=1, dummy=False
    ):
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the engine in this process, so weights can be handed over
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError("--engine vllm: vllm is not installed; pip install -r requirements-vllm.txt.") from error
        text = AutoConfig.from_pretrained(path).text_config
        distributed = (
            torch.distributed.is_initialized()
        )  # must be so BEFORE the engine starts, or it makes its own group
        options = (
            {"kv_cache_memory_bytes": 64 << 20, "block_size": 32} if on_cpu else {"gpu_memory_utilization": memory}
        )
        if dummy:
            options["load_format"] = "dummy"  # --random-init: the trainer's weights come with the first sync
        state = torch.get_rng_state()  # the engine reseeds the global generators
        self.llm = LLM(
            model=path,
            dtype=dtype,
            max_model_len=min(max_model_len, text.max_position_embeddings),
            seed=seed,
            enforce_eager=on_cpu,
            tensor_parallel_size=tp,
            limit_mm_per_prompt={"image": 0, "video": 1},
            mm_processor_kwargs={"do_resize": False, "cap_pixels_per_frame": False},  # as data.encode_prompt
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="external_launcher" if distributed else None,
            enable_sleep_mode=not on_cpu,
            **options,
        )
        torch.set_rng_state(state)
        self.bans = dict.fromkeys(banned(text.vocab_size), -100.0)  # vLLM's lowest; at most 1,024
        self.on_cpu, self.asleep, self.tp = on_cpu, False, tp
        if tp > 1:
            from vllm.distributed import get_tp_group

            self.group = get_tp_group()

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """As TransformersEngine.generate. One request per CoT: each has its own seed, and prefix caching shares the
        video. With tensor parallelism the ranks of a group sample for each other: all do the work of all, in shards."""
        from vllm import SamplingParams

        if self.tp > 1:  # COLLECTIVE within the group
            slim = [{key: prefix[key] for key in ("short_ids", "input_ids", "video")} for prefix in prefixes]
            parts = [None] * self.tp
            torch.distributed.all_gather_object(parts, (slim, seeds), group=self.group.cpu_group)
            mine = self.group.rank_in_group
            begin = sum(len(part[0]) for part in parts[:mine])
            own = slice(begin, begin + len(prefixes))
            prefixes, seeds = ([x for part in parts for x in part[k]] for k in (0, 1))
        else:
            own = slice(None)
        self._wake()
        requests, parameters = [], []
        for prefix, row in zip(prefixes, seeds, strict=True):
            video = prefix["video"]
            metadata = {**video.metadata(), "do_sample_frames": False}  # our frames: never resampled
            prompt = {
                "prompt_token_ids": prefix["short_ids"],
                "multi_modal_data": {"video": [(video.frames, metadata)]},
            }
            for seed in row:
                requests.append(prompt)
                parameters.append(
                    SamplingParams(
                        temperature=temperature,
                        top_p=1.0,
                        top_k=0,
                        max_tokens=max_new_tokens,
                        seed=seed % 2**31,
                        logit_bias=self.bans,
                        logprobs=0,
                        detokenize=False,
                    )
                )
        outputs = iter(self.llm.generate(requests, parameters, use_tqdm=False))
        samples = [[next(outputs) for _ in row] for row in seeds]
        for prefix, row in zip(prefixes, samples):
            if list(row[0].prompt_token_ids) != prefix["input_ids"].tolist():
                raise InputError(
                    "vLLM expanded the video to other prompt tokens than the trainer; check both versions."
                )
        self.log_probs = [
            [[next(iter(t.values())).logprob for t in s.outputs[0].logprobs] for s in row] for row in samples[own]
        ]
        if not self.on_cpu:
            self.llm.sleep(level=1)  # gives the GPU's memory to the update; its CPU build cannot sleep
            self.asleep = True
        return [[list(s.outputs[0].token_ids) for s in row] for row in samples[own]]

    def sync(self, named_weights) -> None:
        """Hands new weights to the engine and empties its caches, which hold what the old weights computed.

        Raises InputError unless every weight has arrived: vLLM itself only warns.
        """
        self._wake()
        self.llm.collective_rpc(_reload, args=(named_weights,))
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests still running"
        self.llm.llm_engine.reset_encoder_cache()  # without it a repeated video kills the engine

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Ends the engine. It takes the process group with it, so this is the very last thing a script does."""
        self.llm.llm_engine.engine_core.shutdown()


def _reload(worker, named_weights) -> None:
    """Runs in vLLM's worker, which is this process: loads the weights, then checks that each has reached a parameter."""
    model, sent, arrived = worker.model_runner.get_model(), [], set()
    load = model.load_weights

    def noting():
        for name, value in named_weights:
            sent.append(name)
            yield name, value

    def load_and_note(weights):
        arrived.update(load(weights))
        return arrived

    model.load_weights = load_and_note
    try:
        worker.model_runner.reload_weights(weights_iterator=noting())
    finally:
        del model.load_weights  # the class's own again
    wanted = model.hf_to_vllm_mapper.apply_list(sent)
    for packed, parts in model.packed_modules_mapping.items():  # vLLM holds q, k and v in one matrix, gate and up too
        wanted = [re.sub(rf"\.({'|'.join(parts)})\.", f".{packed}.", name) for name in wanted]
    if missing := sorted(set(wanted) - arrived):
        raise InputError(f"vLLM did not take {len(missing)} trained weights, e.g. {missing[0]}; check its version.")
